"""Find the installed TensorRT without importing it.

A hit needs the version, since it is part of the key; importing TensorRT would cost seconds. The packages' metadata
have it. If they contradict each other, or do not name the CUDA version, nothing is guessed.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from enginecache.errors import ToolchainError
from enginecache.host.targets import ComputeCapability

Flavour = Literal["tensorrt", "tensorrt-rtx"]

PRODUCTS: dict[Flavour, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
"""Display names of the flavours."""

DPKG_STATUS = Path("/var/lib/dpkg/status")
"""Debian's list of installed packages."""

NAMEABLE_COMPUTE_CAPABILITIES = tuple(ComputeCapability.parse(t) for t in ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"))
"""Compute capabilities that TensorRT-RTX up to 1.7 builds for by name.

Source: the members of ``ComputeCapability`` in TensorRT-RTX 1.7.1.116, each built for, 2026-11.
"""

PORTABLE_COMPUTE_CAPABILITIES = tuple(c for c in NAMEABLE_COMPUTE_CAPABILITIES if c >= (8, 0))
"""Compute capabilities that a TensorRT-RTX plan reaches if none was named.

Source: TensorRT-RTX 1.7.1.116, the list that a plan reports, 2026-11.
"""

_NO_VERSION = "of no version"
_LAST_TABLED_RTX = (1, 7)
_CUDA_MAJORS = range(11, 16)
_INSTALL = {
    "tensorrt": "On a GPU host that reaches NVIDIA's package index: pip install tensorrt nvidia-ml-py",
    "tensorrt-rtx": "pip install tensorrt-rtx-cu13 nvidia-ml-py",
}
_CPU_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Toolchain:
    """The properties of one TensorRT that decide a plan.

    Attributes:
        flavour: ``tensorrt`` or ``tensorrt-rtx``.
        version: Full version with its build number, such as ``10.16.1.11``.
        cuda_major: Major version of the CUDA that it was built for.
        os: ``linux`` or ``windows``.
        cpu: ``x86_64`` or ``aarch64``.
    """

    flavour: Flavour
    version: str
    cuda_major: int
    os: str
    cpu: str


@dataclass(frozen=True)
class ToolchainFinding:
    """Result of the search for one flavour.

    Attributes:
        flavour: ``tensorrt`` or ``tensorrt-rtx``.
        toolchain: Set if it is usable.
        problem: Why it is not usable, in one line; empty if it is.
        fix: What to do about it; empty if it is usable.
    """

    flavour: Flavour
    toolchain: Toolchain | None
    problem: str = ""
    fix: str = ""


@dataclass(frozen=True)
class PackagePlaces:
    """Places that list installed packages.

    Attributes:
        folders: Folders of Python packages; None for ``sys.path``.
        dpkg_status: Debian's list of installed packages.
    """

    folders: tuple[str, ...] | None = None
    dpkg_status: Path = DPKG_STATUS


_HERE = PackagePlaces()


@dataclass(frozen=True)
class _Package:
    """One installed distribution that belongs to a flavour."""

    name: str
    version: str
    requires: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def module_name(flavour: Flavour) -> str:
    """Return the name of the flavour's Python module: ``tensorrt`` or ``tensorrt_rtx``."""
    return flavour.replace("-", "_")


def _toolchain(
    flavour: Flavour, cuda_major: int | None, places: PackagePlaces, listed: Collection[str] | None
) -> Toolchain:
    packages = _packages(flavour, places.folders, listed)
    if not _has_module(module_name(flavour), places.folders):
        raise ToolchainError(_what_is_missing(flavour, packages), _INSTALL[flavour])
    version = _version(flavour, packages)
    found = _cuda_major(flavour, packages, version, places.dpkg_status)
    cuda_major = cuda_major if found is None else found
    if cuda_major is None:
        raise ToolchainError(
            f"the CUDA version of {flavour} {version} is unknown: no package names it",
            "Set it, for example ENGINECACHE_CUDA_MAJOR=12.",
        )
    cpu = platform.machine().lower()
    return Toolchain(flavour, version, cuda_major, platform.system().lower(), _CPU_NAMES.get(cpu, cpu))


def inspect_toolchains(cuda_major: int | None = None, places: PackagePlaces = _HERE) -> tuple[ToolchainFinding, ...]:
    """Return the result for each flavour, tensorrt first, with the problem of one that is not usable.

    Reads only package metadata, and imports nothing of TensorRT: about 3 ms once ``importlib.metadata`` is loaded.

    Args:
        cuda_major: CUDA major version to assume if the packages do not name it.
        places: Where to look for packages.
    """
    listed = _listed_names(places.folders)

    def inspect(flavour: Flavour) -> ToolchainFinding:
        try:
            toolchain = _toolchain(flavour, cuda_major, places, listed)
        except ToolchainError as error:
            return ToolchainFinding(flavour, None, error.what, error.fix)
        return ToolchainFinding(flavour, toolchain)

    return tuple(inspect(flavour) for flavour in get_args(Flavour))


def installed_toolchains(cuda_major: int | None = None, places: PackagePlaces = _HERE) -> tuple[Toolchain, ...]:
    """Return the usable flavours, tensorrt first; arguments as in :func:`inspect_toolchains`."""
    findings = inspect_toolchains(cuda_major, places)
    return tuple(finding.toolchain for finding in findings if finding.toolchain is not None)


def supported_targets(toolchain: Toolchain) -> frozenset[ComputeCapability] | None:
    """Return the compute capabilities that a flavour can build for; None if only the builder knows.

    TensorRT builds for the GPU that it runs on. For a TensorRT-RTX later than the table nothing is known here.
    """
    release = re.match(r"(\d+)\.(\d+)", toolchain.version)
    if toolchain.flavour == "tensorrt" or release is None:
        return None
    if (int(release[1]), int(release[2])) > _LAST_TABLED_RTX:
        return None
    return frozenset(NAMEABLE_COMPUTE_CAPABILITIES)


def _packages(flavour: Flavour, path: Sequence[str] | None, listed: Collection[str] | None) -> tuple[_Package, ...]:
    """Return the flavour's distributions: its bindings, its libraries and what requires them.

    They are looked up by name, and only if a folder lists the name: reading every installed distribution would be ten
    times slower.
    """
    found: dict[_Package, None] = {}
    for cuda in ("", *(f"-cu{major}" for major in _CUDA_MAJORS)):
        for part in ("-bindings", "-libs", ""):
            name = f"{flavour}{cuda}{part}"
            if listed is None or name in listed:
                found.update(dict.fromkeys(_installed(name, path)))
    return tuple(found)


def _listed_names(path: Sequence[str] | None) -> Collection[str] | None:
    """Return the names of TensorRT's distributions in the folders of a search path; None if one is not a folder."""
    names: set[str] = set()
    for folder in sys.path if path is None else path:
        try:
            found = os.listdir(folder or ".")  # noqa: PTH208  strings are all that is needed of them
        except (FileNotFoundError, PermissionError):
            continue
        except OSError:
            return None  # an archive, which importlib.metadata looks into
        for name in found:
            if name[:8].lower() == "tensorrt" and name.endswith((".dist-info", ".egg-info")):
                names.add(re.sub(r"[-_.]+", "-", name.rpartition(".")[0].partition("-")[0]).lower())
    return names


def _installed(name: str, path: Sequence[str] | None) -> Iterator[_Package]:
    from importlib import metadata

    first_folder = None
    for distribution in metadata.distributions(name=name, path=list(sys.path if path is None else path)):
        folder = str(distribution.locate_file(""))
        first_folder = first_folder or folder
        # Python imports from the first folder that has a package: a later folder's copy is never used. Two copies in
        # one folder are the remains of a broken upgrade.
        if folder == first_folder:
            fields = distribution.metadata  # parsed anew at each access
            (version, *_) = fields.get_all("Version", [_NO_VERSION])
            requires = fields.get_all("Requires-Dist", [])
            yield _Package(name, re.sub(r"\.post\d+$", "", version), tuple(requires))


def _has_module(module: str, path: Sequence[str] | None) -> bool:
    from importlib.machinery import PathFinder

    spec = PathFinder.find_spec(module, None if path is None else list(path))
    # A mere folder of that name, such as a clone in the working folder, is a namespace package without origin.
    return spec is not None and spec.origin is not None


def _what_is_missing(flavour: Flavour, packages: Sequence[_Package]) -> str:
    bindings = [str(package) for package in packages if package.name.endswith("-bindings")]
    if bindings:
        return f"{flavour} is incomplete: {', '.join(bindings)} has bindings, but the libraries are missing"
    return f"{flavour} is not installed"


def _version(flavour: Flavour, packages: Sequence[_Package]) -> str:
    versions = {package.version for package in packages}
    if not versions:
        raise ToolchainError(f"{flavour} is installed, but no package names its version", _INSTALL[flavour])
    if len(versions) > 1 or _NO_VERSION in versions:
        names = " ".join(dict.fromkeys(package.name for package in packages))
        raise ToolchainError(
            f"the installed packages disagree about the version: {', '.join(map(str, packages))}",
            f"Remove them and install one: pip uninstall -y {names}\n{_INSTALL[flavour]}",
        )
    return versions.pop()


def _cuda_major(flavour: Flavour, packages: Sequence[_Package], version: str, dpkg_status: Path) -> int | None:
    """Return the CUDA major version from the first source that names one; None if none does."""
    names = [package.name for package in packages]
    requirements = [re.sub(r"[-_.]+", "-", line).lower() for package in packages for line in package.requires]
    found = _majors(r"-cu(\d+)(?:-|$)", names) or _majors(r"^nvidia-cuda-runtime-cu(\d+)", requirements)
    if not found and flavour == "tensorrt":
        found = _dpkg_cuda_majors(version, dpkg_status)
        # With two libraries, dpkg does not know which one Python would load: the setting must name the version.
        return found.pop() if len(found) == 1 else None
    if len(found) > 1:
        raise ToolchainError(
            f"{flavour} {version} is installed for several CUDA versions: {', '.join(map(str, packages))}",
            f"Keep one, and install it again: pip uninstall -y {' '.join(names)}\n{_INSTALL[flavour]}",
        )
    return found.pop() if found else None


def _majors(pattern: str, texts: Sequence[str]) -> set[int]:
    return {int(match[1]) for text in texts if (match := re.search(pattern, text))}


def _dpkg_cuda_majors(version: str, dpkg_status: Path) -> set[int]:
    """Return the CUDA versions of the installed Debian packages ``libnvinfer<N>`` of this TensorRT version.

    Their version looks like ``10.9.0.34-1+cuda12.8``. NVIDIA's containers combine such libraries with a Python package
    without a CUDA version. The libraries of another TensorRT version do not count.

    Source: deb-control(5) for the format; NVIDIA's TensorRT installation guide 10.9, "Debian Installation".
    """
    try:
        text = dpkg_status.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    found = set()
    for start in re.finditer(r"^Package: libnvinfer\d+$", text, re.MULTILINE):
        paragraph = text[start.start() :].split("\n\n", 1)[0]
        match = re.search(r"^Version: ([\d.]+)-\S*\+cuda(\d+)", paragraph, re.MULTILINE)
        is_installed = re.search(r"^Status: .* installed$", paragraph, re.MULTILINE)
        # TensorRT 8's Python package leaves out the build number: 8.6.1 for 8.6.1.6.
        if match and is_installed and f"{match[1]}.".startswith(f"{version}."):
            found.add(int(match[2]))
    return found
