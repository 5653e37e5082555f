"""The genuine TensorRT 11.4 Python bindings on a machine that has no TensorRT library.

The bindings import eight C functions. TensorRT-RTX has the same C++ interfaces behind functions of the same names, so
a ``libnvinfer.so.11`` that passes each call on makes `import tensorrt` work, with a real parser and a real builder. The
plans are TensorRT-RTX's. The shim says the version that it is compiled for, as the real library does.

Where it is not TensorRT: ``ITensor`` lacks four methods of TensorRT's, so that the methods behind them are others here
(``is_shape_tensor`` gives noise, ``is_execution_tensor`` crashes). Models with shape tensors are not for the shim.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parent / "data" / "nvinfer_shim.c"
BINDINGS_VERSION = (11, 4, 0, 106)


def missing_parts() -> str:
    """The probe: what this machine lacks for a shim, empty where it has all."""
    needs = {"gcc": shutil.which("gcc"), "tensorrt_bindings": _folder("tensorrt_bindings")}
    needs["tensorrt_rtx_libs"] = _folder("tensorrt_rtx_libs")
    return ", ".join(name for name, found in needs.items() if not found)


def _folder(module):
    spec = importlib.util.find_spec(module)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def make_shim(folder: Path, version=BINDINGS_VERSION, defines=()) -> Path:
    """A folder for a child's search path, with ``tensorrt`` and ``tensorrt_libs`` in it."""
    libraries = folder / "tensorrt_libs"
    libraries.mkdir(parents=True)
    rtx = _folder("tensorrt_rtx_libs")
    names = {"BUILDER": "libtensorrt_rtx.so.1", "PARSER": "libtensorrt_onnxparser_rtx.so.1"}
    flags = [f'-D{key}_LIBRARY="{rtx / name}"' for key, name in names.items()]
    flags += [f"-D{key}={n}" for key, n in zip(("MAJOR", "MINOR", "PATCH", "BUILD"), version, strict=True)]
    flags += [f"-D{define}" for define in defines]
    _compile(libraries / "libnvinfer.so.11", [*flags, str(SOURCE), "-ldl"])
    for name in ("libnvonnxparser.so.11", "libnvinfer_plugin.so.11"):
        _compile(libraries / name, ["-x", "c", "/dev/null"])
    loader = (
        "import ctypes, os\n"
        "for name in ('libnvinfer.so.11', 'libnvonnxparser.so.11', 'libnvinfer_plugin.so.11'):\n"
        "    ctypes.CDLL(os.path.join(os.path.dirname(__file__), name), ctypes.RTLD_GLOBAL)\n"
    )
    (libraries / "__init__.py").write_text(loader)
    (folder / "tensorrt").mkdir()
    (folder / "tensorrt" / "__init__.py").write_text(
        "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    )
    return folder


def _compile(target: Path, arguments) -> None:
    command = ["gcc", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{target.name}", "-o", str(target), *arguments]
    subprocess.run(command, check=True)
