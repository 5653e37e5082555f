"""TensorRT plugins: the standard ones, and the libraries that a request names."""

from __future__ import annotations

import ctypes
from typing import Any

from enginecache.errors import BuildError, UnsupportedOptionError
from enginecache.files.os_errors import shell_path
from enginecache.key.options import PluginLibrary
from enginecache.trt.build.explain import product
from enginecache.trt.build.logs import BuildLog
from enginecache.trt.build.request import BuildRequest
from enginecache.trt.loaded_version import loaded_library
from enginecache.trt.messages import clean_lines
from enginecache.trt.plugin_libraries import register

RTX_LIBRARY = "libtensorrt_rtx.so"
"""The name that TensorRT-RTX's parser opens its own builder by when it meets a plugin.

Its packages have ``libtensorrt_rtx.so.1`` alone; the parser then calls ``std::terminate``. Source: 1.7.1, 2026-11.
"""


def load_plugins(trt: Any, builder: Any, logger: Any, request: BuildRequest, log: BuildLog) -> None:
    """Register the standard plugins and those of the request. Call it before the model is parsed, once a process.

    Args:
        trt: ``tensorrt`` or ``tensorrt_rtx``.
        builder: Its builder.
        logger: The ``ILogger`` of ``log``.
        request: Names the libraries.
        log: Where TensorRT's lines go.

    Raises:
        OptionError: A library is missing, or is no longer the one of the key.
        BuildError: TensorRT does not take a library.
        UnsupportedOptionError: This installation cannot use plugins.
    """
    # Up to TensorRT 10 the parser does not find the plugins that TensorRT ships unless they are registered.
    if hasattr(trt, "init_libnvinfer_plugins") and not trt.init_libnvinfer_plugins(logger, ""):
        log.write("W", "TensorRT's standard plugins were not registered")
    if request.options.plugins and request.toolchain.flavour == "tensorrt-rtx":
        _check_rtx_library(request)
    for plugin in request.options.plugins:
        _load(trt, builder, plugin, request, log)


def _check_rtx_library(request: BuildRequest) -> None:
    try:
        ctypes.CDLL(RTX_LIBRARY)
    except OSError as error:
        message = f"the ONNX parser of {product(request)} opens {RTX_LIBRARY} to make a plugin, and cannot: {error}"
        library = loaded_library("tensorrt-rtx")
        link = f"ln -s {'LIBRARY' if library is None else shell_path(library)} DIR/{RTX_LIBRARY}"
        fix = f"Give its library that name, in a folder of your own: {link}; export LD_LIBRARY_PATH=DIR"
        raise UnsupportedOptionError(message, fix) from error


def _load(trt: Any, builder: Any, plugin: PluginLibrary, request: BuildRequest, log: BuildLog) -> None:
    logged = len(log.errors)
    how, path = register(trt, builder.get_plugin_registry(), plugin)
    if how == "refused":
        reason = "; ".join(clean_lines(log.errors[logged:])[:1]) or "it gave no reason"
        reason = reason.replace(f"{path}: {path}", path).replace(path, plugin.path.name)
        raise BuildError(f"{product(request)} does not take the plugin library {plugin.path}: {reason}", _FIX)
    said = "registered its plugins itself" if how == "itself" else "loaded as a library of plugins"
    log.write("I", f"{plugin.path}: {said}")


_FIX = (
    "A library of plugins exports getCreators (TensorRT 8.6: getPluginCreators), or registers its plugins when it is "
    "loaded. Build it for this TensorRT. If it needs libraries next to it, name their folder in LD_LIBRARY_PATH: it is "
    "loaded from an open file, where $ORIGIN leads nowhere."
)
