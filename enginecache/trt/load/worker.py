"""The child process of a trial: ``python -m enginecache.trt.load.worker``.

It loads one plan and reports the result; see :mod:`enginecache.trt.child` for its pipes. Each of TensorRT's lines goes
to standard error at once: a crash would lose the kept ones.
"""

from __future__ import annotations

import contextlib
import resource
import sys

from enginecache.errors import IntegrityError
from enginecache.files.plain import from_plain, to_plain
from enginecache.trt.child import Reports, end_process, receive_request
from enginecache.trt.load.deserialize import deserialize
from enginecache.trt.load.request import Failure, LoadRequest


def main() -> None:
    """Read the request, load the plan, report, and end the process."""
    record, reports = receive_request()
    with contextlib.suppress(OSError, ValueError):
        # A crash is an outcome here, and a core of this process would be as large as the GPU's mappings.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    run(from_plain(LoadRequest, record), reports)
    end_process(0)


def run(request: LoadRequest, reports: Reports) -> None:
    """Load the plan, and send exactly one outcome."""
    try:
        outcome = deserialize(request, echo=sys.stderr, before=lambda: reports.send({"event": "deserializing"}))
    except IntegrityError as error:
        reports.send({"event": "damaged", "what": error.what, "fix": error.fix})
        return
    except Exception as error:  # noqa: BLE001  # a fault of enginecache or of this machine: never the plan's
        outcome = Failure("toolchain", what=f"{type(error).__name__}: {error}")
    if isinstance(outcome, Failure):
        reports.send({"event": "failed", "failure": to_plain(outcome)})
    else:
        reports.send({"event": "loaded"})


if __name__ == "__main__":
    main()
