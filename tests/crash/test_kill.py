"""Kills, stops, interrupts and a full disk in the middle of real builds: no bad engine, no stuck lock, no leftovers."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_processes import Building, run, start
from held_worker import builders_that_stop, go_on, held_workers
from models import EXAMPLE, LIGHT_DIR
from waiting import LIMIT_S, is_running, wait_for

from enginecache.cache import EngineCache
from enginecache.errors import BuilderCrashError, EngineCacheError

pytestmark = [
    pytest.mark.rtx,
    pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="probe: no module tensorrt_rtx"),
]

LONG = (LIGHT_DIR / "light_resnet50.onnx", "--target", "sm_89")
"""A build of two to three seconds."""

SHORT = (EXAMPLE, "--dim", "batch=1:2:4", "--target", "sm_89")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of a cache that is verified at the end: orphan within its grace time is all that may be left."""
    folder = tmp_path / "cache"
    yield folder
    with EngineCache.open(dir=folder) as cache:
        found = cache.verify(deep=True, repair=True)
    assert found.findings == (), found


def states(folder: Path) -> list[tuple[str, str]]:
    """State and reason of every attempt, newest first."""
    with EngineCache.open(dir=folder) as cache:
        return [(build.state, build.reason) for build in cache.builds()]


def garbage(folder: Path) -> list[str]:
    """Return the files that a crash left and that are within their grace time."""
    with EngineCache.open(dir=folder) as cache:
        found = cache.verify(deep=True)
    assert found.findings == (), found
    return [item.what for item in found.young_orphans]


def assert_builds(folder: Path, arguments: tuple) -> None:
    """A get succeeds at once, without waiting for a lock."""
    done = run("get", *arguments, "--timeout", "0", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "built in" in done.stderr
    assert Path(done.stdout.rstrip("\n")).read_bytes().startswith(b"vtrt")


def test_killed_builder_is_an_error_with_its_log_and_the_next_get_builds(folder):
    with Building(*LONG, folder=folder) as building:
        os.kill(building.worker, signal.SIGKILL)
        status, output, errors = building.end()
    assert (status, output) == (1, "")  # 7 would be TensorRT's verdict on the model
    assert "error: the builder was killed (SIGKILL)" in errors
    assert f"The builder's log: {building.log}" in errors
    assert "Traceback" not in errors
    assert building.log.exists()
    assert [state for state, _ in states(folder)] == ["failed"]
    assert garbage(folder) == []
    assert_builds(folder, LONG)
    assert [state for state, _ in states(folder)] == ["succeeded", "failed"]


def test_killed_builder_is_a_crash_error_of_the_library(folder):
    def kill(_step) -> None:
        for pid in held_workers():
            os.kill(pid, signal.SIGKILL)

    with EngineCache.open(dir=folder) as cache:
        with pytest.raises(BuilderCrashError) as caught, builders_that_stop():
            cache.get(SHORT[0], dims={"batch": (1, 2, 4)}, target="sm_89", progress=kill)
        assert Path(caught.value.log_path).exists()
        assert cache.get(SHORT[0], dims={"batch": (1, 2, 4)}, target="sm_89", timeout_s=0.0).outcome == "built"


def test_killed_parent_leaves_no_builder_and_no_lock(folder):
    with Building(*LONG, folder=folder) as building:
        building.signal(signal.SIGKILL)
        building.end()
        wait_for(lambda: not is_running(building.worker))  # by itself it would not end
    assert [state for state, _ in states(folder)] == ["running"]
    assert garbage(folder) == ["a temporary file"]
    done = run("verify", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "orphan within its grace time" in done.stderr
    assert_builds(folder, LONG)
    assert [state for state, _ in states(folder)] == ["succeeded", "abandoned"]


def test_terminated_parent_leaves_no_builder_and_no_lock(folder):
    with Building(*LONG, folder=folder) as building:
        building.signal(signal.SIGTERM)
        status, output, errors = building.end()
        wait_for(lambda: not is_running(building.worker))
    assert (status, output) == (-signal.SIGTERM, "")
    assert "Traceback" not in errors
    assert_builds(folder, SHORT)
    with EngineCache.open(dir=folder) as cache, cache._storage.locks.hold(cache.builds()[-1].key, 0.0):
        pass


def test_interrupted_parent_ends_its_builder_before_it_ends_itself(folder):
    with Building(*LONG, folder=folder) as building:
        building.signal(signal.SIGINT)
        status, output, errors = building.end()
        assert not is_running(building.worker)
    assert (status, output) == (130, "")
    assert errors.splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    assert states(folder) == [("failed", "interrupted")]
    assert garbage(folder) == []
    with EngineCache.open(dir=folder) as cache, cache._storage.locks.hold(cache.builds()[0].key, 0.0):
        pass


def test_interrupted_waiter_ends_and_leaves_nothing(folder):
    with EngineCache.open(dir=folder) as cache:
        cache.make()
        key = cache.explain(EXAMPLE, dims={"batch": (1, 2, 4)}, target="sm_89").key
        with cache._storage.locks.hold(key, None):
            waiter = start("get", *SHORT, folder=folder)
            assert waiter.stderr.readline().startswith(f"waiting for process {os.getpid()} on ")
            waiter.send_signal(signal.SIGINT)
            output, errors = waiter.communicate(timeout=LIMIT_S)
        assert (waiter.returncode, output, errors) == (130, "", "interrupted\n")
        assert cache.builds() == []


def test_stopped_parent_keeps_its_lock_until_it_goes_on(folder):
    with Building(*LONG, folder=folder) as building:
        building.signal(signal.SIGSTOP)
        waiters = [start("get", *LONG, "--timeout", "0.2", folder=folder) for _ in range(3)]
        for waiter in waiters:
            output, errors = waiter.communicate()
            assert (waiter.returncode, output) == (5, "")
            assert f"waiting for process {building.process.pid} on " in errors
        assert is_running(building.process.pid)
        building.go_on()
        building.signal(signal.SIGCONT)
        status, output, errors = building.end()
    assert status == 0, errors
    assert Path(output.rstrip("\n")).exists()
    assert [state for state, _ in states(folder)] == ["succeeded"]
    assert garbage(folder) == []


KILLED_AT = """
import os, sys
from enginecache.cache import EngineCache

cache = EngineCache.open(dir=sys.argv[1])
{point} = lambda *_args, **_kwargs: os._exit(9)
cache.get(sys.argv[2], dims={{"batch": (1, 2, 4)}}, target="sm_89")
"""


@pytest.mark.parametrize(
    ("point", "left"),
    [
        ("cache._storage.blobs.adopt", ["a temporary file"]),
        ("cache._storage.blobs.publish", ["a temporary file"]),
        ("cache._registry.publish", ["a stored engine without a row", "a temporary file"]),
        ("cache._entry", []),
    ],
)
def test_death_at_any_step_of_a_publication_leaves_garbage_at_most(folder, point, left):
    script = KILLED_AT.format(point=point)
    done = subprocess.run([sys.executable, "-c", script, str(folder), str(EXAMPLE)], check=False)
    assert done.returncode == 9
    assert garbage(folder) == left
    with EngineCache.open(dir=folder) as cache:
        entry = cache.get(EXAMPLE, dims={"batch": (1, 2, 4)}, target="sm_89", timeout_s=0.0)
    assert entry.outcome == ("built" if left else "hit")
    if left:
        assert [state for state, _ in states(folder)] == ["succeeded", "abandoned"]
        # An orphan got its row if the second build gave the same bytes, which TensorRT does not promise.
        assert set(garbage(folder)) <= set(left)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one build."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m,mode=0700", "enginecache-test", str(path)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("probe: no tmpfs can be mounted")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def fill(disk: Path, free_bytes: int) -> Path:
    """A file that leaves so much."""
    ballast = disk / "ballast"
    found = os.statvfs(disk)
    try:
        ballast.write_bytes(bytes(found.f_bavail * found.f_frsize - free_bytes))
    except OSError as error:
        if error.errno != errno.ENOSPC:  # a builder wrote meanwhile
            raise
    return ballast


def test_full_disk_is_a_clear_error_and_room_fixes_it(small_disk):
    folder = small_disk / "cache"
    cache = EngineCache.open(dir=folder)
    cache.make()
    ballast = fill(small_disk, 0)

    done = run("get", *SHORT, "--json", folder=folder)

    assert done.returncode in {1, 6}, (done.returncode, done.stderr)
    assert json.loads(done.stdout)["error"]["exit_code"] == done.returncode
    assert "Traceback" not in done.stderr
    what, fix, *_ = (line for line in done.stderr.splitlines() if not line.startswith("building"))
    assert what.startswith("error: ")
    assert fix.startswith("  ")
    assert garbage(folder) == []
    ballast.unlink()
    assert cache.get(EXAMPLE, dims={"batch": (1, 2, 4)}, target="sm_89").outcome == "built"
    assert garbage(folder) == []


@pytest.mark.parametrize("free_bytes", [0, 64 << 10, 256 << 10])
def test_disk_that_fills_up_during_a_build_is_a_clear_error_and_room_fixes_it(small_disk, free_bytes):
    folder = small_disk / "cache"
    filled = []

    def progress(step) -> None:
        if not filled and step.phase != "Starting":
            filled.append(fill(small_disk, free_bytes))
            (worker,) = held_workers()
            go_on(worker)

    with EngineCache.open(dir=folder) as cache:
        with pytest.raises(EngineCacheError) as caught, builders_that_stop():
            cache.get(EXAMPLE, dims={"batch": (1, 2, 4)}, target="sm_89", progress=progress)
        assert caught.value.what
        filled[0].unlink()
        assert garbage(folder) == []
        assert cache.get(EXAMPLE, dims={"batch": (1, 2, 4)}, target="sm_89").outcome == "built"
    assert garbage(folder) == []
