"""Timing caches: what TensorRT measured in earlier builds, given to a config and taken from it."""

from __future__ import annotations

from typing import Any

from enginecache.trt.build.logs import BuildLog
from enginecache.trt.messages import clean_lines


def attach_timing_cache(config: Any, data: bytes, log: BuildLog) -> str:
    """Let the config start from a timing cache, or from an empty one where TensorRT does not take it.

    Args:
        config: The builder config; it keeps the cache alive.
        data: Bytes of ``ITimingCache.serialize``; none for an empty one.
        log: Where TensorRT's lines go.

    Returns:
        Why the given one was not taken; empty where it was.
    """
    cache, refusal = read_timing_cache(config, data, log)
    if cache is not None:
        logged = len(log.errors), len(log.warnings)
        # Never ignore_mismatch: timings of another GPU or version would choose tactics here, and be stored as ours.
        is_set = config.set_timing_cache(cache, ignore_mismatch=False)
        refusal = _said(log, *logged) or ("" if is_set else "it is of another device or TensorRT")
    if refusal:
        empty = config.create_timing_cache(b"")
        if empty is not None:
            config.set_timing_cache(empty, ignore_mismatch=False)
    return refusal


def read_timing_cache(config: Any, data: bytes, log: BuildLog) -> tuple[Any | None, str]:
    """The timing cache of these bytes, or None and why.

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
    """What was logged since there were so many lines; they leave the lists, as they are not why a build fails later."""
    lines = clean_lines([*log.errors[errors:], *log.warnings[warnings:]])
    del log.errors[errors:], log.warnings[warnings:]
    return "; ".join(lines)


def timing_cache_of(config: Any) -> bytes:
    """The config's timing cache after a build; no bytes where it has none."""
    cache = config.get_timing_cache()
    return b"" if cache is None else bytes(cache.serialize())
