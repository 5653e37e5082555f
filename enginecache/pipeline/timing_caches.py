"""TensorRT's timing caches: how fast each tactic was, so that the next build measures only what is new.

NVIDIA binds a timing cache to the device, CUDA, the TensorRT version, and the builder flags that change how a layer is
computed; the kernels that a build compiles are in it too. So there is one slot for each combination of exactly these,
and TensorRT is never asked to ignore a mismatch. A timing cache is not part of the key: its digest is provenance of
an entry.

Source: NVIDIA TensorRT documentation, "Optimizing Builder Performance", Timing Cache, 2026-11.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from enginecache.environment import Pairs
from enginecache.errors import EngineCacheError
from enginecache.host.devices import Device
from enginecache.host.toolchain import Toolchain
from enginecache.key.options import BuildOptions
from enginecache.storage.folder import Root
from enginecache.storage.side_caches import Artefacts

_IN_A_SLOT = ("precision", "hardware_compatibility", "version_compatible", "strip_plan", "builder_flags")
"""Builder options that are builder flags, or act like one. Limits of the search, such as the workspace, are not in it:
they decide which tactics are tried, and not how fast one is."""

_NOT_KEPT = "this build's timing cache was not kept, so a later build may take longer"


@dataclass(frozen=True)
class TimingStart:
    """The timing cache that one build begins with.

    Attributes:
        slot: Name of its slot, 64 hex characters.
        data: Bytes of ``ITimingCache.serialize``; empty for a new one.
        digest: BLAKE3 of them, 64 hex characters; None for a new one.
    """

    slot: str
    data: bytes
    digest: str | None


class TimingCaches:
    """Timing caches between builds.

    A build begins with a timing cache and keeps it while it holds its GPU's lock, so builds on one GPU lose nothing of
    each other. Two equal GPUs of one host share a slot: of builds that run on both at once, the timings of the one that
    ends last stay.

    Args:
        root: The cache folder.
    """

    def __init__(self, root: Root) -> None:
        self._artefacts = Artefacts(root, "timing-caches")

    def slot(
        self, toolchain: Toolchain, device: Device | None, options: BuildOptions, environment: Pairs = ()
    ) -> str | None:
        """Return the name of the slot for such a build; None where there is no timing cache.

        TensorRT-RTX has the calls, and they do nothing: it chooses tactics when it loads an engine.
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
        return self._artefacts.slot(fields)

    def begin(self, slot: str) -> TimingStart:
        """Return the timing cache to begin with. Never fails: one that cannot be read counts as missing."""
        kept = self._artefacts.read(slot)
        return TimingStart(slot, b"", None) if kept is None else TimingStart(slot, kept.data, kept.digest)

    def keep(self, start: TimingStart, data: bytes) -> tuple[str, ...]:
        """Keep a build's timing cache, in place of the one in its slot.

        Atomic, and durable when it returns without warnings; a failure is a warning, no error.

        Args:
            start: The one that the build began with.
            data: TensorRT's after the build, which contains the one that it began with.

        Returns:
            Why it was not kept, for the user; nothing where it was.
        """
        if data == start.data:
            return ()
        try:
            self._artefacts.replace(start.slot, data)
        except EngineCacheError as error:
            return (f"{_NOT_KEPT}: {error.what}",)
        return ()
