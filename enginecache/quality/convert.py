"""The graph that an engine is built from, converted anew in a child process: ``python -m enginecache.quality.convert``.

For a stored engine, whose converted graph was deleted with the folder of its build.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

from enginecache.errors import EngineCacheError
from enginecache.quality.memory import give_way
from enginecache.trt.build.codec import decode_request
from enginecache.trt.build.logs import BuildLog
from enginecache.trt.build.request import BuildRequest
from enginecache.trt.child import Reports, end_process, receive_request
from enginecache.trt.convert.conversion import convert, without_misread


def main() -> None:
    """Read the request, convert, report, and end the process."""
    record, reports = receive_request()
    give_way()
    run(record, reports)
    end_process(0)


def run(record: dict[str, Any], reports: Reports) -> None:
    """Convert the model into the request's folder, and send exactly one result."""
    try:
        path = converted(decode_request(record["build"]))
    except EngineCacheError as error:
        reports.send({"event": "failed", "what": error.what})
    except Exception as error:  # noqa: BLE001  # a converter may raise anything
        traceback.print_exc()
        reports.send({"event": "failed", "what": f"{type(error).__name__}: {error}"})
    else:
        reports.send({"event": "done", "path": str(path)})


def converted(request: BuildRequest) -> Path:
    """Return the converted model, without the nodes that TensorRT made stay in FP32: those it names while it builds."""
    log = BuildLog(sys.stderr)
    path = convert(without_misread(request, log), log).source.path
    if path is None:
        raise RuntimeError("the request asks for no conversion")
    return path


if __name__ == "__main__":
    main()
