"""A builder that may not start the threads which it needs: seen at once, and no verdict on the model."""

from enginecache.errors import BuilderKilledError
from enginecache.trt.build import worker
from enginecache.trt.build.codec import decode_error


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
