"""Many at once on one cache: one build for a key, whoever asks."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from fakes import FakeBuilder, fake_cache
from models import EXAMPLE, linear, save
from waiting import LIMIT_S, wait_for

from enginecache.cache import EngineCache
from enginecache.errors import NotCachedError
from enginecache.trt.build.request import BuildRequest

DIMS = {"batch": (1, 2, 4)}
COMMAND_LINES = 8
PROCESSES = 4
THREADS = 64
SPAWN = multiprocessing.get_context("spawn")


class NotingBuilder(FakeBuilder):
    """A fake builder that notes each build in a file, which processes share."""

    def __init__(self, notes: Path, seconds: float = 0.0, before: Callable[[BuildRequest], None] | None = None) -> None:
        super().__init__(seconds, before)
        self.notes = notes

    def build(self, request, progress=None):
        with self.notes.open("a", encoding="ascii") as notes:
            notes.write(f"{request.identity.digest}\n")
        return super().build(request, progress)


def built_models(notes: Path) -> list[str]:
    """The model's digest of every build."""
    return notes.read_text(encoding="ascii").splitlines()


def in_processes(work, *arguments) -> list:
    """The results of ``work(number, *arguments)`` in so many spawned processes, which begin together."""
    results = SPAWN.Queue()
    together = SPAWN.Barrier(PROCESSES)
    processes = [
        SPAWN.Process(target=_report, args=(results, together, work, number, *arguments)) for number in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=LIMIT_S) for _ in processes]
    for process in processes:
        process.join(LIMIT_S)
        assert process.exitcode == 0
    return found


def _report(results, together, work, number, *arguments) -> None:
    together.wait(LIMIT_S)
    try:
        results.put(work(number, *arguments))
    except BaseException as error:  # noqa: BLE001  # the parent shows it
        results.put(repr(error))


def _get(_number: int, folder: Path, notes: Path, model: Path) -> tuple[str, str]:
    entry = fake_cache(folder, NotingBuilder(notes, 0.5)).get(model, dims=DIMS)
    return entry.outcome, str(entry.path)


def _rebuild(_number: int, folder: Path, notes: Path, model: Path, all_have_asked: Barrier) -> tuple[str, str]:
    cache = fake_cache(folder, NotingBuilder(notes))
    builds = cache._builds
    attempts = builds._attempts

    def asked(resolved):
        """Return the engine that a rebuild replaces: it is known before any of the others begins to build."""
        found = attempts(resolved)
        all_have_asked.wait(LIMIT_S)
        return found

    builds._attempts = asked
    entry = cache.get(model, dims=DIMS, rebuild=True)
    return entry.outcome, str(entry.path)


def _get_one_of_three(
    number: int, folder: Path, notes: Path, models: list[Path], all_build: Barrier
) -> tuple[str, str]:
    builder = NotingBuilder(notes, before=lambda _request: all_build.wait(LIMIT_S))
    entry = fake_cache(folder, builder).get(models[number % 3], dims=DIMS)
    return entry.outcome, str(entry.path)


@pytest.fixture
def verified(open_cache) -> EngineCache:
    """The cache that the processes use, verified when the test ends."""
    return open_cache()


@pytest.mark.rtx
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="probe: no module tensorrt_rtx")
def test_command_lines_on_a_cold_key_make_one_build(tmp_path):
    folder = tmp_path / "cache"
    command = [
        sys.executable,
        "-m",
        "enginecache",
        "get",
        EXAMPLE,
        "--dim",
        "batch=1:2:4",
        "--target",
        "sm_89",
        "--json",
    ]
    environment = os.environ | {"ENGINECACHE_DIR": str(folder)}
    herd = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(COMMAND_LINES)
    ]
    outputs = [process.communicate() for process in herd]
    assert [process.returncode for process in herd] == [0] * COMMAND_LINES, outputs
    shown = [json.loads(output) for output, _ in outputs]
    assert Counter(one["outcome"] for one in shown) == {"built": 1, "hit": COMMAND_LINES - 1}
    (path,) = {one["path"] for one in shown}
    assert Path(path).read_bytes().startswith(b"vtrt")
    with EngineCache.open(dir=folder) as cache:
        assert [build.state for build in cache.builds()] == ["succeeded"]
        assert len(list(cache.root.logs.iterdir())) == 1  # a log for each builder that was started
        found = cache.verify(deep=True)
    assert found.findings == ()
    assert found.young_orphans == ()


def test_processes_on_a_cold_key_of_a_new_folder_make_one_build(tmp_path, open_cache, model):
    notes = tmp_path / "notes"
    results = in_processes(_get, tmp_path / "cache", notes, model)
    assert Counter(outcome for outcome, _ in results) == {"built": 1, "hit": PROCESSES - 1}, results
    assert len({path for _, path in results}) == 1
    assert len(built_models(notes)) == 1
    assert [build.state for build in open_cache().builds()] == ["succeeded"]


def test_processes_on_different_keys_build_at_once(tmp_path, verified, model):
    models = [save(linear(seed=seed), tmp_path / f"model{seed}.onnx") for seed in range(3)]
    notes = tmp_path / "notes"
    # No build ends before all three have begun.
    results = in_processes(_get_one_of_three, tmp_path / "cache", notes, models, SPAWN.Barrier(3))
    assert Counter(outcome for outcome, _ in results) == {"built": 3, "hit": PROCESSES - 3}, results
    built = built_models(notes)
    assert len(set(built)) == len(built) == 3
    assert len(verified.entries()) == 3


def test_rebuilds_asked_for_together_share_a_build(tmp_path, verified, model):
    before = verified.get(model, dims=DIMS)
    notes = tmp_path / "notes"
    results = in_processes(_rebuild, tmp_path / "cache", notes, model, SPAWN.Barrier(PROCESSES))
    assert {path for _, path in results} == {str(before.path)}
    assert len(built_models(notes)) == 1
    assert Counter(outcome for outcome, _ in results) == {"built": 1, "hit": PROCESSES - 1}, results
    assert verified.get(model, dims=DIMS).record.created_at > before.record.created_at


def test_threads_on_a_cold_key_make_one_build(open_cache, model):
    builder = FakeBuilder(0.2)
    cache = open_cache(builder)
    together = threading.Barrier(THREADS)

    def get(_number: int):
        together.wait()
        return cache.get(model, dims=DIMS)

    with ThreadPoolExecutor(THREADS) as pool:
        entries = list(pool.map(get, range(THREADS)))
    assert builder.count == 1
    assert Counter(entry.outcome for entry in entries) == {"built": 1, "hit": THREADS - 1}
    assert len({entry.path for entry in entries}) == 1
    assert cache.stats().builds_succeeded == 1


def test_gets_prunes_removals_and_verifications_at_once_break_no_promise(open_cache, tmp_path):
    models = [save(linear(seed=seed), tmp_path / f"model{seed}.onnx") for seed in range(3)]
    cache = open_cache(FakeBuilder())
    is_over = threading.Event()

    def get(number: int) -> None:
        count = 0
        while not is_over.is_set() or count < 10:
            cache.get(models[(number + count) % 3], dims=DIMS, rebuild=count % 5 == 4)
            count += 1

    def shake(_number: int) -> None:
        for _ in range(10):
            for used in cache.entries():
                cache.remove(used.record)
            for path in cache.root.uses.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path, (0, 0))
            cache.execute_prune(cache.plan_prune(max_size_bytes=0))
            found = cache.verify(deep=True)
            assert found.findings == (), found

    with ThreadPoolExecutor(6) as pool:
        gets = [pool.submit(get, number) for number in range(4)]
        shakes = [pool.submit(shake, number) for number in range(2)]
        try:
            for done in shakes:
                done.result()
        finally:
            is_over.set()
        for done in gets:
            done.result()
    assert cache.stats().builds_failed == 0


def test_damage_under_a_herd_is_healed_and_never_served(open_cache, model):
    cache = open_cache(FakeBuilder())
    entry = cache.get(model, dims=DIMS)
    plan = entry.path.read_bytes()
    is_over = threading.Event()

    def get(_number: int) -> int:
        count = 0
        while not is_over.is_set():
            assert cache.get(model, dims=DIMS).digest == entry.digest
            count += 1
        return count

    def harm() -> None:
        for _ in range(20):
            bad = entry.path.with_name("bad")
            bad.write_bytes(plan[:-1] + b"?")
            bad.chmod(0o400)
            bad.replace(entry.path)  # a new inode, as a restored backup would be
            time.sleep(0.05)

    with ThreadPoolExecutor(5) as pool:
        gets = [pool.submit(get, number) for number in range(4)]
        try:
            pool.submit(harm).result()
        finally:
            is_over.set()
        assert all(done.result() > 0 for done in gets)
    assert cache.verify(deep=True, repair=True).is_clean
    assert cache.get(model, dims=DIMS).path.read_bytes() == plan


def test_hits_do_not_wait_while_another_key_is_built(open_cache, model, tmp_path):
    other = save(linear(seed=1), tmp_path / "other.onnx")
    go_on = threading.Event()
    cache = open_cache(FakeBuilder(before=lambda request: request.source.name == "other.onnx" and go_on.wait(LIMIT_S)))
    cache.get(model, dims=DIMS)
    with ThreadPoolExecutor(1) as pool:
        build = pool.submit(cache.get, other, dims=DIMS)
        try:
            key = cache.explain(other, dims=DIMS).key
            wait_for(lambda: cache.builds(key))
            assert cache.get(model, dims=DIMS, timeout_s=0.0).outcome == "hit"
            with pytest.raises(NotCachedError):
                cache.get(other, dims=DIMS, offline=True)
        finally:
            go_on.set()
        assert build.result().outcome == "built"
