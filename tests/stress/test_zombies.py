"""Herds in which processes are killed and stopped: no hang, no engine published twice, no builder left over."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import held_worker
import pytest
from fakes import FakeBuilder
from held_worker import held_workers, is_held
from herd_processes import Herd
from models import LIGHT_DIR
from waiting import LIMIT_S, is_running, wait_for

from enginecache.cache import EngineCache
from enginecache.config import Config

DIMS = {"batch": (1, 2, 4)}
HERDS = pytest.mark.parametrize("processes", [16, pytest.param(64, marks=pytest.mark.reliability)])


@pytest.fixture
def folder(tmp_path: Path):
    """The folder of a cache that is verified at the end: garbage of the killed is all that may be left."""
    folder = tmp_path / "cache"
    yield folder
    with EngineCache.open(dir=folder) as cache:
        found = cache.verify(deep=True)
    assert found.findings == (), found


def states(folder: Path) -> Counter:
    with EngineCache.open(dir=folder) as cache:
        return Counter(build.state for build in cache.builds())


def outcomes(results) -> Counter:
    return Counter("killed" if result is None else result["outcome"] for result in results)


def assert_one_engine(folder: Path, results) -> None:
    """Whoever got an engine got the one that is stored, whole."""
    (path,) = {result["path"] for result in results if result is not None and "path" in result}
    with EngineCache.open(dir=folder) as cache:
        (used,) = cache.entries()
        assert str(cache.path(used.record)) == path
        assert len(list(cache.root.engines.glob("*/*.engine"))) == 1


@HERDS
def test_a_herd_on_a_cold_key_makes_one_build(tmp_path, folder, model, processes):
    with Herd(tmp_path / "script", folder, model, [{"timeout_s": LIMIT_S}] * processes) as herd:
        herd.start()
        herd.new_build(0)
        herd.let_build()
        results = herd.end()
        assert len(herd.builds()) == 1
    assert outcomes(results) == {"built": 1, "hit": processes - 1}
    assert states(folder) == {"succeeded": 1}
    assert_one_engine(folder, results)
    with EngineCache.open(dir=folder) as cache:
        assert list(cache.root.tmp.iterdir()) == []


@HERDS
def test_a_herd_on_a_model_that_is_refused_makes_one_build(tmp_path, folder, model, processes):
    with Herd(tmp_path / "script", folder, model, [{"timeout_s": LIMIT_S}] * processes) as herd:
        herd.start()
        herd.new_build(0)
        herd.refuse()
        herd.let_build()
        results = herd.end()
        assert len(herd.builds()) == 1
    assert outcomes(results) == {"BuildError": processes}
    assert all(result["text"].startswith("TensorRT refused node 7") for result in results)
    assert len({result["text"].rpartition("The builder's log: ")[2] for result in results}) == 1
    assert states(folder) == {"failed": 1}


def kill_builders(tmp_path: Path, folder: Path, model: Path, seed: int, processes: int, kills: int) -> None:
    """Kill builds one after the other, at random the builder or its parent: one build more than kills."""
    chance = random.Random(seed)
    with Herd(tmp_path / f"script{seed}", folder, model, [{"timeout_s": LIMIT_S}] * processes) as herd:
        herd.start()
        victims = []
        for number in range(kills):
            worker, member = herd.new_build(number)
            threading.Event().wait(chance.uniform(0, 0.03))
            victims.append(chance.choice([worker, member]))
            os.kill(victims[-1], signal.SIGKILL)
        herd.let_build()
        results = herd.end()
        herd.assert_no_orphan()
        assert len(herd.builds()) == kills + 1
    killed = sum(victim in herd.members for victim in victims)
    assert (
        outcomes(results)
        == Counter({"killed": killed, "BuilderKilledError": kills - killed, "built": 1, "hit": processes - kills - 1})
        + Counter()
    ), results
    found = states(folder)
    assert (found["succeeded"], found["failed"] + found["abandoned"]) == (1, kills)
    assert_one_engine(folder, results)


def kill_at_any_time(tmp_path: Path, folder: Path, model: Path, seed: int, processes: int, kills: int) -> int:
    """Kill any member or builder at any time, also while it publishes; how many died in time."""
    chance = random.Random(seed)
    with Herd(tmp_path / f"script{seed}", folder, model, [{"timeout_s": LIMIT_S}] * processes) as herd:
        herd.let_build()
        herd.start()
        herd.new_build(0)
        for _ in range(kills):
            threading.Event().wait(chance.uniform(0, 0.15))
            builds = herd.builds()
            worker, member = builds[-1]
            victim = chance.choice([worker, member, member, chance.choice(herd.members)])
            if victim in herd.members or is_running(worker):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
        results = herd.end()
        herd.assert_no_orphan()
        begun = len(herd.builds())
    found = states(folder)
    unfinished = found["failed"] + found["abandoned"] + found["running"]
    assert found["succeeded"] == 1, (found, results)
    # An attempt may die before its builder has said that it is there.
    assert begun - 1 <= unfinished, (found, begun)
    assert set(outcomes(results)) <= {"killed", "BuilderKilledError", "built", "hit"}, results
    assert_one_engine(folder, results)
    return unfinished


@pytest.mark.parametrize("seed", [1])
def test_each_killed_builder_costs_one_build(tmp_path, folder, model, seed):
    kill_builders(tmp_path, folder, model, seed, processes=8, kills=2)


@pytest.mark.parametrize("seed", [1])
def test_kills_at_any_time_end_in_one_publication(tmp_path, folder, model, seed):
    kill_at_any_time(tmp_path, folder, model, seed, processes=8, kills=3)


@pytest.mark.reliability
@pytest.mark.parametrize("seed", range(100, 124))
def test_each_killed_builder_of_a_large_herd_costs_one_build(tmp_path, folder, model, seed):
    kills = random.Random(seed).randint(1, 6)
    kill_builders(tmp_path, folder, model, seed, processes=64, kills=kills)


@pytest.mark.reliability
@pytest.mark.parametrize("seed", range(200, 224))
def test_kills_at_any_time_in_a_large_herd_end_in_one_publication(tmp_path, folder, model, seed):
    kill_at_any_time(tmp_path, folder, model, seed, processes=32, kills=8)


def test_a_stopped_builder_costs_its_waiters_their_timeout_and_finishes_when_it_goes_on(tmp_path, folder, model):
    asks = [{"timeout_s": LIMIT_S}, {"timeout_s": LIMIT_S}, {"timeout_s": 0.5}, {"timeout_s": 0.5}]
    with Herd(tmp_path / "script", folder, model, asks) as herd:
        herd.start()
        worker, member = herd.new_build(0)
        os.kill(worker, signal.SIGSTOP)
        herd.let_build()
        impatient = [pid for pid in herd.members[2:] if pid != member]
        wait_for(lambda: not any(is_running(pid) for pid in impatient))
        assert is_running(member)
        os.kill(worker, signal.SIGCONT)
        results = herd.end()
        assert len(herd.builds()) == 1
    late = [result for pid, result in zip(herd.members, results, strict=True) if pid in impatient]
    assert {result["outcome"] for result in late} == {"LockTimeoutError"}
    assert all(result["seconds"] >= 0.5 for result in late), late
    assert all(f"process {member} on " in result["text"] for result in late)
    assert outcomes(results) == {"built": 1, "hit": 3 - len(late), "LockTimeoutError": len(late)}
    assert_one_engine(folder, results)


def test_killed_and_stopped_waiters_are_nobodys_concern(tmp_path, folder, model):
    with Herd(tmp_path / "script", folder, model, [{"timeout_s": LIMIT_S}] * 8) as herd:
        herd.start()
        killed, stopped, *others = herd.waiters(7)
        os.kill(killed, signal.SIGKILL)
        os.kill(stopped, signal.SIGSTOP)
        herd.let_build()
        wait_for(lambda: not any(is_running(pid) for pid in others))
        os.kill(stopped, signal.SIGCONT)
        results = herd.end()
        assert len(herd.builds()) == 1
    assert outcomes(results) == {"built": 1, "hit": 6, "killed": 1}
    assert_one_engine(folder, results)


def test_lost_lock_costs_a_build_and_nothing_else(open_cache, model):
    """A lock file that is deleted while it is held excludes nobody any more."""
    both = threading.Barrier(2)
    builder = FakeBuilder(before=lambda _request: both.wait(LIMIT_S))
    cache = open_cache(builder)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, model, dims=DIMS)
        wait_for(cache.builds)
        (cache.root.locks / f"{cache.builds()[0].key}.lock").unlink()
        entries = [cache.get(model, dims=DIMS), first.result()]
    assert [entry.outcome for entry in entries] == ["built", "built"]
    assert builder.count == 2
    assert len(cache.entries()) == 1
    assert cache.get(model, dims=DIMS, timeout_s=0.0).digest == entries[0].digest


@pytest.mark.rtx
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="probe: no module tensorrt_rtx")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_command_line_that_is_ended_by_a_signal_leaves_no_builder_and_nothing_under_way(tmp_path, folder, number):
    model = LIGHT_DIR / "light_resnet50.onnx"
    environment = os.environ | {"ENGINECACHE_DIR": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(held_worker.__file__).parent), *sys.path])
    # A test run under nohup ignores SIGHUP, and so does what it starts: that is respected, and not what is tested here.
    code = f"import signal; signal.signal({int(number)}, signal.SIG_DFL); {held_worker.COMMAND}"
    command = [sys.executable, "-c", code, "get", str(model), "--target", "sm_89"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        (worker,) = wait_for(lambda: [pid for pid in held_workers(process.pid) if is_held(pid)])
        process.send_signal(number)
        output, errors = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert (process.returncode, output) == (-number, "")
    assert errors.splitlines()[-1] == "interrupted"
    assert not is_running(worker)
    with EngineCache(Config(dir=folder)) as cache:
        (build,) = cache.builds()
        assert (build.state, build.reason, build.is_lasting) == ("failed", "interrupted", False)
        assert list(cache.root.tmp.iterdir()) == []
        assert list(cache.root.locks.glob("*.holder")) == []
