"""Trials in a child process, which does what the plan says."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from builder_models import ADA
from builder_processes import ENVIRONMENT, children, modules_first
from load_requests import request_for, scripted
from waiting import is_running, wait_for

from enginecache.errors import IntegrityError
from enginecache.trt.child import describe_status, is_from_outside
from enginecache.trt.load.request import Failure
from enginecache.trt.load.trial import ProcessTrial
from enginecache.trt.load.verdict import judge

pytestmark = pytest.mark.rtx

DATA = str(Path(__file__).parent / "data")


@pytest.fixture
def trial():
    pytest.importorskip("tensorrt_rtx", reason="probe: no module tensorrt_rtx")
    before = children()
    with modules_first(DATA):
        yield ProcessTrial()
    assert children() <= before


def test_plan_that_loads_gives_nothing(tmp_path, trial):
    assert trial(scripted(tmp_path, "engine"), None) is None


def test_segfault_is_a_crash_with_the_lines_before_it(tmp_path, trial):
    request = scripted(tmp_path, "crash|reading weights")
    failure = trial(request, ADA)
    assert failure == Failure("crash", ("reading weights",), (), "the process that tried it ended by SIGSEGV")
    assert judge(request, ADA, failure).outcome == "bad"


def test_plan_that_is_not_taken_gives_the_errors_in_order_without_the_warnings(tmp_path, trial):
    assert trial(scripted(tmp_path, "none|first|second|first"), ADA).lines == ("first", "second")


@pytest.mark.parametrize(
    ("verb", "kind", "what"),
    [
        ("raise", "exception", "RuntimeError: out of luck"),
        ("memory", "memory", ""),
        ("badalloc", "memory", "the process that tried it ended by SIGABRT, out of memory"),
        ("kill", "killed", "the process that tried it ended by SIGKILL"),
    ],
)
def test_other_ends_of_a_trial_are_told_apart(tmp_path, trial, verb, kind, what):
    failure = trial(scripted(tmp_path, verb), ADA)
    assert (failure.kind, failure.what) == (kind, what)


def test_what_a_dying_process_prints_is_kept_and_is_no_result(tmp_path, trial):
    failure = trial(scripted(tmp_path, "exit"), ADA)
    assert failure == Failure("toolchain", ("last words",), (), "the process that tried it ended with status 3")


def hangs(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text() == "hangs\n"
    return False


def test_trial_that_hangs_ends_at_its_limit(tmp_path, trial, monkeypatch):
    # No time passes here before the child hangs.
    clock = SimpleNamespace(monotonic=lambda: 1.5 if any(map(hangs, children())) else 0.0)
    monkeypatch.setattr("enginecache.trt.load.trial.time", clock)
    monkeypatch.setattr("enginecache.trt.load.trial.TIMEOUT_S", 1.0)
    failure = trial(scripted(tmp_path, "hang|so far"), ADA)
    assert failure == Failure("timeout", ("so far",), (), "it took longer than 1 s")


def test_trial_ends_with_its_parent(tmp_path):
    scripted(tmp_path, "hang")
    script = (
        "import sys; from pathlib import Path\n"
        "from load_requests import request_for\n"
        "from enginecache.trt.load.trial import ProcessTrial\n"
        "print(flush=True); ProcessTrial()(request_for(Path(sys.argv[1])), None)\n"
    )
    path = os.pathsep.join([DATA, *map(str, (Path(__file__).parent, Path(__file__).parents[2]))])
    command = [sys.executable, "-c", script, tmp_path / "plan.engine"]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE) as parent:
        parent.stdout.readline()
        (child,) = wait_for(lambda: children(parent.pid))
        parent.kill()
    wait_for(lambda: not is_running(child))


def test_child_sees_the_one_gpu_and_the_host_code_that_was_asked_for(tmp_path, trial):
    lines = trial(scripted(tmp_path, "tell", allows_host_code=True), ADA).lines
    assert lines == (f"visible: {ADA.uuid}", "host code: True", "folder: /")


def test_crash_before_tensorrt_has_the_plan_tells_nothing_of_it(tmp_path):
    (tmp_path / "tensorrt_rtx.py").write_text("import ctypes; ctypes.string_at(0)\n")
    request = scripted(tmp_path, "engine")
    with modules_first(tmp_path):
        failure = ProcessTrial()(request, ADA)
    assert failure.kind == "toolchain"
    assert judge(request, ADA, failure).outcome == "refused"


def test_changed_bytes_are_an_integrity_error_and_tensorrt_is_not_imported(tmp_path):
    (tmp_path / "tensorrt_rtx.py").write_text("import ctypes; ctypes.string_at(0)\n")
    request = scripted(tmp_path, "engine", digest="0" * 64)
    with modules_first(tmp_path), pytest.raises(IntegrityError, match=f"not {'0' * 12}"):
        ProcessTrial()(request, ADA)


def test_interpreter_that_cannot_be_run_is_a_failure_that_says_so(tmp_path):
    failure = ProcessTrial(python=str(tmp_path / "python"))(scripted(tmp_path, "engine"), None)
    assert failure.kind == "not_started"
    assert "python" in failure.what


def test_genuine_plan_without_a_driver_is_refused_in_tensorrts_words(rtx_plan, no_driver):
    request = request_for(rtx_plan)
    failure = ProcessTrial()(request, None)
    assert (failure.kind, failure.diagnostics) == ("no_engine", ("INVALID",))
    verdict = judge(request, None, failure)
    assert (verdict.outcome, verdict.is_lasting) == ("refused", False)
    assert "CUDA driver version is insufficient" in verdict.reason


def test_signals_from_outside_and_words_of_memory_are_no_fault_of_the_child():
    assert [is_from_outside(-number, []) for number in (signal.SIGTERM, signal.SIGSEGV, signal.SIGBUS)] == [
        True,
        False,
        False,
    ]
    assert is_from_outside(-signal.SIGABRT, ["what():  std::bad_alloc"])
    assert not is_from_outside(1, ["an error"])
    assert [describe_status(status) for status in (0, -11, -40)] == ["with status 0", "by SIGSEGV", "by signal 40"]


def test_worker_imports_no_registry_no_model_and_no_tensorrt():
    code = "import sys, enginecache.trt.load.worker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    unwanted = {"sqlalchemy", "alembic", "typer", "rich", "filelock", "onnx", "numpy", "tensorrt_rtx", "tensorrt"}
    assert not unwanted & set(done.stdout.split())
