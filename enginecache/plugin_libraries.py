"""Libraries of TensorRT plugins: loaded from the very bytes that the key names, however they register themselves."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
from typing import Any, Literal

from enginecache.digests import StreamDigest
from enginecache.errors import OptionError
from enginecache.options import PluginLibrary

_REST = "Run it again when the file is in its place and at rest."


def register(trt: Any, registry: Any, plugin: PluginLibrary) -> tuple[Literal["itself", "loaded", "refused"], str]:
    """Load one library into this process: how it registered its plugins, and the path that it was loaded by.

    Most register their plugins by themselves when they are loaded (``REGISTER_TENSORRT_PLUGIN``; ``--staticPlugins`` of
    trtexec). ``load_library`` refuses those, after it has unloaded them again, with their creators still in the
    registry: the next look at those crashes. So the library is loaded here first, which stays, and ``load_library`` is
    for the others.

    Args:
        trt: ``tensorrt`` or ``tensorrt_rtx``.
        registry: The ``IPluginRegistry`` of a builder or a runtime.
        plugin: The library.

    Raises:
        OptionError: It is gone, or is not the one of the key any more.
    """
    path = f"/proc/self/fd/{_open_checked(plugin)}"
    known = _creator_count(trt)
    with contextlib.suppress(OSError):  # TensorRT says it in its own words
        ctypes.CDLL(path)
    if _creator_count(trt) > known:
        return "itself", path
    return ("refused" if registry.load_library(path) is None else "loaded"), path


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


def _creator_count(trt: Any) -> int:
    """How many plugins are in the process's registry."""
    registry = trt.get_plugin_registry()
    names = ("all_creators", "plugin_creator_list")
    return next(len(getattr(registry, name)) for name in names if hasattr(registry, name))
