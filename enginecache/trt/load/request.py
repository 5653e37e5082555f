"""The contract of loading: a request, and an engine or a failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from enginecache.host.devices import Device
from enginecache.host.targets import Reach
from enginecache.host.toolchain import Flavour
from enginecache.key.options import PluginLibrary

FailureKind = Literal[
    "not_started",
    "toolchain",
    "version",
    "plugin",
    "no_engine",
    "exception",
    "memory",
    "crash",
    "killed",
    "timeout",
]
"""The kinds of failures.

- ``not_started``: there was no child process.
- ``toolchain``: TensorRT could not be imported or gave no runtime, or the child died before TensorRT had the plan.
- ``version``: another TensorRT than the plan's is here.
- ``plugin``: a library of plugins is missing, or is another one.
- ``no_engine``: TensorRT gave None.
- ``exception``: it raised.
- ``memory``: memory ran out.
- ``crash``: the child died while TensorRT had the plan.
- ``killed``: it was ended from outside.
- ``timeout``: it took too long.
"""


@dataclass(frozen=True)
class LoadRequest:
    """A plan to load, with its recorded properties.

    Attributes:
        path: The plan, absolute.
        digest: BLAKE3 of its bytes, 64 hex characters.
        flavour: Which TensorRT built it.
        version: The version that built it, as its library reported.
        reach: The GPUs that it runs on.
        tuned_for: Class of the one device that it was tuned for, see ``Device.device_class``; None where it is for all
            that it reaches.
        is_version_compatible: Whether it holds a runtime of its own.
        plugins: Libraries of plugins to load first.
        allows_host_code: Whether code in the plan may run on the host: TensorRT's ``engine_host_code_allowed``.
    """

    path: Path
    digest: str
    flavour: Flavour
    version: str
    reach: Reach
    tuned_for: str | None = None
    is_version_compatible: bool = False
    plugins: tuple[PluginLibrary, ...] = ()
    allows_host_code: bool = False


@dataclass(frozen=True)
class Failure:
    """The failure of a loading, with what TensorRT said.

    Attributes:
        kind: How it failed.
        lines: TensorRT's errors in order; for a child that died, the last lines of its log.
        diagnostics: What the header check found: names of ``EngineInvalidityDiagnostics``, or ``INVALID`` alone.
        what: What happened, where TensorRT has no words for it; may be empty.
    """

    kind: FailureKind
    lines: tuple[str, ...] = ()
    diagnostics: tuple[str, ...] = ()
    what: str = ""


@dataclass(frozen=True)
class Loaded:
    """An engine in this process.

    Attributes:
        engine: The ``ICudaEngine`` of its flavour's module.
        warnings: What TensorRT said meanwhile.
    """

    engine: Any
    warnings: tuple[str, ...] = ()


Trial = Callable[[LoadRequest, Device | None], Failure | None]
"""A function that loads a plan on a device in another process; None for success.

Raises:
    IntegrityError: The plan's bytes do not have its digest.
"""

Deserializer = Callable[[LoadRequest], "Loaded | Failure"]
"""A function that loads a plan in this process, on the CUDA device that is current.

Raises:
    IntegrityError: The plan's bytes do not have its digest.
"""


def driver_of(device: Device) -> str:
    """Return the driver's version, or where it is unknown its CUDA level."""
    return device.driver_version or "CUDA {}.{}".format(*device.cuda_driver_version)
