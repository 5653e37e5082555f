from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import FakeBuilder, fake_cache

from enginecache.cache import EngineCache
from enginecache.errors import BuildError, RegistryError, StoreError

ASK = {"dims": {"batch": (1, 2, 4)}}
WIDER = {"dims": {"batch": (1, 2, 8)}}


class NumberedBuilder(FakeBuilder):
    """Every plan has other bytes, unless all are to be the same."""

    same = False

    def build(self, request, progress=None):
        built = super().build(request, progress)
        built.plan_path.write_bytes(b"plan" if self.same else f"plan {self.count}".encode())
        return built


def fail_with(error: BaseException):
    def fail(_request):
        raise error

    return FakeBuilder(before=fail)


def files_in(cache: EngineCache, name: str) -> list[str]:
    return sorted(path.name for path in (cache.root.path / name).rglob("*") if path.is_file())


def assert_nothing_is_left_but_the_attempt(cache: EngineCache) -> None:
    assert files_in(cache, "engines") == []
    assert list(cache.root.tmp.iterdir()) == []
    assert cache.entries() == []
    assert [path.suffix for path in cache.root.locks.iterdir() if path.suffix != ".lock"] == []
    (build,) = cache.builds()
    assert build.state == "failed"


def test_a_published_entry_says_where_it_comes_from(open_cache, model):
    cache = open_cache()
    record = cache.get(model, **ASK).record
    (build,) = cache.builds()
    assert (record.build_id, record.key, build.state) == (build.id, build.key, "succeeded")
    assert (record.model_name, record.tensorrt_version) == ("model.onnx", "1.7.1.116")
    assert record.size_bytes == cache.path(record).stat().st_size
    assert record.build_seconds == build.build_seconds
    assert cache.log_path(build).read_text() == "a fake build\n"
    assert list(cache.root.tmp.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BuildError("TensorRT refused node 7", "Change it."), "TensorRT refused node 7"),
        (OSError(errno.ENOSPC, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(3), "SystemExit: 3"),
    ],
)
def test_a_failing_builder_leaves_its_reason_and_its_log_and_nothing_else(open_cache, model, error, reason):
    cache = open_cache(fail_with(error))
    with pytest.raises(type(error)) as caught:
        cache.get(model, **ASK)
    assert caught.value is error
    assert_nothing_is_left_but_the_attempt(cache)
    (build,) = cache.builds()
    assert build.reason == reason
    assert cache.log_path(build).read_text() == "a fake build\n"
    assert open_cache().get(model, **ASK).outcome == "built"


def test_a_builder_without_a_plan_is_a_failed_attempt(open_cache, model):
    class Forgetful(FakeBuilder):
        def build(self, request, progress=None):
            built = super().build(request, progress)
            built.plan_path.unlink()
            return built

    cache = open_cache(Forgetful())
    with pytest.raises(StoreError, match="cannot be stored"):
        cache.get(model, **ASK)
    assert_nothing_is_left_but_the_attempt(cache)


def test_a_store_that_cannot_publish_leaves_a_failed_attempt_and_no_row(open_cache, model):
    cache = open_cache()
    cache.root.engines.rmdir()
    cache.root.engines.touch()
    with pytest.raises(StoreError, match="cannot be stored"):
        cache.get(model, **ASK)
    cache.root.engines.unlink()
    cache.root.engines.mkdir(mode=0o700)
    assert_nothing_is_left_but_the_attempt(cache)


def test_a_registry_that_fails_at_the_commit_leaves_no_row_and_no_blob(open_cache, model):
    cache = open_cache()

    def lose_the_attempt(_request):
        with cache._database.writing() as connection:
            connection.exec_driver_sql("DELETE FROM builds")  # the entry's foreign key now fails

    cache._publication._builder.before = lose_the_attempt
    with pytest.raises(RegistryError, match="FOREIGN KEY"):
        cache.get(model, **ASK)
    assert cache.entries() == []
    assert list(cache.root.tmp.iterdir()) == []
    assert files_in(cache, "engines") == []
    cache._publication._builder.before = None
    assert cache.get(model, **ASK).outcome == "built"


def test_a_registry_that_fails_at_the_commit_keeps_the_blob_that_another_entry_names(open_cache, model):
    builder = NumberedBuilder()
    builder.same = True
    cache = open_cache(builder)
    other = cache.get(model, **WIDER)

    def fail(*_args):
        raise RegistryError("the disk is full")

    publish, cache._registry.publish = cache._registry.publish, fail
    with pytest.raises(RegistryError, match="full"):
        cache.get(model, **ASK)
    cache._registry.publish = publish
    assert other.path.read_bytes() == b"plan"
    assert cache.get(model, **WIDER).outcome == "hit"


def test_a_registry_that_fails_while_a_failure_is_recorded_does_not_hide_it(tmp_path, model):
    """Without ``open_cache``: the registry is gone in the end."""
    cache = fake_cache(tmp_path / "cache", fail_with(BuildError("the first error")))
    fail = cache._publication._builder.before

    def spoil_and_fail(request):
        cache.root.registry_path.write_bytes(b"no database any more" * 100)
        fail(request)

    cache._publication._builder.before = spoil_and_fail
    with pytest.raises(BuildError, match="the first error"):
        cache.get(model, **ASK)


def test_a_replaced_entrys_blob_is_young_garbage(open_cache, model):
    cache = open_cache(NumberedBuilder())
    old = cache.get(model, **ASK)
    new = cache.get(model, **ASK, rebuild=True)
    assert new.digest != old.digest
    assert files_in(cache, "engines") == sorted([f"{new.digest}.engine", f"{old.digest}.engine"])
    assert [item.path for item in cache.verify().young_garbage] == [old.path]
    assert cache.totals().blobs == 1


def test_a_replaced_entrys_blob_stays_while_another_entry_shares_it(open_cache, model):
    builder = NumberedBuilder()
    builder.same = True
    cache = open_cache(builder)
    shared, other = cache.get(model, **ASK), cache.get(model, **WIDER)
    assert shared.digest == other.digest
    builder.same = False
    cache.get(model, **ASK, rebuild=True)
    assert other.path.read_bytes() == b"plan"
    assert cache.get(model, **WIDER).outcome == "hit"


def test_a_rebuild_of_equal_bytes_keeps_the_blob(open_cache, model):
    cache = open_cache()
    old, new = cache.get(model, **ASK), cache.get(model, **ASK, rebuild=True)
    assert (old.digest, old.path) == (new.digest, new.path)
    assert new.path.exists()


def test_an_old_blob_that_cannot_be_deleted_is_garbage_and_the_build_a_success(open_cache, model):
    cache = open_cache(NumberedBuilder())
    old = cache.get(model, **ASK).path
    old.unlink()
    (old / "in the way").mkdir(parents=True)
    new = cache.get(model, **ASK, rebuild=True)
    assert new.path.read_bytes() == b"plan 2"
    assert [build.state for build in cache.builds()] == ["succeeded", "succeeded"]
    cache.verify(repair=True)


def test_an_interrupt_after_the_commit_leaves_a_success(open_cache, model):
    cache = open_cache(NumberedBuilder())
    cache.get(model, **ASK)
    retire = cache._store.retire

    def interrupted(digest):
        retire(digest)
        raise KeyboardInterrupt

    cache._store.retire = interrupted
    with pytest.raises(KeyboardInterrupt):
        cache.get(model, **ASK, rebuild=True)
    assert [build.state for build in cache.builds()] == ["succeeded", "succeeded"]
    assert cache.get(model, **ASK).outcome == "hit"


CRASH = """
import os, signal, sys
from pathlib import Path
from fakes import fake_cache
cache = fake_cache(Path(sys.argv[1]))
owner, method, when = sys.argv[3:]
target = getattr(cache, owner)
original = getattr(target, method)
def crash(*args, **kwargs):
    if when == "after":
        original(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(target, method, crash)
cache.get(sys.argv[2], dims={"batch": (1, 2, 4)})
"""


@pytest.mark.parametrize(
    ("owner", "method", "when", "blobs", "entries"),
    [
        ("_store", "stage", "before", 0, 0),
        ("_store", "publish", "before", 0, 0),
        ("_store", "publish", "after", 1, 0),
        ("_registry", "publish", "before", 1, 0),
        ("_registry", "publish", "after", 1, 1),
    ],
)
def test_a_crash_leaves_a_blob_without_a_row_but_never_a_row_without_a_blob(
    open_cache, model, owner, method, when, blobs, entries
):
    cache = open_cache()
    path = os.pathsep.join([str(Path(__file__).parent / "support"), *sys.path])
    died = subprocess.run(
        [sys.executable, "-c", CRASH, str(cache.root.path), str(model), owner, method, when],
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert died.returncode == -signal.SIGKILL
    assert (len(files_in(cache, "engines")), len(cache.entries())) == (blobs, entries)
    assert cache.verify(deep=True).is_clean
    assert cache.get(model, **ASK).outcome == ("hit" if entries else "built")
    states = sorted(build.state for build in cache.builds())
    assert states == (["succeeded"] if entries else ["abandoned", "succeeded"])
    cache.config = dataclasses.replace(cache.config, grace_s=0.0)
    cache.verify(repair=True)
    assert list(cache.root.tmp.iterdir()) == []
