"""``doctor``: checks of the settings, folder, GPUs and toolchains. Changes nothing, and makes no folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping

from enginecache import __version__
from enginecache.config import Config
from enginecache.host.devices import Device, NvmlGpu, list_devices, read_cuda, read_nvml
from enginecache.host.toolchain import ToolchainFinding, inspect_toolchains
from enginecache.maintenance.doctor.folder import check_root, check_settings, check_variables
from enginecache.maintenance.doctor.gpus import check_gpus, look
from enginecache.maintenance.doctor.toolchains import (
    check_builder,
    check_precision,
    check_toolchains,
    installed_version,
)
from enginecache.maintenance.findings import Check

__all__ = ["Check", "diagnose"]


def diagnose(
    config: Config,
    find_devices: Callable[[], tuple[Device, ...]] = list_devices,
    inspect: Callable[[int | None], tuple[ToolchainFinding, ...]] = inspect_toolchains,
    *,
    nvml: Callable[[], tuple[NvmlGpu, ...]] = read_nvml,
    cuda: Callable[[], tuple[Device, ...]] = read_cuda,
    version: Callable[[str], str | None] = installed_version,
    environ: Mapping[str, str] | None = None,
) -> list[Check]:
    """Look at everything that a ``get`` needs.

    Starts CUDA in this process where pycuda is installed.

    Args:
        config: The cache's settings.
        find_devices: Lists the GPUs that a ``get`` would choose from.
        inspect: Lists the TensorRT flavours.
        nvml: Lists the GPUs of the host, as NVML has them.
        cuda: Lists the GPUs that CUDA shows.
        version: Gives the version of an installed distribution.
        environ: Environment with CUDA's variables; by default the process's.
    """
    python = ".".join(str(part) for part in sys.version_info[:3])
    facts = {"version": __version__, "python": python}
    gpus = look(find_devices, nvml, cuda)
    findings = inspect(config.cuda_major)
    return [
        Check("enginecache", "ok", f"{__version__} on Python {python}", facts=facts),
        check_settings(),
        *check_variables(environ),
        *check_root(config),
        *check_gpus(gpus, os.environ if environ is None else environ),
        *check_toolchains(findings, gpus.devices),
        check_builder(config, os.environ if environ is None else environ),
        check_precision(findings, version),
    ]
