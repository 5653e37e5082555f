"""EngineCache: the whole cache for a program. Wiring, and the order of steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from enginecache import eviction, garbage, loader, verification
from enginecache.builders.base import Builder
from enginecache.builders.child import ProcessBuilder
from enginecache.config import Config
from enginecache.entry import Entry, Explanation, Outcome, Reason
from enginecache.errors import AmbiguousKeyError, IntegrityError, LoadError, NotCachedError, OptionError, RegistryError
from enginecache.key import EngineKey
from enginecache.locks.local import LocalKeyLocks
from enginecache.lookup import Lookup, Miss
from enginecache.memo import BlobState, FileMemo
from enginecache.placement import place
from enginecache.profiles import resolve_profiles
from enginecache.publication import Publication, Resolved
from enginecache.registry.base import BuildRecord, EntryRecord, MissRecord, RegistryTotals, utc_now
from enginecache.registry.database import Database
from enginecache.registry.schema import ensure_schema
from enginecache.registry.sql import SqlRegistry
from enginecache.removal import Removal
from enginecache.request import Ask, GetAsk, Model, Request
from enginecache.store.local import LocalBlobStore
from enginecache.store.root import Root
from enginecache.store.uses import UseLog

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class EngineCache:
    """A cache of TensorRT engines.

    Safe from threads and processes: ``get`` builds an engine at most once for a key, whoever asks. It holds no open
    file or connection between calls, so it may be carried across a fork.

    Example:
        >>> with EngineCache.open() as cache:                                    # doctest: +SKIP
        ...     entry = cache.get("model.onnx", dims={"batch": (1, 32, 64)})
        ...     engine = cache.load("model.onnx", dims={"batch": (1, 32, 64)})
    """

    def __init__(self, config: Config, *, builder: Builder | None = None, place: Callable[..., Any] = place) -> None:
        self.config = config
        self.root = Root.open(config.dir, config.shared)
        database = Database(self.root.registry_path)
        ensure_schema(database, self.root.file_mode)
        self._database = database
        self._registry = SqlRegistry(database)
        self._store = LocalBlobStore(self.root)
        self._locks = LocalKeyLocks(self.root)
        self._uses = UseLog(self.root)
        self._memo = FileMemo(self._registry, self._store)
        self._lookup = Lookup(self._registry, self._store, self._memo, self._locks)
        self._publication = Publication(
            self.root, self._registry, self._store, self._locks, ProcessBuilder() if builder is None else builder
        )
        self._removal = Removal(self.root, self._registry, self._store, self._locks, self._uses)
        self._place = place

    @classmethod
    def open(cls, config: Config | None = None, **arguments: Any) -> Self:
        """Open the cache, making its folder and registry where they are missing.

        Args:
            config: All settings; default: :meth:`Config.load`.
            **arguments: Fields of :class:`Config` that win over the file and the environment, such as ``dir``.

        Raises:
            ConfigError: The configuration cannot be read.
            StoreError: The folder cannot be used.
            RegistryError: The registry cannot be opened.
        """
        return cls(Config.load(**arguments) if config is None else config)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing is held open; the form is there so that a later implementation may."""

    # Serving

    def get(self, model: Model, **ask: Unpack[GetAsk]) -> Entry:
        """The engine for exactly this request: a stored one, or one built now.

        Blocks while it builds, or while another process builds the same. What it returns is durable.

        Args:
            model: Path of an ONNX file, or a serialized ``ModelProto``.
            **ask: What else is asked, and how far to go for it: see :class:`~enginecache.request.GetAsk` and
                :class:`~enginecache.request.Ask`.

        Raises:
            InvalidInputError: The model, shapes or options are wrong, or the model changed while building.
            NotCachedError: ``offline``, and no stored engine serves the request.
            LockTimeoutError: Another process still builds.
            BuildError: TensorRT refused the model or failed.
            BackendError: No TensorRT or GPU for what was asked.
            RegistryError: The registry cannot be used.
            StoreError: The folder cannot be used.
        """
        started = time.monotonic()
        rebuild = ask.get("rebuild", False)
        if rebuild and ask.get("offline"):
            raise OptionError("offline and rebuild exclude each other", "Leave one of them out.")
        resolved = self.resolve(Request.of(model, ask))
        before = self._registry.find(resolved.key.digest) if rebuild else None
        found = Miss((_REBUILD,)) if rebuild else self._find(resolved.key)
        if isinstance(found, EntryRecord):
            return self._entry("hit", resolved, found, started, (_EXACT,))
        self._note_miss(resolved.key, found)
        if ask.get("offline"):
            raise _not_cached(resolved.key, found)
        timeout_s = ask.get("timeout_s")
        timeout_s = self.config.timeout_s if timeout_s is None else timeout_s
        with self._locks.hold(resolved.key.digest, timeout_s, ask.get("waiting")):
            again = self._find(resolved.key)
            # A rebuild is content with an engine that another process has built since it was asked for.
            is_old = (
                rebuild and before is not None and isinstance(again, EntryRecord) and again.build_id == before.build_id
            )
            if isinstance(again, EntryRecord) and not is_old:
                return self._entry("hit", resolved, again, started, (_WAITED, *found.reasons))
            record, built = self._publication.build(resolved, ask.get("progress"))
        warned = tuple(Reason("warning", text) for text in (*resolved.warnings, *built.warnings))
        return self._entry("built", resolved, record, started, (*found.reasons, *warned))

    def load(self, model: Model, **ask: Unpack[GetAsk]) -> Any:
        """Like :meth:`get`, then deserialize the engine in this process, on the CUDA device that is current.

        Returns:
            The ``ICudaEngine`` of the flavour that built it.

        Raises:
            EngineCacheError: As :meth:`get`.
            LoadError: TensorRT refused the plan; its reason is in the message.
        """
        entry = self.get(model, **ask)
        try:
            return loader.load_engine(entry.path, entry.digest, entry.record.backend)
        except LoadError:
            raise
        except IntegrityError:
            # Damage that moved no fingerprint: the medium's, not a program's.
            self._lookup.set_aside(entry.record)
        entry = self.get(model, **ask)
        return loader.load_engine(entry.path, entry.digest, entry.record.backend)

    def explain(self, model: Model, **ask: Unpack[Ask]) -> Explanation:
        """What :meth:`get` would do now, and why. Builds nothing.

        Raises:
            EngineCacheError: As :meth:`get`, without building.
        """
        resolved = self.resolve(Request.of(model, ask))
        found = self._lookup.find(resolved.key)
        is_hit = isinstance(found, EntryRecord)
        last = next(iter(self._registry.builds(resolved.key.digest, limit=1)), None)
        failed = last if last is not None and last.state == "failed" else None
        return Explanation(
            verdict="hit" if is_hit else "miss",
            key=resolved.key.digest,
            fields=resolved.key.fields(),
            reasons=((_EXACT,) if isinstance(found, EntryRecord) else found.reasons)
            + tuple(Reason("warning", text) for text in resolved.warnings),
            entry=found if isinstance(found, EntryRecord) else None,
            neighbours=() if isinstance(found, EntryRecord) else found.neighbours,
            failure="" if failed is None else failed.reason,
            failure_log=None if failed is None else self._publication.log_path(failed.id),
        )

    def resolve(self, request: Request) -> Resolved:
        """Look up everything the key is made of. The one place where a key is made.

        Raises:
            InvalidInputError: The model, shapes or options are wrong.
            BackendError: No TensorRT or GPU for what was asked.
        """
        identity = self._memo.identify(request.source)
        profiles = resolve_profiles(identity.inputs, request.shapes)
        placement = self._place(
            request.backend or self.config.backend,
            request.target,
            request.device,
            cuda_major=self.config.cuda_major,
        )
        key = EngineKey.of(identity, profiles, request.options, placement.toolchain, placement.target)
        return Resolved(request.source, identity, profiles, placement, key, request.options.warnings())

    def _find(self, key: EngineKey) -> EntryRecord | Miss:
        # The use is noted before the row is read: a prune that takes the row after this sees it, and leaves the blob.
        if self._uses.last_used(key.digest) is not None:
            self._uses.touch(key.digest)
            return self._lookup.find(key)
        found = self._lookup.find(key)
        if isinstance(found, EntryRecord):
            self._uses.touch(key.digest)
            return self._lookup.find(key)
        return found

    def _entry(
        self, outcome: Outcome, resolved: Resolved, record: EntryRecord, started: float, reasons: Sequence[Reason]
    ) -> Entry:
        self._uses.touch(record.key)
        return Entry(
            outcome=outcome,
            path=self._store.path(record.digest),
            record=record,
            source=resolved.source,
            elapsed_seconds=time.monotonic() - started,
            reasons=tuple(reasons),
        )

    def _note_miss(self, key: EngineKey, miss: Miss) -> None:
        closest = miss.neighbours[0] if miss.neighbours else None
        differing = [] if closest is None else [difference.field for difference in closest.differing]
        nearest_key = None if closest is None else closest.record.key
        try:
            self._registry.record_miss(key.digest, miss.reasons[0].code, nearest_key, differing)
        except RegistryError:
            return  # a count; the build says soon enough that nothing can be written

    # Inspecting

    def entries(self, limit: int | None = None) -> list[eviction.Used]:
        """Entries with their last use, newest first.

        Args:
            limit: Only the newest so many; None is all.
        """
        return [self.used(record) for record in self._registry.entries(limit)]

    def used(self, record: EntryRecord) -> eviction.Used:
        """An entry with its last use."""
        return self._removal.used(record)

    def require(self, prefix: str) -> EntryRecord:
        """The entry whose key begins with ``prefix``.

        Raises:
            OptionError: The prefix is no hex text.
            NotCachedError: There is none.
            AmbiguousKeyError: There are several.
        """
        prefix = prefix.lower()
        if not prefix or set(prefix) - set("0123456789abcdef"):
            raise OptionError(
                f"{prefix!r} is not a key", "Give a key, or the first letters of one, from `enginecache ls`."
            )
        found = self._registry.find_prefix(prefix)
        if not found:
            raise NotCachedError(f"no stored engine has a key that begins with {prefix}", "See `enginecache ls`.")
        if len(found) > 1:
            listed = "\n".join(f"  {record.key[:16]}  {record.model_name}" for record in found)
            raise AmbiguousKeyError(f"several keys begin with {prefix}", f"Give more letters:\n{listed}")
        return found[0]

    def require_whole(self, prefix: str) -> EntryRecord:
        """Like :meth:`require`, with the blob checked: what is damaged is set aside and not served. Counts as a use.

        Raises:
            NotCachedError: There is no such entry, or its blob was damaged or gone.
        """
        record = self.require(prefix)
        if self._memo.check_blob(record.digest, record.size_bytes) is not BlobState.INTACT:
            reason = self._lookup.set_aside(record)
            if reason is not None:
                raise NotCachedError(reason.text, "Ask `enginecache get` for it, which builds it anew.")
        self._uses.touch(record.key)
        return record

    def path(self, record: EntryRecord) -> Path:
        """Where the entry's plan is."""
        return self._store.path(record.digest)

    def builds(self, key: str | None = None, limit: int = 100) -> list[BuildRecord]:
        """Attempts to build, newest first."""
        return self._registry.builds(key, limit)

    def log_path(self, build: BuildRecord) -> Path:
        """The log of an attempt."""
        return self._publication.log_path(build.id)

    def misses(self, limit: int = 100) -> list[MissRecord]:
        """What was asked and not found, latest first."""
        return self._registry.misses(limit)

    def totals(self) -> RegistryTotals:
        """Counts and sums."""
        return self._registry.totals()

    # Keeping

    def pin(self, record: EntryRecord) -> None:
        """Keep the entry whatever a prune wants. Idempotent."""
        self._registry.pin(record.key)

    def unpin(self, record: EntryRecord) -> None:
        """Let the entry go when a prune wants. Idempotent."""
        self._registry.unpin(record.key)

    def remove(self, record: EntryRecord) -> int:
        """Delete the entry, and its blob if no other entry shares it; the bytes freed.

        Programs that have the plan mapped keep their bytes.

        Raises:
            OptionError: The entry is pinned.
        """
        return self._removal.remove(record)

    def plan_prune(self, *, max_size_bytes: int | None = None, older_than_s: float | None = None) -> eviction.PrunePlan:
        """Decide what a prune would delete. Deletes nothing.

        Args:
            max_size_bytes: Bytes that may stay; None takes the configuration's limit.
            older_than_s: Entries not used for so many seconds go.
        """
        limit = self.config.max_size_bytes if max_size_bytes is None else max_size_bytes
        past, _ = self._garbage()
        return eviction.plan_prune(self.entries(), past, utc_now(), max_size_bytes=limit, older_than_s=older_than_s)

    def execute_prune(self, plan: eviction.PrunePlan) -> int:
        """Carry out a plan; the bytes freed. What was pinned, rebuilt or used since the plan was made stays."""
        return self._removal.execute(plan)

    def verify(self, *, deep: bool = False, repair: bool = False) -> verification.Verification:
        """Compare rows and blobs.

        Args:
            deep: Read every blob's bytes, also where nothing changed since they were last verified.
            repair: Mend what is found.
        """
        findings = []
        checks = verification.check_entries(
            self._registry, self.root, self._store, self._memo, self._lookup.set_aside, deep=deep
        )
        for finding, mend in checks:
            findings.append(dataclasses.replace(finding, is_repaired=repair and mend()))
        past, young = self._garbage()
        for item in past:
            finding = verification.Finding("orphan", str(item.path), item.what, "delete the file")
            findings.append(dataclasses.replace(finding, is_repaired=repair and self._removal.delete_garbage(item)))
        return verification.Verification(self.totals().entries, tuple(findings), tuple(young))

    def _garbage(self) -> tuple[list[eviction.Garbage], list[eviction.Garbage]]:
        named = {record.digest for record in self._registry.entries()}
        return garbage.find_garbage(self.root, named.__contains__, self.config.grace_s)


_EXACT = Reason("exact", "a stored engine has exactly this key")
_REBUILD = Reason("rebuild", "a rebuild was asked for")
_WAITED = Reason("waited", "another process built it while this one waited")


def _not_cached(key: EngineKey, miss: Miss) -> NotCachedError:
    why = "; ".join(reason.text for reason in miss.reasons)
    message = f"no stored engine serves this request (key {key.digest[:12]}): {why}"
    return NotCachedError(
        message, "Leave --offline out to build it, or see `enginecache explain` with the same options."
    )
