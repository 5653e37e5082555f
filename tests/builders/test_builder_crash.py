"""Builders that die, and parents that die: no plan, no process left behind, and a reason."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import builder_models as models
import held_worker
import pytest
from builder_processes import ENVIRONMENT, BuilderWithModules, children
from waiting import is_running, wait_for

from enginecache.errors import BuilderCrashError, BuilderKilledError, BuildError, EngineCacheError, ToolchainError
from enginecache.key.options import BuildOptions
from enginecache.key.precision import plan_conversion
from enginecache.pipeline.failures import is_lasting
from enginecache.trt import child as processes
from enginecache.trt.build import process as child

pytestmark = pytest.mark.rtx

DENSENET = models.LIGHT / "light_densenet121.onnx"


class Worker:
    """A progress callback that notes the worker's process, and does something to it while TensorRT is at work."""

    def __init__(self, action):
        self.action = action
        self.pid = None

    def __call__(self, event):
        if self.pid is None and event.phase != "Starting":
            (self.pid,) = held_worker.held_workers()
            self.action(self.pid)


@pytest.fixture
def held(builder):
    """A builder whose child stops in the middle of TensorRT's build."""
    with held_worker.builders_that_stop():
        yield builder


def death(tmp_path, builder, number):
    request = models.request_for(tmp_path, DENSENET)
    worker = Worker(lambda pid: os.kill(pid, number))
    with pytest.raises(BuilderCrashError) as caught:
        builder.build(request, worker)
    assert not is_running(worker.pid)
    assert not (request.work_dir / "plan.engine").exists()
    assert caught.value.log_path == str(request.log_path)
    shown = caught.value.fix.partition("The log's last lines:\n")[2].splitlines()
    logged = request.log_path.read_text()
    assert shown
    assert all(line.strip() in logged for line in shown)
    return caught.value


def test_killed_worker_is_told_from_a_crash_and_is_not_to_be_remembered(tmp_path, held):
    error = death(tmp_path, held, signal.SIGKILL)
    assert isinstance(error, BuilderKilledError)
    assert "killed (SIGKILL): out of memory?" in error.what
    assert "memory limit" in error.fix
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (BuilderKilledError, str(error))


def test_worker_ended_by_another_signal_from_outside_is_not_to_be_remembered(tmp_path, held):
    error = death(tmp_path, held, signal.SIGTERM)
    assert isinstance(error, BuilderKilledError)
    assert "ended by SIGTERM" in error.what


def test_worker_that_aborts_is_a_crash(tmp_path, held):
    error = death(tmp_path, held, signal.SIGABRT)
    assert type(error) is BuilderCrashError
    assert "crashed: it was ended by SIGABRT" in error.what


@pytest.mark.parametrize("number", [0, signal.SIGSEGV], ids=["exit", "SIGSEGV"])
def test_builder_that_dies_before_it_has_the_model_says_nothing_of_it(tmp_path, number):
    package = tmp_path / "modules" / "tensorrt_rtx"
    package.mkdir(parents=True)
    action = f"os.kill(os.getpid(), {int(number)})" if number else "os._exit(3)"
    (package / "__init__.py").write_text(f"import os\n{action}\n")
    builder = BuilderWithModules(package.parent)
    request = models.request_for(tmp_path)
    with pytest.raises(ToolchainError, match="before it had opened the model") as caught:
        builder.build(request)
    assert not is_lasting(caught.value)
    assert str(request.log_path) in caught.value.fix


def test_native_segmentation_fault_is_an_error_with_the_python_line(tmp_path, shim_builder_of):
    request = models.request_for(tmp_path, toolchain=models.TRT, device=models.ADA)
    with pytest.raises(BuilderCrashError) as caught:
        shim_builder_of(defines=["CRASH"]).build(request)
    assert type(caught.value) is BuilderCrashError
    assert "crashed: it was ended by SIGSEGV" in caught.value.what
    assert "adapter.py" in caught.value.fix
    assert "Segmentation fault" in request.log_path.read_text()


@pytest.mark.parametrize("raised", [KeyboardInterrupt, ValueError])
def test_exception_in_the_callback_ends_the_worker_before_it_goes_on(tmp_path, held, raised):
    def interrupt(_pid):
        raise raised

    worker = Worker(interrupt)
    with pytest.raises(raised):
        held.build(models.request_for(tmp_path, DENSENET), worker)
    assert worker.pid not in children()
    assert not is_running(worker.pid)


def test_interrupt_of_the_waiting_parent_ends_the_worker(tmp_path, held):
    # The signal arrives while the parent waits in poll(), not in its callback.
    def interrupt_soon(_pid):
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

    worker = Worker(interrupt_soon)
    with pytest.raises(KeyboardInterrupt):
        held.build(models.request_for(tmp_path, DENSENET), worker)
    assert not is_running(worker.pid)


PARENT = """
import os, pathlib, sys, time
sys.path[:0] = {tests!r}
import builder_models, held_worker
from enginecache.trt.build import process as child

def tell(event):
    global reported
    if event.phase != "Starting" and not reported:
        reported = True
        {extra}
        print(*held_worker.held_workers(), flush=True)

reported = False
child.WORKER = held_worker.NAME
request = builder_models.request_for(pathlib.Path({folder!r}), builder_models.LIGHT / "light_densenet121.onnx")
child.ProcessBuilder().build(request, tell)
"""

HOLD_THE_PIPE = "sys.stdout.flush(); os.fork() or (os.close(1), time.sleep(1000), os._exit(0))"


@pytest.mark.parametrize("extra", ["pass", HOLD_THE_PIPE])
def test_worker_ends_when_its_parent_is_killed(tmp_path, extra):
    # In the second case a process that the parent forked lives on with a copy of the worker's pipe.
    folders = [str(Path(module.__file__).parent) for module in (models, held_worker)]
    script = PARENT.format(tests=folders, folder=str(tmp_path), extra=extra)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True, env=ENVIRONMENT
    )
    worker = None
    try:
        worker = int(process.stdout.readline())
        assert is_running(worker)
        process.kill()
        process.wait()
        wait_for(lambda: not is_running(worker))  # by itself it would not end
    finally:
        for kill, pid in ((os.killpg, process.pid), (os.kill, worker)):
            with contextlib.suppress(ProcessLookupError, TypeError):
                kill(pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert not (tmp_path / "work0" / "plan.engine").exists()


def test_death_is_seen_although_another_process_holds_the_event_pipe(tmp_path):
    # A process that another thread forks while the worker is being started keeps the pipe's writing end.
    reader, writer = os.pipe()
    process = subprocess.Popen(["true"], stdin=subprocess.PIPE, bufsize=0)
    worker = processes.Worker(process, reader, "python3")
    try:
        os.write(writer, b'{"event": 1}\n{"half')
        assert [report for report in worker.reports() if report is not None] == [{"event": 1}]
    finally:
        worker.end()
        os.close(writer)


def test_worker_without_memory_says_so(tmp_path):
    # Importing fits in from 350 MiB on, building light_squeezenet from 750 MiB on (TensorRT-RTX 1.7.1, 2026-11).
    script = (
        "import resource, sys, pathlib\n"
        f"sys.path.insert(0, {str(Path(models.__file__).parent)!r})\n"
        "import builder_models\n"
        "from enginecache.trt.build.process import ProcessBuilder\n"
        f"request = builder_models.request_for(pathlib.Path({str(tmp_path)!r}))\n"
        "resource.setrlimit(resource.RLIMIT_AS, (500 << 20,) * 2)\n"
        "try:\n"
        "    ProcessBuilder().build(request)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert "BuilderKilledError" in done.stdout, done.stdout + done.stderr
    assert "out of memory" in done.stdout


@pytest.mark.parametrize(
    "line",
    [
        "RuntimeError: can't start new thread",
        "  what():  Resource temporarily unavailable",
        'pyo3_runtime.PanicException: ThreadPoolBuildError { message: "Resource temporarily unavailable" }',
    ],
)
@pytest.mark.parametrize("status", [1, -signal.SIGABRT])
def test_builder_that_may_start_no_thread_is_not_to_be_remembered(tmp_path, line, status):
    log = tmp_path / "build.log"
    log.write_text(f"Traceback (most recent call last):\n{line}\n")
    error = child._death(status, log)
    assert type(error) is BuilderKilledError
    assert error.what == "the builder could not start a thread and died"
    assert "Traceback" not in str(error)
    assert str(log) in str(error)
    assert "ulimit -u" in error.fix
    assert not is_lasting(error)


@pytest.mark.parametrize("status", [0, 1, 3, 255, -signal.SIGUSR1, -signal.SIGALRM, -signal.SIGXFSZ, -signal.SIGRTMIN])
def test_builder_that_ended_itself_or_was_ended_says_nothing_of_the_model(tmp_path, status):
    error = child._death(status, tmp_path / "build.log", has_model=True)
    assert type(error) is BuilderKilledError
    assert error.exit_code == 1
    assert not is_lasting(error)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL])
def test_builder_that_crashed_on_the_model_is_remembered(tmp_path, number):
    assert is_lasting(child._death(-number, tmp_path / "build.log", has_model=True))


def test_real_builder_that_exits_in_the_middle_of_a_build_is_not_to_be_remembered(tmp_path):
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def exit_at(event, arguments):\n"
        "    if event == 'open' and str(arguments[0]).endswith('plan.engine'):\n"
        "        os._exit(3)\n"
        "sys.addaudithook(exit_at)\n"
    )
    builder = BuilderWithModules(folder)
    with pytest.raises(BuilderKilledError, match="ended with status 3 and no result") as caught:
        builder.build(models.request_for(tmp_path))
    assert not is_lasting(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("numpy", "raise AttributeError('no such thing')"),
        ("numpy", ""),
        ("onnx", ""),
        ("onnxconverter_common", "raise RuntimeError('half installed')"),
        ("json", "loads = dumps = None"),
        ("tensorrt_rtx", "raise ValueError('half installed')"),
        ("sitecustomize", "raise SystemExit(3)"),
        ("sitecustomize", "import os; os._exit(3)"),
        ("sitecustomize", "import os; os.abort()"),
        ("encodings", ""),
    ],
)
def test_broken_module_on_the_search_path_is_not_to_be_remembered(tmp_path, name, text):
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / f"{name}.py").write_text(f"{text}\n")
    options = BuildOptions(precision=("fp16",))
    request = models.request_for(tmp_path, options=options)
    request = replace(request, conversion=plan_conversion(options, request.toolchain, request.identity))
    builder = BuilderWithModules(folder)
    with pytest.raises(EngineCacheError) as caught:
        builder.build(request)
    assert not isinstance(caught.value, BuildError)
    assert not is_lasting(caught.value)


def test_crash_within_a_limit_of_memory_is_not_to_be_remembered(tmp_path, monkeypatch):
    """Protobuf was seen to end by SIGSEGV where it got no memory to convert a graph in."""
    assert is_lasting(child._death(-signal.SIGSEGV, tmp_path / "build.log"))
    monkeypatch.setattr(processes.resource, "getrlimit", lambda _limit: (680 << 20, -1))
    error = child._death(-signal.SIGSEGV, tmp_path / "build.log")
    assert type(error) is BuilderKilledError
    assert "its limit is 680 MiB" in error.what
    assert "ulimit -v" in error.fix
    assert not is_lasting(error)
