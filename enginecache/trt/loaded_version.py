"""The TensorRT that was really loaded: the bindings' version and the shared library's own.

Bindings and library are separate packages, and the loader may find a library of another version first
(``LD_LIBRARY_PATH``, a system package). The plan is the library's work, so the library is asked.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from enginecache.errors import OutOfMemoryError, ToolchainError
from enginecache.files.os_errors import is_about_memory
from enginecache.host.toolchain import PRODUCTS, Flavour, Toolchain, module_name

_LIBRARIES: dict[Flavour, re.Pattern[str]] = {
    # Not libnvinfer_plugin, _lean, _dispatch or _builder_resource; a wheel's repair tool may put a hash after a dash.
    "tensorrt": re.compile(r"libnvinfer(?:-[0-9a-f]+)?\.so"),
    "tensorrt-rtx": re.compile(r"libtensorrt_rtx(?:-[0-9a-f]+)?\.so"),
}
_PARTS = ("getInferLibMajorVersion", "getInferLibMinorVersion", "getInferLibPatchVersion", "getInferLibBuildVersion")


def load_module(flavour: Flavour) -> Any:
    """Import the bindings.

    Raises:
        ToolchainError: They cannot be imported.
        OutOfMemoryError: They could be, with more memory.
    """
    name = module_name(flavour)
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        # OSError and RuntimeError: the bindings load shared libraries by hand.
        message = f"the Python module {name} cannot be imported: {error}"
        if is_about_memory(str(error)) or _lacks_memory_for_library(flavour):
            fix = "Free memory, or raise the limit (`ulimit -v`; the memory limit of the container), and try again."
            raise OutOfMemoryError(f"out of memory: {message}", fix) from error
        raise ToolchainError(
            message, "Install it with its libraries; `enginecache doctor` shows what is here."
        ) from error


def _lacks_memory_for_library(flavour: Flavour) -> bool:
    """Return whether TensorRT's library does not fit into memory: the bindings then say that it is missing."""
    spec = find_spec(f"{module_name(flavour)}_libs")
    for folder in () if spec is None else spec.submodule_search_locations or ():
        for path in Path(folder).iterdir():
            if _LIBRARIES[flavour].match(path.name):
                try:
                    ctypes.CDLL(str(path))
                except OSError as error:
                    return is_about_memory(str(error))
    return False


def check_loaded(trt: Any, toolchain: Toolchain, library_version: str | None) -> str:
    """Compare what is loaded with what the key names, and return the loaded version.

    Args:
        trt: The imported bindings.
        toolchain: What the key says.
        library_version: From :func:`library_version`; None where the library does not say, so that the bindings'
            version counts.

    Raises:
        ToolchainError: Bindings or library have another version.
    """
    bindings = str(trt.__version__)
    product = PRODUCTS[toolchain.flavour]
    wanted = _numbers(toolchain.version)
    same_bindings = _numbers(bindings) == wanted
    if same_bindings and (library_version is None or agree(library_version, toolchain.version)):
        return toolchain.version if library_version is None else library_version
    library = "" if library_version is None else f", and the library loaded under them is {library_version}"
    message = f"{product} {toolchain.version} was expected; the Python bindings here are {bindings}{library}"
    fix = (
        "Nothing was built. Make bindings and libraries one version: reinstall the package, and look for another "
        "library in LD_LIBRARY_PATH."
    )
    raise ToolchainError(message, fix)


def agree(library_version: str, version: str) -> bool:
    """Return whether two versions name one release, as far as both go.

    The packages of 8.6 and 10.0 have three numbers (``10.0.1``) where the library has four (``10.0.1.6``); ``.post1``
    only repackages. Fewer than three common numbers never agree.
    """
    first, second = _numbers(library_version), _numbers(version)
    count = min(len(first), len(second))
    return count >= 3 and first[:count] == second[:count]


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def library_version(flavour: Flavour) -> str | None:
    """Return the version that the loaded shared library reports of itself, None where it has no such function.

    Raises:
        ToolchainError: No such library is loaded in this process.
    """
    path = loaded_library(flavour)
    if path is None:
        message = f"the Python module {module_name(flavour)} was imported, but its shared library is not loaded"
        raise ToolchainError(message, "Install the package with its libraries; see `enginecache doctor`.")
    # RTLD_NOLOAD: the one that is loaded already, never a second copy.
    return _ask(ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW))


def loaded_library(flavour: Flavour) -> str | None:
    """Return the path of the flavour's library that is mapped into this process (Linux)."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and _LIBRARIES[flavour].match(os.path.basename(fields[5])):  # noqa: PTH119  # on a string
            return fields[5]
    return None


def _ask(library: ctypes.CDLL) -> str | None:
    if all(hasattr(library, name) for name in _PARTS):
        return ".".join(str(getattr(library, name)()) for name in _PARTS)
    if not hasattr(library, "getInferLibVersion"):
        return None
    # One number: 8601 for 8.6.1, 100001 for 10.0.1. Source: NvInferVersion.h, NV_TENSORRT_VERSION, 8.6 and 10.0.
    number = int(library.getInferLibVersion())
    scale = 1000 if number < 10_000 else 10_000
    return f"{number // scale}.{number % scale // 100}.{number % 100}"
