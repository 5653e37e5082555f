"""From a resolved request to a published engine: build, store, commit."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from enginecache.builders.base import Builder, BuildRequest, BuiltPlan, ProgressCallback
from enginecache.errors import EngineCacheError, RegistryError, StoreError
from enginecache.key import KEY_VERSION, EngineKey
from enginecache.locks.base import KeyLocks
from enginecache.lookup import STORE_LOCK, STORE_LOCK_TIMEOUT_S
from enginecache.model import ModelIdentity, ModelSource
from enginecache.placement import Placement
from enginecache.profiles import Profile
from enginecache.registry.base import BuildRecord, EntryRecord, Registry, utc_now
from enginecache.store.base import BlobStore, StagedBlob
from enginecache.store.root import Root


@dataclass(frozen=True)
class Resolved:
    """A request with everything looked up that the key is made of.

    Attributes:
        source: The model.
        identity: Its digests and inputs.
        profiles: Canonical.
        placement: Who builds, for what.
        key: All of it.
        warnings: What the caller should know before a build.
    """

    source: ModelSource
    identity: ModelIdentity
    profiles: tuple[Profile, ...]
    placement: Placement
    key: EngineKey
    warnings: tuple[str, ...] = ()


class Publication:
    """Builds engines and publishes them. The caller holds the key's lock."""

    def __init__(self, root: Root, registry: Registry, store: BlobStore, locks: KeyLocks, builder: Builder) -> None:
        self._root = root
        self._registry = registry
        self._store = store
        self._locks = locks
        self._builder = builder

    def build(self, resolved: Resolved, progress: ProgressCallback | None = None) -> tuple[EntryRecord, BuiltPlan]:
        """Build the plan, store it durably, then commit its row.

        Every attempt leaves a row and a log; a failed one leaves nothing else.

        Raises:
            EngineCacheError: Whatever the builder, the store or the registry says.
        """
        attempt = BuildRecord(
            id=uuid.uuid4().hex,
            key=resolved.key.digest,
            state="running",
            started_at=utc_now(),
            host=platform.node(),
            pid=os.getpid(),
        )
        self._registry.start_build(attempt)
        with self._recorded(attempt), self._work_dir(attempt) as work_dir:
            built = self._builder.build(self._request(resolved, attempt, work_dir), progress)
            staged = self._store.stage(built.plan_path)
            record = self._commit(resolved, attempt, built, staged)
        return record, built

    def log_path(self, build_id: str) -> Path:
        """Where the attempt's log is."""
        return self._root.logs / f"{build_id}.log"

    def _request(self, resolved: Resolved, attempt: BuildRecord, work_dir: Path) -> BuildRequest:
        return BuildRequest(
            source=resolved.source,
            identity=resolved.identity,
            profiles=resolved.profiles,
            options=resolved.key.options,
            toolchain=resolved.placement.toolchain,
            target=resolved.placement.target,
            device=resolved.placement.device,
            work_dir=work_dir,
            log_path=self.log_path(attempt.id),
        )

    def _commit(self, resolved: Resolved, attempt: BuildRecord, built: BuiltPlan, staged: StagedBlob) -> EntryRecord:
        device = resolved.placement.device
        record = EntryRecord(
            key=resolved.key.digest,
            key_json=resolved.key.canonical_json(),
            key_version=KEY_VERSION,
            model_digest=resolved.identity.digest,
            model_name=_storable(resolved.source.name),
            digest=staged.digest,
            size_bytes=staged.size_bytes,
            backend=resolved.placement.toolchain.flavour,
            tensorrt_version=built.loaded_version,
            compute_capabilities=tuple(str(capability) for capability in built.compute_capabilities),
            device_name=None if device is None else device.name,
            driver_version=None if device is None else device.driver_version,
            build_id=attempt.id,
            build_seconds=built.build_seconds,
            created_at=utc_now(),
        )
        try:
            with self._locks.hold(STORE_LOCK, STORE_LOCK_TIMEOUT_S):
                previous = self._registry.find(record.key)
                self._store.publish(staged)
                try:
                    self._registry.publish(record, resolved.key.fields())
                except BaseException:
                    # Nobody else can have named it while the lock is held. On a full disk it is in the way.
                    self._delete_unnamed(staged.digest)
                    raise
                self._retire(previous)
        except BaseException:
            self._store.discard(staged)
            raise
        return record

    def _retire(self, previous: EntryRecord | None) -> None:
        # Its path may just have been handed out. The entry is committed: nothing here may fail the build.
        with contextlib.suppress(StoreError, RegistryError):
            if previous is not None and not self._registry.is_referenced(previous.digest):
                self._store.retire(previous.digest)

    def _delete_unnamed(self, digest: str) -> None:
        with contextlib.suppress(StoreError, RegistryError):
            if not self._registry.is_referenced(digest):
                self._store.delete(digest)

    @contextlib.contextmanager
    def _recorded(self, attempt: BuildRecord) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except BaseException as error:
            # The first error is the one to tell; a registry that fails as well must not hide it.
            with contextlib.suppress(RegistryError):
                self._registry.fail_build(attempt.id, time.monotonic() - started, _storable(_reason(error)))
            raise

    @contextlib.contextmanager
    def _work_dir(self, attempt: BuildRecord) -> Iterator[Path]:
        try:
            path = Path(tempfile.mkdtemp(prefix=f"build-{attempt.id[:12]}-", dir=self._root.tmp))
            path.chmod(self._root.folder_mode)  # what a crash leaves in a shared root, the group may clean up
        except OSError as error:
            message = f"no folder for the build can be made in {self._root.tmp}: {error.strerror or error}"
            raise StoreError(message, "Free some space or mend the folder's mode; see `enginecache doctor`.") from error
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.log_path(attempt.id).chmod(self._root.file_mode)


def _reason(error: BaseException) -> str:
    if isinstance(error, EngineCacheError):
        return error.what
    return "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"


def _storable(text: str) -> str:
    """``text`` with escapes where a file name in it is not UTF-8, which no database takes."""
    return text.encode(errors="backslashreplace").decode()
