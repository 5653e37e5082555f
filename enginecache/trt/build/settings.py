"""The builder config: its options, each looked for before it is set, and its timing cache.

An option that a release lacks is refused, with the releases that have it. One that TensorRT does not take is refused
too, in its own words: TensorRT only logs it, and would go on without.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from enginecache.errors import UnsupportedOptionError
from enginecache.key.options import FLAGS_WITH_OPTION, PRECISIONS, BuildOptions
from enginecache.trt.build.explain import product
from enginecache.trt.build.logs import BuildLog
from enginecache.trt.build.request import BuildRequest
from enginecache.trt.messages import clean_lines

_SINCE = {
    # Source: NVIDIA, TensorRT release notes 10.9.0, "Key Features and Enhancements".
    "SAME_COMPUTE_CAPABILITY": "TensorRT 10.9 and later have it",
    # Source: the API lists of 8.6.1, 10.0.1, 10.16.1 and 11.4.0.
    "STRIP_PLAN": "TensorRT 10 and later have it",
    "BF16": "TensorRT 10 has it",
}
"""The releases that have a feature, where that is known."""

_FAST = {"fp16": "platform_has_fast_fp16", "int8": "platform_has_fast_int8"}
"""Questions to the builder before a precision is set; for the others TensorRT has none."""


def apply_options(trt: Any, builder: Any, config: Any, request: BuildRequest, log: BuildLog) -> tuple[str, ...]:
    """Set the request's options.

    Args:
        trt: ``tensorrt`` or ``tensorrt_rtx``.
        builder: Its builder.
        config: The config to set.
        request: What to build.
        log: Where TensorRT's lines go.

    Returns:
        What was left out, and why.

    Raises:
        UnsupportedOptionError: This release lacks what an option asks for, or does not take it.
    """
    options = request.options
    if options.workspace_bytes is not None:
        # max_workspace_size of 8.6 is its deprecated double; every release from 8.6 on has the pool's limit.
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    config.builder_optimization_level = options.optimization_level
    _set_compatibility(trt, config, request, log)
    precisions, left_out = _precision_flags(trt, builder, request)
    _set_flags(trt, config, request, log, {**precisions, **_named_flags(options)})
    return left_out


def _set_compatibility(trt: Any, config: Any, request: BuildRequest, log: BuildLog) -> None:
    name = request.options.hardware_compatibility.upper()
    if name == "NONE":
        return
    if not hasattr(trt.HardwareCompatibilityLevel, name):
        message = f"{product(request)} has no hardware compatibility level {name}"
        levels = ", ".join(f"--hardware-compatibility {known.lower()}" for known in _names(_levels(trt)))
        raise UnsupportedOptionError(message, _instead(name, f"This release has {levels}."))
    logged = len(log.errors)
    config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, name)
    # Not read back: TensorRT-RTX logs an internal error for that, which would be taken for the build's.
    if len(log.errors) > logged:
        why = _words(log.errors[logged:])
        message = f"{product(request)} does not take the hardware compatibility level {name}: {why}"
        raise UnsupportedOptionError(message, "Leave --hardware-compatibility out, or build on another GPU.")


def _levels(trt: Any) -> Iterable[str]:
    return (name for name in dir(trt.HardwareCompatibilityLevel) if name != "NONE")


def _precision_flags(trt: Any, builder: Any, request: BuildRequest) -> tuple[dict[str, bool], tuple[str, ...]]:
    """Return the flags of the asked precisions, and a line for each that would not be faster on this GPU.

    A release without such flags takes every type from the graph, which was converted before or has Q/DQ nodes.
    """
    if not hasattr(trt.BuilderFlag, "FP16"):
        return {}, ()
    flags: dict[str, bool] = {}
    left_out = []
    for precision in request.options.precision:
        name = precision.upper()
        if not hasattr(trt.BuilderFlag, name):
            known = " or ".join(f"--{other}" for other in PRECISIONS if hasattr(trt.BuilderFlag, other.upper()))
            message = f"{product(request)} cannot compute in {name}: it has no such builder flag"
            raise UnsupportedOptionError(message, _instead(name, f"This release has {known}."))
        if precision in _FAST and not getattr(builder, _FAST[precision], True):
            left_out.append(f"this GPU has no fast {name}: {name} was left out")
        else:
            flags[name] = True
    return flags, tuple(left_out)


def _named_flags(options: BuildOptions) -> dict[str, bool]:
    """Return builder flags by name, and whether they are to be set; those that others depend on come first."""
    flags = {"VERSION_COMPATIBLE": options.version_compatible, "STRIP_PLAN": options.strip_plan}
    flags = {name: True for name, is_asked in flags.items() if is_asked}
    return {**flags, **{text.partition("=")[0]: not text.endswith("=OFF") for text in options.builder_flags}}


def _set_flags(trt: Any, config: Any, request: BuildRequest, log: BuildLog, flags: dict[str, bool]) -> None:
    known = trt.BuilderFlag
    for name in flags:
        if not hasattr(known, name):
            message = f"{product(request)} has no builder flag {name}"
            raise UnsupportedOptionError(message, _instead(name, f"This release has {', '.join(_free(known))}."))
    said = len(log.errors), len(log.warnings)
    for name, is_on in flags.items():
        (config.set_flag if is_on else config.clear_flag)(getattr(known, name))
    # At the end: TensorRT refuses EXCLUDE_LEAN_RUNTIME alone, and clears REFIT when REFIT_IDENTICAL is set after it. It
    # goes on in both cases (11.4's builder, 2026-11), and the plan would not be what its key says.
    for name, is_on in flags.items():
        if bool(config.get_flag(getattr(known, name))) is not is_on:
            why = _words([*log.errors[said[0] :], *log.warnings[said[1] :]])
            message = f"{product(request)} does not take the builder flag {name}: {why}"
            raise UnsupportedOptionError(message, "Leave it out, or change the options that it contradicts.")


def _free(known: Any) -> list[str]:
    """Return the builder flags that ``--builder-flag`` takes: the others have an option of their own."""
    return [name for name in _names(dir(known)) if name not in FLAGS_WITH_OPTION]


def _names(names: Iterable[str]) -> list[str]:
    """Return an enumeration's members, without its attributes and its aliases."""
    return sorted(name for name in names if name.isupper())


def _instead(name: str, otherwise: str) -> str:
    return f"{_SINCE[name]}. {otherwise}" if name in _SINCE else otherwise


def _words(lines: list[str]) -> str:
    return "; ".join(clean_lines(lines)[:1]) or "it gave no reason"


def attach_timing_cache(config: Any, data: bytes, log: BuildLog) -> str:
    """Let the config start from a timing cache, or from an empty one where TensorRT does not take it.

    Args:
        config: The builder config; it keeps the cache alive.
        data: Bytes of ``ITimingCache.serialize``; none for an empty one.
        log: Where TensorRT's lines go.

    Returns:
        Why the given one was not taken; empty where it was.
    """
    cache, refusal = _read_timing_cache(config, data, log)
    if cache is not None:
        logged = len(log.errors), len(log.warnings)
        # Never ignore_mismatch: timings of another GPU or version would choose tactics here, and be stored.
        is_set = config.set_timing_cache(cache, ignore_mismatch=False)
        refusal = _said(log, *logged) or ("" if is_set else "it is of another device or TensorRT")
    if refusal:
        empty = config.create_timing_cache(b"")
        if empty is not None:
            config.set_timing_cache(empty, ignore_mismatch=False)
    return refusal


def _read_timing_cache(config: Any, data: bytes, log: BuildLog) -> tuple[Any | None, str]:
    """Return the timing cache of these bytes, or None and why.

    Damage is only logged, and gives an *empty* cache (11.4's bindings over TensorRT-RTX 1.7.1, 2026-11). So a line of
    any severity but information is a refusal.
    """
    logged = len(log.errors), len(log.warnings)
    try:
        cache = config.create_timing_cache(data)
    except (RuntimeError, ValueError) as error:
        cache = None
        log.write("E", str(error))
    refusal = _said(log, *logged) or ("it gave no reason" if cache is None else "")
    return (None if refusal else cache), refusal


def _said(log: BuildLog, errors: int, warnings: int) -> str:
    """Return the lines logged since there were so many, and drop them: they are not why a build fails later."""
    lines = clean_lines([*log.errors[errors:], *log.warnings[warnings:]])
    del log.errors[errors:], log.warnings[warnings:]
    return "; ".join(lines)


def timing_cache_of(config: Any) -> bytes:
    """Return the config's timing cache after a build; no bytes where it has none."""
    cache = config.get_timing_cache()
    return b"" if cache is None else bytes(cache.serialize())
