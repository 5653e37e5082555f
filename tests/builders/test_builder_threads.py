"""A builder that may not start the threads which it needs: seen, and no verdict on the model."""

import pytest
from builder_models import request_for
from held_worker import builders_that_stop, held_workers

from enginecache.errors import BuilderKilledError
from enginecache.trt.build import process, worker
from enginecache.trt.build.codec import decode_error
from enginecache.trt.build.process import ProcessBuilder


def test_too_few_threads_are_said_before_tensorrt_waits_for_them(monkeypatch, tmp_path):
    monkeypatch.setattr(worker, "can_start_threads", lambda count: count < worker.NEEDED_THREADS)
    monkeypatch.setattr(worker, "decode_request", lambda record: record)
    sent = []
    reports = type("Sent", (), {"send": lambda _self, report: sent.append(report)})()
    assert worker.run({}, reports) == 1
    (report,) = sent
    error = decode_error(report, tmp_path / "x.log")
    assert type(error) is BuilderKilledError
    assert "needs 8 threads: no more processes or threads may be started" in error.what
    assert "ulimit -u" in error.fix


@pytest.mark.rtx
def test_build_that_stands_still_where_memory_is_limited_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "STALL_S", 1.0)
    monkeypatch.setattr(process, "memory_limit_bytes", lambda: 500 << 20)
    with builders_that_stop(), pytest.raises(BuilderKilledError) as caught:
        ProcessBuilder().build(request_for(tmp_path))
    assert "hangs because it lacks memory: its limit is 500 MiB" in caught.value.what
    assert "ulimit -v" in caught.value.fix
    assert held_workers() == []
