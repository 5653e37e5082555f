from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from fakes import FakeBuilder, fake_cache
from models import EXAMPLE, linear, save
from mounts import fill, free_bytes, small_disk

from enginecache.cache import EngineCache
from enginecache.config import Config
from enginecache.errors import RegistryError, StoreError
from enginecache.key.options import BuildOptions
from enginecache.model import ModelSource, identify
from enginecache.pipeline.publish import _plan_bytes
from enginecache.storage.folder import Root
from enginecache.storage.space import PLAN_TO_MODEL, RESERVE_BYTES, SLACK_BYTES, Reserve, needed_bytes, require_space
from enginecache.trt.build.process import ProcessBuilder

MIB = 1 << 20
ASK = {"dims": {"batch": (1, 2, 4)}}
WIDER = {"dims": {"batch": (1, 2, 8)}}


@pytest.fixture
def disk():
    with small_disk(40 * MIB) as folder:
        yield folder


@pytest.fixture
def open_on(disk, tmp_path):
    """Opens caches on the small disk; each is verified when the test ends, as the disk was left."""
    opened = []

    def open_one(builder=None, **settings):
        cache = fake_cache(disk / "cache", builder, **settings)
        opened.append(cache)
        return cache

    yield open_one
    (disk / "filling").unlink(missing_ok=True)
    for cache in opened:
        found = cache.verify(deep=True)
        assert found.is_clean, found
        assert found.young_orphans == (), found


def assert_nothing_is_left(cache: EngineCache) -> None:
    assert [path for path in cache.root.engines.rglob("*") if path.is_file()] == []
    assert list(cache.root.tmp.iterdir()) == []
    assert cache.entries() == []
    assert cache.verify(deep=True).is_clean


# The estimate


def plan_bytes(model, **options) -> int:
    """The estimate for the plan of a model."""
    source = ModelSource.of(model)
    resolved = mock.Mock(source=source, identity=identify(source))
    resolved.key.options = BuildOptions(**options)
    return _plan_bytes(resolved)


def test_what_a_build_needs_is_more_than_the_model_with_its_external_data_and_some_slack(tmp_path):
    model = linear(features=64)
    inline, outside = save(model, tmp_path / "a.onnx"), save(model, tmp_path / "b.onnx", external="b.bin")
    parts = outside.stat().st_size + (tmp_path / "b.bin").stat().st_size
    for path, size in ((inline, inline.stat().st_size), (outside, parts)):
        assert needed_bytes(plan_bytes(path)) == SLACK_BYTES + int(PLAN_TO_MODEL * size)
    assert needed_bytes(plan_bytes(inline.read_bytes())) == SLACK_BYTES + int(PLAN_TO_MODEL * inline.stat().st_size)


def test_a_stripped_plan_needs_no_room_for_weights(tmp_path):
    model = save(linear(features=64), tmp_path / "a.onnx")
    assert needed_bytes(plan_bytes(model, strip_plan=True)) == SLACK_BYTES


def test_too_little_room_is_an_error_with_both_numbers_and_what_to_do(disk, model):
    root = Root.open(disk / "cache")
    fill(disk, leave_bytes=10 * MIB)
    with pytest.raises(
        StoreError, match=r"model\.onnx: about 16(\.0)? ?MiB are needed in .*, and .* ?MiB are free"
    ) as caught:
        require_space(root, model.name, model.stat().st_size)
    assert "enginecache prune" in caught.value.fix
    assert "--dir" in caught.value.fix
    fill(disk).unlink()
    require_space(root, model.name, model.stat().st_size)


def test_a_missing_folder_is_an_error_and_not_a_traceback(tmp_path, model):
    with pytest.raises(StoreError):
        require_space(Root(tmp_path / "none"), model.name, model.stat().st_size)


# The reserve


@pytest.mark.parametrize("shared", ["", "group"])
def test_the_reserve_takes_up_its_room_with_the_mode_of_the_root(disk, shared):
    root = Root.open(disk / "cache", shared)
    before = free_bytes(disk)
    assert not Reserve(root).is_whole
    Reserve(root).keep()
    assert Reserve(root).is_whole
    assert free_bytes(disk) == before - RESERVE_BYTES
    assert Reserve(root).path.stat().st_mode & 0o777 == root.file_mode


def test_keeping_the_reserve_again_writes_nothing(tmp_path):
    root = Root.open(tmp_path / "cache")
    Reserve(root).keep()
    before = Reserve(root).path.stat()
    Reserve(root).keep()
    assert Reserve(root).path.stat() == before


def test_the_reserve_is_free_while_it_is_lent_and_comes_back(disk):
    root = Root.open(disk / "cache")
    Reserve(root).keep()
    fill(disk)
    assert free_bytes(disk) == 0
    with Reserve(root).lent(), Reserve(root).lent():
        assert free_bytes(disk) == RESERVE_BYTES
    assert not Reserve(root).is_whole  # nothing was freed: what little there is stays free
    assert free_bytes(disk) == RESERVE_BYTES
    fill(disk).unlink()
    with Reserve(root).lent():
        assert not Reserve(root).is_whole
    assert Reserve(root).is_whole


def test_the_reserve_comes_back_after_an_error_too(tmp_path):
    root = Root.open(tmp_path / "cache")
    Reserve(root).keep()
    with pytest.raises(KeyboardInterrupt), Reserve(root).lent():
        raise KeyboardInterrupt
    assert Reserve(root).is_whole


def test_a_reserve_that_has_a_second_name_outside_is_neither_emptied_nor_filled(tmp_path):
    mine = tmp_path / "mine"
    mine.write_bytes(b"precious")
    mine.chmod(0o644)
    root = Root.open(tmp_path / "cache")
    reserve = Reserve(root)
    os.link(mine, reserve.path)
    with reserve.lent():
        assert mine.read_bytes() == b"precious"
    assert (mine.read_bytes(), mine.stat().st_mode & 0o777) == (b"precious", 0o644)


def test_a_link_in_the_place_of_the_reserve_is_not_followed(tmp_path):
    root = Root.open(tmp_path / "cache")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    Reserve(root).path.symlink_to(victim)
    Reserve(root).keep()
    with Reserve(root).lent():
        pass
    assert victim.read_text() == "precious"
    assert not Reserve(root).is_whole


def test_a_build_sets_the_reserve_aside_and_a_hit_does_not(open_cache, model):
    cache = open_cache()
    assert not Reserve(cache.root).is_whole
    cache.get(model, **ASK)
    assert Reserve(cache.root).is_whole
    Reserve(cache.root).path.unlink()
    assert cache.get(model, **ASK).outcome == "hit"
    assert not Reserve(cache.root).path.exists()


# A full disk, at every stage


def test_on_a_full_disk_a_hit_is_served_and_a_miss_says_so_and_leaves_nothing(open_on, disk, model):
    cache = open_on()
    stored = cache.get(model, **ASK)
    fill(disk)
    again = cache.get(model, **ASK)
    assert (again.outcome, again.path) == ("hit", stored.path)
    builds = len(cache.builds())
    with pytest.raises(StoreError, match="too little room"):
        cache.get(model, **WIDER)
    assert len(cache.builds()) == builds
    assert list(cache.root.tmp.iterdir()) == []
    assert [used.record.key for used in cache.entries()] == [stored.record.key]
    fill(disk).unlink()
    assert cache.get(model, **WIDER).outcome == "built"


def test_a_registry_on_a_full_disk_cannot_be_written_without_the_reserve_and_can_with_it(open_on, disk, model):
    cache = open_on()
    record = cache.get(model, **ASK).record
    fill(disk)
    with pytest.raises(RegistryError, match="disk is full") as caught:
        cache.pin(record)
    assert "enginecache prune" in caught.value.fix
    with Reserve(cache.root).lent():
        cache.pin(record)
        cache.unpin(record)


def test_with_the_reserve_a_full_disk_is_pruned_and_builds_again(open_on, disk, model):
    cache = open_on(FakeBuilder(size_bytes=8 * MIB))
    record = cache.get(model, **ASK).record
    os.utime(cache.root.uses / record.key, (0, 0))
    fill(disk)
    with Reserve(cache.root).lent():
        freed = cache.execute_prune(cache.plan_prune(older_than_s=60.0))
    assert freed == 8 * MIB
    assert free_bytes(disk) >= 7 * MIB
    assert Reserve(cache.root).is_whole
    fill(disk).unlink()
    assert cache.get(model, **ASK).outcome == "built"


@pytest.fixture
def full(open_on, disk, model):
    """A cache with one engine, on a disk without a byte left."""
    cache = open_on(FakeBuilder(size_bytes=8 * MIB))
    record = cache.get(model, **ASK).record
    os.utime(cache.root.uses / record.key, (0, 0))
    fill(disk)
    assert free_bytes(disk) == 0
    return cache


def test_prune_works_on_a_full_disk_and_the_next_get_builds(full, model, disk):
    assert full.execute_prune(full.plan_prune(older_than_s=60.0)) == 8 * MIB
    assert full.entries() == []
    assert free_bytes(disk) >= 7 * MIB
    fill(disk).unlink()
    assert full.get(model, **ASK).outcome == "built"
    assert Reserve(full.root).is_whole


def test_rm_works_on_a_full_disk(full):
    (used,) = full.entries()
    assert full.remove(used.record) == 8 * MIB
    assert Reserve(full.root).is_whole


def test_a_repair_works_on_a_full_disk(full):
    (used,) = full.entries()
    full.path(used.record).unlink()
    fill(full.root.path.parent)
    found = full.verify(repair=True)
    assert [(finding.kind, finding.is_repaired) for finding in found.findings] == [("dangling", True)]
    assert full.entries() == []


def eater(disk: Path, leave_bytes: int):
    """Takes up the disk in the middle of a build."""
    return lambda _request: fill(disk, leave_bytes=leave_bytes)


def test_a_plan_that_fits_is_stored_without_room_for_a_copy_of_it(open_on, disk, model):
    cache = open_on(FakeBuilder(size_bytes=8 * MIB, before=eater(disk, 9 * MIB)))
    assert cache.get(model, **ASK).outcome == "built"


def test_a_disk_that_fills_up_before_the_commit_is_an_error_and_leaves_nothing(open_on, disk, model, monkeypatch):
    cache = open_on()
    publish = cache._storage.blobs.publish

    def publish_and_fill(staged):
        path = publish(staged)
        fill(disk)
        return path

    monkeypatch.setattr(cache._storage.blobs, "publish", publish_and_fill)
    with pytest.raises(RegistryError, match="disk is full"):
        cache.get(model, **ASK)
    monkeypatch.undo()
    assert_nothing_is_left(cache)
    fill(disk).unlink()
    assert cache.get(model, **ASK).outcome == "built"


@pytest.mark.rtx
def test_a_disk_that_fills_up_under_a_real_builder_is_an_error_that_says_so_and_leaves_nothing(disk):
    with EngineCache.open(dir=disk / "cache") as cache:
        eaten = []

        def eat(progress):
            if progress.phase == "Building engine" and not eaten:
                eaten.append(fill(disk))

        with pytest.raises(StoreError) as caught:
            cache.get(EXAMPLE, dims={"batch": (1, 2, 4)}, target="sm_89", progress=eat)
        assert eaten, "the builder said no progress"
        assert "No space left on device" in str(caught.value)
        (build,) = cache.builds()
        assert (build.state, "No space left on device" in build.reason) == ("failed", True)
        fill(disk).unlink()
        assert_nothing_is_left(cache)
        assert cache.get(EXAMPLE, dims={"batch": (1, 2, 4)}, target="sm_89").outcome == "built"


@pytest.mark.rtx
def test_a_disk_that_is_full_before_a_real_builder_writes_its_log_is_no_fault_of_the_model(disk):
    """It must not be remembered as one: the next get would be refused for an hour."""

    class Eating(ProcessBuilder):
        def build(self, request, progress=None):
            fill(disk)
            return super().build(request, progress)

    ask = {"dims": {"batch": (1, 2, 4)}, "target": "sm_89"}
    cache = EngineCache(Config(dir=disk / "cache"), builder=Eating())
    with pytest.raises(StoreError, match="full"):
        cache.get(EXAMPLE, **ask)
    (build,) = cache.builds()
    assert (build.state, build.is_lasting) == ("failed", False)
    fill(disk).unlink()
    with EngineCache.open(dir=disk / "cache") as opened:
        assert opened.get(EXAMPLE, **ask).outcome == "built"


def run_limited(code: str, folder: Path, size_bytes: int) -> subprocess.CompletedProcess[str]:
    """Python whose files may not grow past a size, as under ``ulimit -f``."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size_bytes}, {size_bytes}))\n"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "support")}
    return subprocess.run(
        [sys.executable, "-c", limit + code, folder], capture_output=True, text=True, env=environment, check=False
    )


def test_a_limit_on_the_size_of_files_is_reported_as_such(open_cache, model):
    cache = open_cache()
    record = cache.get(model, **ASK).record
    code = (
        "import sys; from pathlib import Path; from fakes import fake_cache\n"
        "from enginecache.errors import RegistryError\n"
        "cache = fake_cache(Path(sys.argv[1]))\n"
        f"try: cache.pin(cache.find({record.key!r}))\n"
        "except RegistryError as error: print(error)\n"
    )
    ran = run_limited(code, cache.root.path, 4096)
    assert "disk I/O error" in ran.stdout, ran.stderr
    assert "ulimit -f" in ran.stdout
    assert "quota" in ran.stdout


def test_a_file_system_without_inodes_refuses_the_build_before_it_and_names_them(tmp_path, model, monkeypatch):
    cache = fake_cache(tmp_path / "cache")
    monkeypatch.setattr("enginecache.storage.space.free_inodes", lambda _: 3)
    with pytest.raises(StoreError, match="too little room to build") as caught:
        cache.get(model, **ASK)
    assert "enginecache prune" in caught.value.fix
    assert cache.builds() == []
