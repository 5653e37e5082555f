"""What works here, what does not, and what to do. Changes nothing, and makes no folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from enginecache import __version__
from enginecache.config import Config, config_path
from enginecache.devices import Device, list_devices
from enginecache.errors import EngineCacheError, NoDeviceError
from enginecache.options import format_size
from enginecache.registry import schema
from enginecache.registry.database import journal_mode
from enginecache.store.root import Root
from enginecache.toolchain import ToolchainFinding, inspect_toolchains, supported_targets

LOW_SPACE_BYTES = 5 << 30
NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "lustre", "gpfs", "fuse.")
"""How the names of file systems begin that are not, or may not be, of this host alone. Source: Linux, proc(5)."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        status: ``ok``; ``warning`` for what is missing and may not be needed; ``problem`` for what stops the cache.
        text: What was found.
        fix: What to do; empty where nothing is.
        exit_code: 0, or for a problem the exit code of its error.
    """

    name: str
    status: Literal["ok", "warning", "problem"]
    text: str
    fix: str = ""
    exit_code: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"name": self.name, "status": self.status, "text": self.text, "fix": self.fix}


def diagnose(
    config: Config,
    find_devices: Callable[[], tuple[Device, ...]] = list_devices,
    inspect: Callable[[int | None], tuple[ToolchainFinding, ...]] = inspect_toolchains,
) -> list[Check]:
    """Look at everything that a ``get`` needs.

    Args:
        config: The cache's settings.
        find_devices: Lists the GPUs.
        inspect: Lists the TensorRT flavours.
    """
    version = ".".join(str(part) for part in sys.version_info[:3])
    checks = [Check("enginecache", "ok", f"{__version__} on Python {version}")]
    checks.append(_check_settings())
    checks += _check_root(config)
    checks += _check_devices(find_devices)
    checks += _check_toolchains(inspect(config.cuda_major))
    return checks


def _check_settings() -> Check:
    path = config_path()
    return Check("settings", "ok", str(path) if path.exists() else f"the defaults: there is no {path}")


def _check_root(config: Config) -> Iterator[Check]:
    if not config.dir.exists() and not config.dir.is_symlink():
        yield Check("folder", "ok", f"{config.dir} will be made by the first get")
        yield _check_space(config.dir)
        return
    try:
        root = Root.check(config.dir, config.shared)
        is_writable = os.access(root.path, os.W_OK)
        mode = "readable and writable" if is_writable else "read-only: hits are served, nothing can be built"
        fix = "" if is_writable else f"Make {root.path} writable for this user."
        yield Check("folder", "ok" if is_writable else "warning", f"{root.path}, {mode}", fix)
        yield from _check_file_system(root.path)
        yield _check_space(root.path)
        yield _check_registry(root)
    except EngineCacheError as error:
        yield Check("folder", "problem", error.what, error.fix, error.exit_code)


def _check_file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> Iterator[Check]:
    """A warning where locks and renames may not be what they are on a local file system."""
    kinds = {}
    with contextlib.suppress(OSError):
        for line in mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            _, point, kind, *_ = line.split(" ")
            kinds[point.replace("\\040", " ")] = kind
    point = next((str(folder) for folder in (path, *path.parents) if str(folder) in kinds), "")
    if kinds.get(point, "").startswith(NETWORK_FILE_SYSTEMS):
        fix = "Name a folder on a local disk with --dir or ENGINECACHE_DIR."
        yield Check("file system", "warning", f"{point} is {kinds[point]}: locks may not exclude other hosts", fix)


def _check_space(path: Path) -> Check:
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if free < LOW_SPACE_BYTES:
        return Check("space", "warning", f"{format_size(free)} free", "Run `enginecache prune --older-than 30d`.")
    return Check("space", "ok", f"{format_size(free)} free")


def _check_registry(root: Root) -> Check:
    try:
        revision = schema.current_revision(root.registry_path)
    except EngineCacheError as error:
        return Check("registry", "problem", error.what, error.fix, error.exit_code)
    sqlite = f"SQLite {sqlite3.sqlite_version}, journal {journal_mode(sqlite3.sqlite_version_info)}"
    return Check("registry", "ok", f"schema {revision or 'not made yet'} (newest known {schema.HEAD}), {sqlite}")


def _check_devices(find_devices: Callable[[], tuple[Device, ...]]) -> Iterator[Check]:
    try:
        devices = find_devices()
    except NoDeviceError as error:
        yield Check("gpu", "warning", error.what, error.fix)
        return
    for device in devices:
        cuda = ".".join(str(part) for part in device.cuda_driver_version)
        text = (
            f"device {device.ordinal}: {device.name}, compute capability {device.compute_capability}, "
            f"{device.sm_count} SMs, {format_size(device.memory_bytes)}, driver {device.driver_version}, CUDA {cuda}, "
            f"{device.pci_bus_id}"
        )
        yield Check("gpu", "ok", text)


def _check_toolchains(findings: tuple[ToolchainFinding, ...]) -> Iterator[Check]:
    for finding in findings:
        toolchain = finding.toolchain
        if toolchain is None:
            yield Check(finding.flavour, "warning", finding.problem, finding.fix)
            continue
        supported = supported_targets(toolchain)
        reach = "builds for the GPU that is here"
        if toolchain.flavour == "tensorrt-rtx":
            reach = "builds for named targets without a GPU"
        if supported is not None:
            reach += ": " + ", ".join(capability.sm for capability in sorted(supported))
        text = f"{toolchain.version} for CUDA {toolchain.cuda_major} on {toolchain.os} {toolchain.cpu}; {reach}"
        yield Check(finding.flavour, "ok", text)
    if not any(finding.toolchain for finding in findings):
        fix = "Install one: pip install 'enginecache[rtx]' (any machine), or 'enginecache[tensorrt]' (GPU host)."
        yield Check("building", "warning", "no TensorRT is usable here: only stored engines can be inspected", fix)
