"""TensorRT's timing caches: how fast each tactic was, so that the next build measures only what is new.

NVIDIA binds what is in one to the device, CUDA, the TensorRT version, and the builder flags that change how a layer is
computed; the kernels that a build compiles are in it too. So there is one a slot of exactly these, and TensorRT is
never told to ignore a mismatch. It is no part of the key: its digest is provenance of an entry.

TensorRT's own merging has not been run by this project's tests, which have no GPU; what surrounds it has.

Source: NVIDIA TensorRT documentation, "Optimizing Builder Performance", Timing Cache, and ``ITimingCache::combine``,
2026-11.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from enginecache.environment import Pairs
from enginecache.errors import BuilderCrashError, EngineCacheError, StoreError
from enginecache.files.os_errors import describe_os_error
from enginecache.host.devices import Device
from enginecache.host.toolchain import Flavour, Toolchain
from enginecache.key.options import BuildOptions
from enginecache.storage.folder import Root
from enginecache.storage.lock_types import KeyLocks
from enginecache.storage.side_caches import Artefact, Artefacts
from enginecache.trt.build.merging import REFUSED
from enginecache.trt.child import child_environment, describe_status, running_worker, tail_of
from enginecache.trt.interpreter import environment_for, interpreters

LOCK_TIMEOUT_S = 60.0
MERGE_TIMEOUT_S = 30.0
"""Shorter than the lock's, so that one merging that hangs does not cost the next holder its update."""

MERGER = "enginecache.trt.build.merging"

_IN_A_SLOT = ("precision", "hardware_compatibility", "version_compatible", "strip_plan", "builder_flags")
"""Builder options that are builder flags, or act like one. Limits of the search, such as the workspace, are not in it:
they decide which tactics are tried, and not how fast one is."""


@dataclass(frozen=True)
class TimingSlot:
    """What a timing cache belongs to.

    Attributes:
        name: The slot, 64 hex characters.
        flavour: Which TensorRT merges two of them.
        device: On which GPU it does.
    """

    name: str
    flavour: Flavour
    device: Device


@dataclass(frozen=True)
class TimingStart:
    """What one build begins with.

    Attributes:
        slot: Where it is from, and where it goes.
        data: Bytes of ``ITimingCache.serialize``; none for a new one.
        digest: BLAKE3 of them, 64 hex characters; None for a new one.
    """

    slot: TimingSlot
    data: bytes
    digest: str | None


Merge = Callable[[TimingSlot, bytes, bytes], "bytes | None"]
"""From what is kept and what is new to both in one; None where TensorRT refuses.

Raises an ``EngineCacheError`` where it failed.
"""


class TimingCaches:
    """Timing caches between builds. Safe across threads and processes.

    No update that :meth:`keep` took is lost: who replaces one holds its lock, and merges with what others kept since.

    Args:
        root: The cache folder.
        locks: For a lock a slot.
        merge: Merges two; default: TensorRT does, in a child process.
        python: The interpreter of that process.
    """

    def __init__(self, root: Root, locks: KeyLocks, merge: Merge | None = None, python: str | None = None) -> None:
        self._artefacts = Artefacts(root, "timing-caches")
        self._locks = locks
        self._merge = ProcessMerge(root, python=python) if merge is None else merge

    def slot(
        self, toolchain: Toolchain, device: Device | None, options: BuildOptions, environment: Pairs = ()
    ) -> TimingSlot | None:
        """Where the timing cache of such a build is kept; None where there is none.

        TensorRT-RTX has the calls, and they do nothing: its tactics are chosen when an engine is loaded.
        """
        if device is None or toolchain.flavour == "tensorrt-rtx":
            return None
        keyed = options.keyed()
        fields = {
            "device": {
                **asdict(device.model),
                "compute_capability": list(device.compute_capability),
            },
            "toolchain": {
                "flavour": toolchain.flavour,
                "version": toolchain.version,
                "cuda_major": toolchain.cuda_major,
                "os": toolchain.os,
                "cpu": toolchain.cpu,
            },
            "options": {name: keyed[name] for name in _IN_A_SLOT},
            # It may decide which kernels run, and how fast.
            "environment": dict(environment),
        }
        return TimingSlot(self._artefacts.slot(fields), toolchain.flavour, device)

    def begin(self, slot: TimingSlot) -> TimingStart:
        """What a build begins with. Never fails: what cannot be read is not there."""
        kept = self._artefacts.read(slot.name)
        return TimingStart(slot, b"", None) if kept is None else TimingStart(slot, kept.data, kept.digest)

    def keep(self, start: TimingStart, data: bytes) -> tuple[str, ...]:
        """Keep a build's timing cache. Durable when it returns without warnings; a failure is a warning, no error.

        Blocks for at most :data:`LOCK_TIMEOUT_S` and one merging.

        Args:
            start: What the build began with.
            data: What TensorRT had after it, which contains what it began with.

        Returns:
            Why it was not kept, for the user; nothing where it was.
        """
        slot = start.slot
        try:
            # The holder may die: the kernel frees the lock, and the file is the old or the new one.
            with self._locks.hold(f"timing-{slot.name}", LOCK_TIMEOUT_S):
                current = self._artefacts.read(slot.name)
                merged = self._merged(start, current, data)
                if merged is None:
                    return (f"{_NOT_KEPT}: TensorRT refuses to merge it with the one that another build has kept",)
                if current is None or merged != current.data:
                    self._artefacts.replace(slot.name, merged)
        except EngineCacheError as error:
            return (f"{_NOT_KEPT}: {error.what}",)
        return ()

    def _merged(self, start: TimingStart, current: Artefact | None, ours: bytes) -> bytes | None:
        if current is None or current.digest == start.digest:
            return ours  # nobody else kept one since
        return current.data if current.data == ours else self._merge(start.slot, current.data, ours)


_NOT_KEPT = "this build's timing cache was not kept, so a later build may take longer"


class ProcessMerge:
    """A :data:`Merge` by TensorRT, in a process of its own: the caller's process never imports TensorRT for it.

    Args:
        root: The cache folder.
        timeout_s: How long TensorRT may take.
        search_path: Where the child looks for modules; default: where this process does, without its current folder.
        python: The interpreter; default: this one, see :mod:`enginecache.trt.interpreter`.
    """

    def __init__(
        self,
        root: Root,
        timeout_s: float = MERGE_TIMEOUT_S,
        search_path: Sequence[str] | None = None,
        python: str | None = None,
    ) -> None:
        self._python = python
        self._root = root
        self._timeout_s = timeout_s
        self._search_path = search_path

    def __call__(self, slot: TimingSlot, current: bytes, ours: bytes) -> bytes | None:
        """Merge ``ours`` into ``current``; where both have a tactic, ``current`` counts.

        Raises:
            StoreError: The files for it cannot be written.
            BuilderCrashError: TensorRT crashed, or took too long.
        """
        try:
            with tempfile.TemporaryDirectory(prefix="merge-", dir=self._root.tmp) as folder:
                Path(folder).chmod(
                    self._root.folder_mode
                )  # what a crash leaves in a shared root, the group may clean up
                return self._merge(slot, Path(folder), current, ours)
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            doing = f"two timing caches cannot be merged in {self._root.tmp}"
            raise StoreError(*describe_os_error(error, doing, in_cache=True)) from error

    def _merge(self, slot: TimingSlot, folder: Path, current: bytes, ours: bytes) -> bytes | None:
        (folder / "current").write_bytes(current)
        (folder / "ours").write_bytes(ours)
        asked = {"flavour": slot.flavour, **{name: str(folder / name) for name in ("current", "ours", "merged")}}
        environment = child_environment(slot.device, self._search_path)
        interpreter = interpreters(self._python)[0]
        with (folder / "log").open("w+b") as log:
            try:
                with running_worker(
                    MERGER,
                    asked,
                    python=interpreter.path,
                    environment=environment_for(interpreter, environment),
                    folder=folder,
                    log=log,
                ) as worker:
                    status = worker.wait(self._timeout_s)
            except subprocess.TimeoutExpired as error:
                message = f"TensorRT took more than {self._timeout_s:g} s to merge two timing caches"
                raise BuilderCrashError(message) from error
            if status == REFUSED:
                return None
            if status:
                why = (tail_of(log) or [f"its process ended {describe_status(status)}"])[-1]
                raise BuilderCrashError(f"TensorRT failed to merge two timing caches: {why.strip()}")
        return (folder / "merged").read_bytes()
