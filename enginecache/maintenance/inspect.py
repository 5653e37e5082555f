"""The stored engines: inspect, keep, remove and verify them. Builds and loads nothing.

What a hit does not need is imported where it is used: it would take longer to load than the hit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from enginecache.config import Backend, Config, Settings, Shared, chosen_settings, require_count, require_seconds
from enginecache.errors import AmbiguousKeyError, NoDeviceError, NotCachedError, OptionError, shown
from enginecache.host.devices import list_devices
from enginecache.host.toolchain import installed_toolchains
from enginecache.storage.folder import Root
from enginecache.storage.names import files_in, is_quarantined
from enginecache.storage.registry.rows import (
    BuildRecord,
    EntryRecord,
    MissRecord,
    RegistryTotals,
    Standing,
)
from enginecache.storage.space import Reserve
from enginecache.storage.storage import BlobState, Storage

if TYPE_CHECKING:
    import datetime as dt

    from typing_extensions import Self

    from enginecache.maintenance import eviction
    from enginecache.maintenance.findings import Finding, Found, Verification
    from enginecache.maintenance.removal import Removal, Used
    from enginecache.storage.registry.registry import Registry


class HasRecord(Protocol):
    """An object that knows its row, such as :class:`enginecache.Entry`."""

    @property
    def record(self) -> EntryRecord:
        """Return the row."""
        ...


Stored = str | EntryRecord | HasRecord
"""A stored engine: its key or the first characters of it, its row, or what :meth:`EngineCache.get` returned."""

BUILD_ANEW = "Run `enginecache get` again with its model and options, which builds it anew."
MOST_LISTED = 8
"""Engines that an error lists."""


class StoredEngines:
    """The engines in one cache folder.

    Safe from threads and processes. It holds no open file or connection between calls, so it may be carried across a
    fork. What takes an engine takes an entry, a row or a key: all 64 characters, or as many as name one engine.
    """

    def __init__(self, config: Config | Settings) -> None:
        self._settings = config if isinstance(config, Settings) else None
        self.config = config = config.config if isinstance(config, Settings) else config
        self.root = Root.find(config.dir, config.shared)
        self._storage = Storage(self.root)
        self._storage.prepare(self.config.shared)

    @property
    def _registry(self) -> Registry:
        return self._storage.registry

    @functools.cached_property
    def _removal(self) -> Removal:
        from enginecache.maintenance.removal import Removal

        return Removal(self._storage, self._usability)

    @classmethod
    def open(
        cls,
        dir: str | os.PathLike[str] | Config | None = None,  # noqa: A002  the setting's name
        *,
        shared: Shared | None = None,
        backend: Backend | None = None,
        timeout_s: float | None = None,
        max_size_bytes: int | None = None,
        keep_recent_s: float | None = None,
        grace_s: float | None = None,
        failure_ttl_s: float | None = None,
        cuda_major: int | None = None,
        pass_environment: Sequence[str] | None = None,
        follow_links: bool | None = None,
        python: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Open the cache. Makes nothing: the folder and the registry are made when the first engine is stored.

        Each setting that is None is taken from the settings file or the environment, again within a second of a
        change, but for the folder and the interpreter. :class:`enginecache.Config` describes them.

        Args:
            dir: Folder of the cache, or a :class:`enginecache.Config` that has all settings, for good.
            shared: ``group`` lets the folder's group read and write.
            backend: Which TensorRT flavour builds: ``auto``, ``tensorrt`` or ``tensorrt-rtx``.
            timeout_s: Longest wait for another builder, in seconds.
            max_size_bytes: Size that the cache is kept under, in bytes.
            keep_recent_s: How long an engine is safe from eviction after each use, in seconds.
            grace_s: Age in seconds under which leftover files are kept.
            failure_ttl_s: How long a failed build is not repeated, in seconds.
            cuda_major: CUDA major version, for a TensorRT whose packages do not tell it.
            pass_environment: Names of further environment variables that the builder is given.
            follow_links: Follow links that leave the model's folder to external data.
            python: Interpreter that runs builders and trials.

        Raises:
            ConfigError: The configuration cannot be read.
            StoreError: The folder cannot be used.
            RegistryError: The registry cannot be opened.
        """
        return cls(
            chosen_settings(
                dir,
                {
                    "shared": shared,
                    "backend": backend,
                    "timeout_s": timeout_s,
                    "max_size_bytes": max_size_bytes,
                    "keep_recent_s": keep_recent_s,
                    "grace_s": grace_s,
                    "failure_ttl_s": failure_ttl_s,
                    "cuda_major": cuda_major,
                    "pass_environment": pass_environment,
                    "follow_links": follow_links,
                    "python": python,
                },
            )
        )

    def make(self) -> bool:
        """Make the folder and the registry where they are missing. Idempotent; safe across processes.

        Returns:
            Whether this call made a cache where none was.

        Raises:
            StoreError: The folder cannot be made, or must not be used.
            RegistryError: The registry cannot be made.
        """
        return self._storage.make(self.config.shared)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Do nothing: no file or connection is held between calls, and a cache may be used after its ``with`` block."""

    def entries(self, limit: int | None = None) -> list[Used]:
        """Return the entries with their last use, newest first.

        Args:
            limit: Only the newest so many; None is all.
        """
        require_count("limit", limit)
        return [self._removal.used(record) for record in self._registry.entries(limit)]

    def with_last_use(self, engine: Stored) -> Used:
        """Return the stored engine with its last use."""
        return self._removal.used(self._record(engine))

    def find(self, prefix: str) -> EntryRecord:
        """Return the entry whose key begins with ``prefix``.

        Raises:
            OptionError: The prefix is no hex text.
            NotCachedError: There is none; the text says so where it was found damaged and set aside.
            AmbiguousKeyError: There are several.
        """
        prefix = _key_prefix(prefix)
        if not prefix or set(prefix) - set("0123456789abcdef"):
            raise _no_key(prefix)
        found = self._registry.find_prefix(prefix)
        if not found:
            raise self._not_stored(prefix)
        if len(found) > 1:
            listed = "\n".join(f"  {record.key[:16]}  {record.model_name}" for record in found)
            raise AmbiguousKeyError(f"several keys begin with {prefix}", f"Give more characters:\n{listed}")
        return found[0]

    def _not_stored(self, prefix: str) -> NotCachedError:
        """Return the error for a prefix that no entry has: one that was set aside is not merely missing."""
        message = f"no stored engine has a key that begins with {prefix}"
        lost = [one for one in self._registry.set_asides() if one.key.startswith(prefix)]
        if not lost:
            return NotCachedError(message, "See `enginecache ls`.")
        if len(lost) > 1:
            listed = "\n".join(f"  {one.key[:16]}  {one.model_name}: {one}" for one in lost[:MOST_LISTED])
            return NotCachedError(f"{message}: {len(lost)} were set aside", f"{BUILD_ANEW}\n{listed}")
        (one,) = lost
        held = files_in(self.root.quarantine)
        files = [path for path, name in held if is_quarantined(name) and name.startswith(one.digest)]
        kept = f"\nThe damaged file is kept as {max(files)}." if files else ""
        return NotCachedError(f"{message}: {one.key[:12]} ({one.model_name}): {one}", f"{BUILD_ANEW}{kept}")

    def find_intact(self, prefix: str) -> EntryRecord:
        """Like :meth:`find`, with the plan checked: a damaged one is set aside and not served. Counts as a use.

        Raises:
            NotCachedError: There is no such entry, or its blob was damaged or missing.
        """
        record = self.find(prefix)
        if self._storage.check(record) is not BlobState.INTACT:
            why = self._storage.set_aside(record)
            if why is not None:
                raise NotCachedError(why, BUILD_ANEW)
        self._storage.last_used.touch(record.key)
        return record

    def path(self, engine: Stored) -> Path:
        """Return where the plan is."""
        return self._storage.path(self._record(engine))

    def _record(self, engine: Stored) -> EntryRecord:
        """Return the row of what a caller names.

        Raises:
            OptionError: It is not a key.
            NotCachedError: No key begins so.
            AmbiguousKeyError: Several keys begin so.
        """
        if isinstance(engine, EntryRecord):
            return engine
        if not isinstance(engine, str) and not isinstance(getattr(engine, "record", None), EntryRecord):
            raise _no_key(engine)
        return self.find(engine) if isinstance(engine, str) else engine.record

    def builds(self, key: str | None = None, limit: int = 100) -> list[BuildRecord]:
        """Return the attempts to build, newest first."""
        require_count("limit", limit)
        key = None if key is None else _key_prefix(key)
        return self._registry.builds(key, limit)

    def log_path(self, build: BuildRecord) -> Path:
        """Return the path of an attempt's log."""
        return self.root.log_path(build.id)

    def misses(self, limit: int = 100) -> list[MissRecord]:
        """Return the requests that found no engine, latest first."""
        require_count("limit", limit)
        return self._registry.misses(limit)

    def stats(self) -> RegistryTotals:
        """Return counts and sums over all engines, builds and misses."""
        return self._registry.totals()

    def last_uses(self) -> list[dt.datetime]:
        """Return when each stored engine was last used, in no order. How often is not recorded."""
        keys = self._registry.keys()
        return [used_at for key, used_at in self._storage.last_used.all().items() if key in keys]

    def is_intact(self, engine: Stored) -> bool:
        """Return whether the plan is there and has its digest."""
        record = self._record(engine)
        return self._storage.check(record) is BlobState.INTACT

    # Keeping

    def pin(self, engine: Stored) -> None:
        """Exempt the engine from every prune. Idempotent."""
        self._registry.pin(self._record(engine).key)

    def unpin(self, engine: Stored) -> None:
        """Allow a prune to delete the engine again. Idempotent."""
        self._registry.unpin(self._record(engine).key)

    def remove(self, engine: Stored) -> int:
        """Delete the entry, and its plan if no other entry shares it; return the bytes freed.

        Programs that have the plan mapped keep their bytes.

        Raises:
            OptionError: The entry is pinned.
        """
        record = self._record(engine)
        self.make()
        return self._removal.remove(record)

    def plan_prune(self, *, max_size_bytes: int | None = None, older_than_s: float | None = None) -> eviction.PrunePlan:
        """Decide what a prune would delete. Deletes nothing.

        Args:
            max_size_bytes: Bytes that may stay; None takes the configuration's limit.
            older_than_s: Entries not used for so many seconds are deleted.
        """
        require_count("max_size_bytes", max_size_bytes)
        require_seconds("older_than_s", older_than_s)
        limit = self.config.max_size_bytes if max_size_bytes is None else max_size_bytes
        keep_recent_s = self.config.keep_recent_s
        with self._registry.connected():
            past, _ = self._orphans()
            return self._removal.plan(past, keep_recent_s, max_size_bytes=limit, older_than_s=older_than_s)

    def execute_prune(self, plan: eviction.PrunePlan) -> int:
        """Carry out a plan and return the bytes freed. Engines pinned, rebuilt or used since the plan was made stay."""
        if not plan.is_empty:
            self.make()
        return self._removal.execute(plan)

    def verify(self, *, deep: bool = False, repair: bool = False) -> Verification:
        """Compare the registry, the blobs and their records, and look for what crashes left.

        Without ``repair`` it changes nothing but the memo of verified blobs.

        Args:
            deep: Read every blob's bytes, also where nothing changed since they were last verified: only this sees
                damage that the medium did under an unchanged fingerprint.
            repair: Repair what is found; also on a full disk.

        Raises:
            RegistryError: The registry cannot be looked at.
        """
        self._storage.look(self.config.shared)
        return _verified(self.root, self.config, lambda: self, deep=deep, repair=repair)

    def _verify(self, *, deep: bool, repair: bool) -> Verification:
        """Check everything but the registry as a file, which is whole."""
        with self._registry.connected():
            return self._checked(deep=deep, repair=repair)

    def _checked(self, *, deep: bool, repair: bool) -> Verification:
        from enginecache.maintenance import verify
        from enginecache.maintenance.findings import Verification, settle

        findings = list(settle(self._found(deep=deep), repair=repair))
        # After the repairs: an entry that they forgot leaves a file.
        past, young = self._orphans()
        findings += settle(map(self._orphan, past), repair=repair)
        kept = verify.count_kept(self.root, self._registry)
        return Verification(self.stats().entries, tuple(findings), tuple(young), kept)

    @classmethod
    def verify_folder(cls, config: Config, *, deep: bool = False, repair: bool = False) -> Verification:
        """Like :meth:`verify`, also where the registry is too damaged for the cache to be opened.

        Args:
            config: Settings of the cache.
            deep: As for :meth:`verify`.
            repair: As for :meth:`verify`.

        Raises:
            StoreError: The folder cannot be used.
            RegistryError: The registry cannot be looked at.
        """
        root = Root.find(config.dir, config.shared)
        return _verified(root, config, lambda: StoredEngines(config), deep=deep, repair=repair)

    def _found(self, *, deep: bool) -> Found:
        from enginecache.maintenance import verify

        entries = verify.EntryChecks(self._storage)
        return itertools.chain(
            verify.check_folders(self.root),
            entries.check(self._registry.examine(), deep=deep),
            verify.check_artefacts(self.root),
            verify.check_builds(self._registry, self._storage.locks, self.config.grace_s),
        )

    def _orphan(self, item: eviction.Orphan) -> tuple[Finding, Callable[[], bool]]:
        from enginecache.maintenance.findings import Finding

        finding = Finding("orphan", str(item.path), item.what, "delete the file")
        return finding, lambda: self._removal.delete_orphan(item)

    def _orphans(self) -> tuple[list[eviction.Orphan], list[eviction.Orphan]]:
        from enginecache.maintenance import orphans, verify

        if not self.root.is_made:
            return [], []  # no cache, whose folder a prune would have to make first
        named = self._registry.named()
        unfinished = self._registry.unfinished_builds()
        running = [build.id for build in unfinished if verify.is_under_way(build, self._storage.locks)]
        return orphans.find_orphans(self.root, named.__contains__, self.config.grace_s, running=running)

    def _usability(self) -> Callable[[Standing], bool]:
        from enginecache.maintenance import eviction

        try:
            devices = list_devices({})  # all of the host, whatever is hidden from this process
        except NoDeviceError:
            devices = ()
        return eviction.usable_here(installed_toolchains(self.config.cuda_major), devices)


def _key_prefix(prefix: object) -> str:
    if not isinstance(prefix, str):
        raise _no_key(prefix)
    return prefix.lower()


def _no_key(prefix: object) -> OptionError:
    fix = "Give a key, or the first characters of one, from `enginecache ls`."
    return OptionError(f"{shown(prefix)} is not a key", fix)


def _verified(
    root: Root, config: Config, open_engines: Callable[[], StoredEngines], *, deep: bool, repair: bool
) -> Verification:
    """Check the registry as a file first: without it nothing else can be checked."""
    from enginecache.maintenance import verify
    from enginecache.maintenance.findings import Verification

    if not root.is_made:
        return Verification(0, ())
    if repair:
        root.make(config.shared)  # for the locks, and what is set aside
    with Reserve(root).lent() if repair else contextlib.nullcontext():
        damage = verify.check_registry(root, Storage(root).rebuild_registry, repair=repair)
        if damage is not None and not damage.is_repaired:
            return Verification(0, (damage,))
        found = open_engines()._verify(deep=deep, repair=repair)  # noqa: SLF001  its own
        return found if damage is None else dataclasses.replace(found, findings=(damage, *found.findings))
