"""TensorRT plugins: the standard ones, and the libraries that a request names."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
from typing import Any

from enginecache.bindings import loaded_library
from enginecache.builders.base import BuildRequest
from enginecache.builders.logs import BuildLog
from enginecache.builders.reasons import product
from enginecache.digests import StreamDigest
from enginecache.errors import BuildError, OptionError, UnsupportedOptionError
from enginecache.loglines import clean_lines
from enginecache.options import PluginLibrary

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
        OptionError: A library is gone, or is not the one of the key any more.
        BuildError: TensorRT does not take a library.
        UnsupportedOptionError: This installation cannot have plugins.
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
        link = f"ln -s {loaded_library('tensorrt-rtx')} DIR/{RTX_LIBRARY}"
        fix = f"Give its library that name, in a folder of your own: {link}; export LD_LIBRARY_PATH=DIR"
        raise UnsupportedOptionError(message, fix) from error


def _load(trt: Any, builder: Any, plugin: PluginLibrary, request: BuildRequest, log: BuildLog) -> None:
    """Load one library, in either of the two ways that they are made.

    Most register their plugins by themselves when they are loaded (``REGISTER_TENSORRT_PLUGIN``; ``--staticPlugins`` of
    trtexec). ``load_library`` refuses those, after it has unloaded them again, with their creators still in the
    registry. So the library is loaded here first, which stays, and ``load_library`` is for the others.
    """
    path = f"/proc/self/fd/{_open_checked(plugin)}"
    logged, known = len(log.errors), _creator_count(trt)
    with contextlib.suppress(OSError):  # TensorRT says it in its own words
        ctypes.CDLL(path)
    if _creator_count(trt) > known:
        log.write("I", f"{plugin.path}: registered its plugins itself")
    elif builder.get_plugin_registry().load_library(path) is None:
        reason = "; ".join(clean_lines(log.errors[logged:])[:1]) or "it gave no reason"
        reason = reason.replace(f"{path}: {path}", path).replace(path, plugin.path.name)
        raise BuildError(f"{product(request)} does not take the plugin library {plugin.path}: {reason}", _FIX)
    else:
        log.write("I", f"{plugin.path}: loaded as a library of plugins")


_FIX = (
    "A library of plugins exports getCreators (TensorRT 8.6: getPluginCreators), or registers its plugins when it is "
    "loaded. Build it for this TensorRT. If it needs libraries beside it, name their folder in LD_LIBRARY_PATH: it is "
    "loaded from an open file, where $ORIGIN leads nowhere."
)


def _open_checked(plugin: PluginLibrary) -> int:
    """A descriptor of the very bytes that the key names.

    Never closed: the loader knows a library by the name that it was loaded by, and would take a second one under the
    same number for the first.
    """
    try:
        descriptor = os.open(plugin.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        digest = StreamDigest()
        try:
            digest.read_from(io.FileIO(descriptor, closefd=False), os.fstat(descriptor).st_size)
            found = digest.hexdigest()
        finally:
            digest.close()
    except OSError as error:
        raise OptionError(f"the plugin library {plugin.path} cannot be read: {error}", _REST) from error
    if found != plugin.digest:
        raise OptionError(f"the plugin library {plugin.path} changed since its engine was asked for", _REST)
    return descriptor


_REST = "Nothing was published. Run it again when the file is in its place and at rest."


def _creator_count(trt: Any) -> int:
    """How many plugins are in the process's registry."""
    registry = trt.get_plugin_registry()
    names = ("all_creators", "plugin_creator_list")
    return next(len(getattr(registry, name)) for name in names if hasattr(registry, name))
