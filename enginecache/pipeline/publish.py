"""Build the engine of a resolved request, store it and commit its row.

Locks are taken in this order alone: the key's (by the caller), the device's, the store's. The device's is
given back before the store's is taken.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from enginecache.errors import (
    BuilderCrashError,
    BuildError,
    EngineCacheError,
    LockTimeoutError,
    ModelChangedError,
    ModelError,
    RegistryError,
    StoreError,
)
from enginecache.files.os_errors import describe_os_error
from enginecache.files.units import utc_now
from enginecache.host.devices import Device
from enginecache.key.key import KEY_VERSION
from enginecache.model import has_changed, identify
from enginecache.pipeline.failures import is_lasting
from enginecache.pipeline.placement import Placement
from enginecache.pipeline.request import Examine
from enginecache.pipeline.resolve import Resolved
from enginecache.pipeline.timing_caches import TimingCaches, TimingStart
from enginecache.storage.blobs import StagedBlob
from enginecache.storage.folder import build_folder_prefix
from enginecache.storage.locks import WaitingCallback
from enginecache.storage.registry.rows import BuildRecord, EntryRecord
from enginecache.storage.space import Reserve, require_space
from enginecache.storage.storage import Storage
from enginecache.trt.build.request import Builder, BuildProgress, BuildRequest, BuiltPlan, ProgressCallback
from enginecache.trt.plugin_libraries import has_changed as has_library_changed


class Publication:
    """Builds engines and publishes them. The caller holds the key's lock.

    Args:
        storage: Where the plans and rows go; its locks are taken for the device.
        builder: Makes the plans.
    """

    def __init__(self, storage: Storage, builder: Builder) -> None:
        self._storage = storage
        self._root = storage.root
        self._registry = storage.registry
        self._locks = storage.locks
        self._builder = builder
        self._timing_caches = TimingCaches(self._root)

    def build(
        self,
        resolved: Resolved,
        progress: ProgressCallback | None = None,
        *,
        timeout_s: float | None = None,
        waiting: WaitingCallback | None = None,
        uses_timing_cache: bool = True,
        examine: Examine | None = None,
    ) -> tuple[EntryRecord, BuiltPlan]:
        """Build the plan, keep its timing cache, store the plan durably, then commit its row.

        Every attempt leaves a row and a log; a failed one leaves nothing else. Builds that measure tactics on one GPU
        run one at a time, whatever their keys: they would disturb each other's measurements. Waiting for the GPU is no
        attempt.

        Args:
            resolved: What to build.
            progress: Called with each step of the build.
            timeout_s: Longest wait for the GPU, in seconds; None waits as long as it takes.
            waiting: Called about once a second while another build has the GPU.
            uses_timing_cache: Whether the build may begin with a kept timing cache, and adds to it.
            examine: Checks the plan before it is published, with the GPU still held.

        Returns:
            The entry, and the plan with its warnings; a timing cache that was not kept is one.

        Raises:
            LockTimeoutError: Another build still had the GPU.
            EngineCacheError: Whatever the builder, the store or the registry says.
        """
        placement = resolved.placement
        slot = self._timing_caches.slot(
            placement.toolchain, placement.device, resolved.key.options, resolved.key.environment
        )
        slot = slot if uses_timing_cache else None
        with contextlib.ExitStack() as device:
            self._take_device(device, placement, timeout_s, waiting)
            start = None if slot is None else self._timing_caches.begin(slot)
            return self._publish(resolved, progress, start, device, examine)

    def _take_device(
        self,
        held: contextlib.ExitStack,
        placement: Placement,
        timeout_s: float | None,
        waiting: WaitingCallback | None,
    ) -> None:
        """Take the GPU's lock; TensorRT-RTX measures nothing and takes none."""
        device = placement.device
        if device is None or placement.toolchain.flavour == "tensorrt-rtx":
            return
        say = None if waiting is None else lambda wait: waiting(replace(wait, device=device.name))
        try:
            held.enter_context(self._locks.hold(device_lock(device), timeout_s, say))
        except LockTimeoutError as error:
            message = f"{device.name} (device {device.ordinal}) is busy with another build: {error.what}"
            raise LockTimeoutError(message, error.fix) from error

    def _publish(
        self,
        resolved: Resolved,
        progress: ProgressCallback | None,
        start: TimingStart | None,
        device: contextlib.ExitStack,
        examine: Examine | None,
    ) -> tuple[EntryRecord, BuiltPlan]:
        # Before the row: a full disk would take it for a registry that is out of order.
        require_space(self._root, resolved.source.name, _plan_bytes(resolved))
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
            request = self._request(resolved, attempt, work_dir, start)
            built = self._build(request, progress)
            if start is not None and built.timing_cache:
                # With the GPU in hand: the next build on it begins with what this one has measured. The measurements
                # are good whatever becomes of the plan.
                kept = self._timing_caches.keep(start, built.timing_cache)
                built = replace(built, warnings=(*built.warnings, *kept))
            if examine is None:
                device.close()
            staged = self._storage.blobs.adopt(built.plan_path)
            check_json = None
            if examine is not None:
                if progress is not None:
                    progress(BuildProgress("Checking the numbers", None, None, built.build_seconds))
                check_json = self._examined(examine, request, built, staged)
                device.close()
            record = self._commit(resolved, attempt, built, staged, start, check_json)
        return record, built

    def _examined(self, examine: Examine, request: BuildRequest, built: BuiltPlan, staged: StagedBlob) -> str:
        try:
            return examine(request, built, staged)
        except BaseException:
            self._storage.blobs.discard(staged)
            raise

    def _build(self, request: BuildRequest, progress: ProgressCallback | None) -> BuiltPlan:
        """Build. A failure on a model that has changed since its key was made says nothing about that key."""
        try:
            return self._builder.build(request, progress)
        except BuildError as error:
            # A builder that reports compares the files itself, while it holds them; a dead one cannot. It may have died
            # of a file that has its old bytes again by now: here any other time stamp is a change.
            if _has_changed(request, is_read_again=type(error) is BuilderCrashError):
                what = (
                    f"{request.source.name}, its external data or a plugin library changed while its engine was built"
                )
                fix = "Nothing was published. Run it again when nothing writes to them."
                raise ModelChangedError(f"{what}: {error.what}", fix) from error
            raise

    def log_path(self, build_id: str) -> Path:
        """Return where the attempt's log is."""
        return self._root.log_path(build_id)

    def _request(
        self, resolved: Resolved, attempt: BuildRecord, work_dir: Path, start: TimingStart | None
    ) -> BuildRequest:
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
            conversion=resolved.key.conversion,
            timing_cache=None if start is None else start.data,
            environment=resolved.environment,
        )

    def _commit(
        self,
        resolved: Resolved,
        attempt: BuildRecord,
        built: BuiltPlan,
        staged: StagedBlob,
        start: TimingStart | None,
        check_json: str | None,
    ) -> EntryRecord:
        device = resolved.placement.device
        record = EntryRecord(
            key=resolved.key.digest,
            key_json=resolved.key.text,
            key_version=KEY_VERSION,
            model_digest=resolved.identity.digest,
            model_name=_storable(resolved.source.name),
            digest=staged.digest,
            size_bytes=staged.size_bytes,
            backend=resolved.placement.toolchain.flavour,
            tensorrt_version=built.loaded_version,
            compute_capabilities=built.reach.to_texts(),
            device_name=None if device is None else device.name,
            driver_version=None if device is None else device.driver_version,
            build_id=attempt.id,
            build_seconds=built.build_seconds,
            created_at=utc_now(),
            timing_cache_digest=start.digest if start is not None and built.took_timing_cache else None,
            check_json=check_json,
        )
        self._storage.commit(staged, record, attempt)
        return record

    @contextlib.contextmanager
    def _recorded(self, attempt: BuildRecord) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except BaseException as error:
            # The first error is the one to report; a registry that fails as well must not hide it.
            seconds, reason = time.monotonic() - started, _storable(_reason(error))
            with contextlib.suppress(RegistryError), Reserve(self._root).lent():
                self._registry.fail_build(attempt.id, seconds, reason, is_lasting=is_lasting(error))
            raise

    @contextlib.contextmanager
    def _work_dir(self, attempt: BuildRecord) -> Iterator[Path]:
        try:
            path = Path(tempfile.mkdtemp(prefix=build_folder_prefix(attempt.id), dir=self._root.tmp))
            path.chmod(self._root.folder_mode)  # what a crash leaves in a shared root, the group may clean up
        except OSError as error:
            doing = f"no folder for the build can be made in {self._root.tmp}"
            raise StoreError(*describe_os_error(error, doing, self._root.tmp, in_cache=True)) from error
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.log_path(attempt.id).chmod(self._root.file_mode)


def _plan_bytes(resolved: Resolved) -> int:
    """Return how large the plan may become: as large as the model. A stripped plan has no weights."""
    if resolved.key.options.strip_plan:
        return 0
    return sum(file.fingerprint.size_bytes for file in resolved.identity.files) + len(resolved.source.data or b"")


def device_lock(device: Device) -> str:
    """Return the name of the lock that builds on this GPU hold; for a MIG instance, that of the whole GPU.

    The UUID names it in every container and on every host; without NVML the PCI bus has to.
    """
    return "device-" + re.sub(r"[^A-Za-z0-9-]", "-", device.uuid or device.pci_bus_id)


def _has_changed(request: BuildRequest, *, is_read_again: bool) -> bool:
    if has_changed(request.source, request.identity) or any(map(has_library_changed, request.options.plugins)):
        return True
    if not is_read_again and request.identity.is_settled:
        return False
    try:
        return identify(request.source).digest != request.identity.digest
    except ModelError:  # it cannot be read: a failing disk ends the builder too
        return True


def _reason(error: BaseException) -> str:
    if isinstance(error, EngineCacheError):
        return error.what
    return "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"


def _storable(text: str) -> str:
    """Return ``text`` with escapes for bytes of a file name that are not UTF-8, which no database takes."""
    return text.encode(errors="backslashreplace").decode()
