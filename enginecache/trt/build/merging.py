"""One timing cache out of two, in a process of its own: ``python -m enginecache.trt.build.merging``.

Its request has ``flavour`` and the paths ``current``, ``ours`` and ``merged``; see :mod:`enginecache.trt.child`. Exit
status 0: the file ``merged`` is written, and closed. 3: TensorRT does not merge these two. Anything else is a failure.
"""

from __future__ import annotations

import faulthandler
import sys
import traceback
from pathlib import Path
from typing import Any

from enginecache.errors import EngineCacheError
from enginecache.trt.build.logs import BuildLog, make_logger
from enginecache.trt.build.timing_cache import read_timing_cache
from enginecache.trt.child import end_process, receive_request
from enginecache.trt.loaded_version import load_module

REFUSED = 3
"""Exit status where TensorRT does not merge."""


def merge_timing_caches(trt: Any, log: BuildLog, current: bytes, ours: bytes) -> bytes | None:
    """What both caches know; where they disagree, ``current`` stands. None where TensorRT refuses.

    Blocks, and makes a builder: call it once a process, on the device that both are of.

    Args:
        trt: The bindings.
        log: Where TensorRT's lines go.
        current: Bytes of ``ITimingCache.serialize``, and so is ``ours``.
        ours: What is added.
    """
    builder = trt.Builder(make_logger(trt, log))
    config = builder.create_builder_config()
    caches = []
    for name, data in (("current", current), ("ours", ours)):
        cache, refusal = read_timing_cache(config, data, log)
        if cache is None:
            # Damage would merge as an empty cache, and the file that it came from be replaced by the other alone.
            log.write("E", f"the timing cache {name} is not taken: {refusal}")
            return None
        caches.append(cache)
    # ignore_mismatch would put another device's timings among this one's.
    if not caches[0].combine(caches[1], ignore_mismatch=False):
        return None
    return bytes(caches[0].serialize())


def main() -> None:
    """Read the request, merge, write, and end the process."""
    faulthandler.enable(all_threads=False)
    try:
        record, _ = receive_request()
        status = _run(record)
    except EngineCacheError as error:
        print(error.what, file=sys.stderr)  # noqa: T201  # the log, whose last line the parent shows
        status = 1
    except Exception:  # noqa: BLE001  # the process ends here, and the parent reads the log
        traceback.print_exc()
        status = 1
    end_process(status)


def _run(record: dict[str, Any]) -> int:
    trt = load_module(record["flavour"])
    current, ours = (Path(record[name]).read_bytes() for name in ("current", "ours"))
    merged = merge_timing_caches(trt, BuildLog(sys.stderr), current, ours)
    if merged is None:
        return REFUSED
    Path(record["merged"]).write_bytes(merged)
    return 0


if __name__ == "__main__":
    main()
