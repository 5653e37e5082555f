"""Libraries of TensorRT plugins: loaded from the very bytes that the key names, however they register themselves."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
from typing import Any, Literal

from enginecache.errors import ModelChangedError, OptionError
from enginecache.files.digest import StreamDigest
from enginecache.files.os_errors import describe_os_error
from enginecache.key.options import PluginLibrary

_AGAIN = "Run it again when nothing writes to the file."

_REGISTERED: list[tuple[int, PluginLibrary]] = []
"""The libraries that this process has loaded, held open for good.

The loader knows a library by the name that it was loaded by, and would take a second one under the same number for the
first.
"""


def register(trt: Any, registry: Any, plugin: PluginLibrary) -> tuple[Literal["itself", "loaded", "refused"], str]:
    """Load one library into this process; return how it registered its plugins, and the path that it was loaded by.

    Most register their plugins by themselves when they are loaded (``REGISTER_TENSORRT_PLUGIN``; ``--staticPlugins`` of
    trtexec). ``load_library`` refuses those, after it has unloaded them again, with their creators still in the
    registry: the next look at those crashes. So the library is loaded here first, which stays, and ``load_library`` is
    for the others.

    Args:
        trt: ``tensorrt`` or ``tensorrt_rtx``.
        registry: The ``IPluginRegistry`` of a builder or a runtime.
        plugin: The library.

    Raises:
        OptionError: It is missing, or is no longer the one of the key.
    """
    try:
        descriptor = os.open(plugin.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _unreadable(plugin, error) from error
    try:
        _require_digest(descriptor, plugin)
    except OptionError:
        os.close(descriptor)
        raise
    _REGISTERED.append((descriptor, plugin))
    path = f"/proc/self/fd/{descriptor}"
    known = _creator_count(trt)
    with contextlib.suppress(OSError):  # TensorRT says it in its own words
        ctypes.CDLL(path)
    is_registered = _creator_count(trt) > known
    how: Literal["itself", "loaded", "refused"] = "itself"
    if not is_registered:
        how = "refused" if registry.load_library(path) is None else "loaded"
    _require_digest(descriptor, plugin)  # it may have been written to since it was read
    return how, path


def check_registered() -> None:
    """Compare the libraries of this process with their digests once more, when their code has run.

    Their pages are mapped: a write to such a file changes code that has not run yet.

    Raises:
        ModelChangedError: One was written to.
    """
    for descriptor, plugin in _REGISTERED:
        if _digest_of(descriptor, plugin) != plugin.digest:
            message = f"the plugin library {plugin.path} changed while the engine was being built"
            raise ModelChangedError(message, f"Nothing was published. {_AGAIN}")


def has_changed(plugin: PluginLibrary) -> bool:
    """Return whether the path leads to other bytes than those of the key, or to none."""
    try:
        descriptor = os.open(plugin.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return True
    try:
        return _digest_of(descriptor, plugin) != plugin.digest
    except OptionError:
        return True
    finally:
        os.close(descriptor)


def _require_digest(descriptor: int, plugin: PluginLibrary) -> None:
    if _digest_of(descriptor, plugin) != plugin.digest:
        raise OptionError(f"the plugin library {plugin.path} changed since its engine was asked for", _AGAIN)


def _digest_of(descriptor: int, plugin: PluginLibrary) -> str:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        with contextlib.closing(StreamDigest()) as digest:
            digest.read_from(io.FileIO(descriptor, closefd=False), os.fstat(descriptor).st_size)
            return digest.hexdigest()
    except OSError as error:
        raise _unreadable(plugin, error) from error


def _unreadable(plugin: PluginLibrary, error: OSError) -> OptionError:
    doing = f"the plugin library {plugin.path} cannot be read"
    return OptionError(*describe_os_error(error, doing, plugin.path, otherwise=_AGAIN))


def _creator_count(trt: Any) -> int:
    """Return how many plugins are in the process's registry."""
    registry = trt.get_plugin_registry()
    names = ("all_creators", "plugin_creator_list")
    return next(len(getattr(registry, name)) for name in names if hasattr(registry, name))
