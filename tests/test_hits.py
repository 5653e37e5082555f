"""A process gets its earlier hits again, as long as the full path would give the same."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import FakeBuilder, fake_place
from models import linear, save
from mounts import Image
from records import check_of

from enginecache.cache import EngineCache
from enginecache.config import Settings
from enginecache.errors import LoadError, NotCachedError, ProfileError
from enginecache.files import fingerprint
from enginecache.files.canonical import canonical_json
from enginecache.host import evidence
from enginecache.pipeline import hit_cache
from enginecache.pipeline.request import Request

ASK = {"dims": {"batch": (1, 2, 4)}}
SETTLE_NS = 50_000_000


@pytest.fixture(autouse=True)
def _short_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files come to rest within a moment: here no two changes fall into one tick of the clock."""
    monkeypatch.setattr(fingerprint, "SETTLE_NS", SETTLE_NS)


@pytest.fixture
def served(open_cache, model) -> EngineCache:
    """A cache that has handed the engine out so late that it is remembered."""
    cache = open_cache()
    cache.get(model, **ASK)
    time.sleep(SETTLE_NS / 1e9 + 0.05)
    cache.get(model, **ASK)
    assert is_recalled(cache, model)
    return cache


class Clock:
    """A process's time, which can be moved."""

    time_ns = staticmethod(time.time_ns)

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s

    def move(self, seconds: float = hit_cache.LOOK_EVERY_S) -> None:
        """Let so much time pass; default: until what an answer rests on is looked at again."""
        self.ahead_s += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(hit_cache, "time", clock)
    return clock


def is_recalled(cache: EngineCache, model, **ask) -> bool:
    return cache._hits.recall(cache._hits.name(model, ask or ASK)) is not None


def test_what_is_given_again_is_the_same_but_for_the_time_it_took(served, model, monkeypatch):
    long_way = EngineCache(served.config, builder=FakeBuilder(), place=served._place).get(model, **ASK)
    monkeypatch.setattr(served, "_resolve", None)
    started = time.monotonic()
    found = served.get(model, **ASK)
    assert found.to_json() | {"elapsed_seconds": 0} == long_way.to_json() | {"elapsed_seconds": 0}
    assert 0 <= found.elapsed_seconds <= time.monotonic() - started


def test_a_call_reads_no_file_of_the_model(served, model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", None)
        assert served.get(os.fspath(model), **ASK).outcome == "hit"


@pytest.mark.parametrize(
    "change",
    [
        lambda cache, path, entry: os.utime(path),
        lambda cache, path, entry: path.write_bytes(path.read_bytes()),
        lambda cache, path, entry: path.unlink(),
        lambda cache, path, entry: entry.path.unlink(),
        lambda cache, path, entry: entry.path.chmod(0o600),
        lambda cache, path, entry: cache.remove(entry.record),
    ],
    ids=["touched", "written", "deleted", "plan deleted", "plan's mode", "removed"],
)
def test_a_change_of_a_file_or_row_ends_it(served, model, change):
    entry = served.get(model, **ASK)
    change(served, model, entry)
    assert not is_recalled(served, model)
    assert not is_recalled(served, model)  # and it is forgotten
    if entry.path.exists():
        entry.path.chmod(0o400)
    served.verify(repair=True)


def test_another_image_in_the_models_place_is_seen_at_once(open_cache, tmp_path, monkeypatch):
    # Those of images are whole seconds, and years ago.
    (tmp_path / "image").mkdir()
    image = Image("overlay on squashfs", tmp_path / "image")
    cache = open_cache()
    try:
        model = image.replace("model.onnx", linear(seed=1).SerializeToString())
        first = cache.get(model, **ASK)
        time.sleep(SETTLE_NS / 1e9 + 0.05)
        cache.get(model, **ASK)
        assert is_recalled(cache, model)
        image.replace("model.onnx", linear(seed=2).SerializeToString())
        assert not is_recalled(cache, model)
        assert cache.get(model, **ASK).key != first.key
    finally:
        image.detach()


def test_the_plan_that_is_kept_is_one_that_was_checked(served, model, monkeypatch):
    served._hits._hits.clear()
    monkeypatch.setattr(type(served._storage.reader), "recall", lambda *_: None)  # it lies in another mount by now
    served.get(model, **ASK)
    assert not is_recalled(served, model)


def test_an_entry_that_another_process_removes_is_not_handed_out(served, model):
    entry = served.get(model, **ASK)
    other = EngineCache(served.config, builder=FakeBuilder(), place=served._place)
    other.remove(entry.record)
    assert not is_recalled(served, model)
    with pytest.raises(NotCachedError):
        served.get(model, **ASK, offline=True)


def test_a_rebuild_is_seen(served, model):
    old = served.get(model, **ASK)
    served.get(model, **ASK, rebuild=True)
    assert served.get(model, **ASK).record.build_id != old.record.build_id


def test_new_packages_gpus_and_settings_are_seen_within_a_second(served, model, monkeypatch, clock):
    monkeypatch.setattr(evidence, "LOOKS", {**evidence.LOOKS, "names": lambda path: b"0000:01:00.0"})
    assert is_recalled(served, model)
    clock.move()
    assert not is_recalled(served, model)


def test_a_new_search_path_of_modules_is_seen_within_a_second(served, model, monkeypatch, tmp_path, clock):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    clock.move()
    assert not is_recalled(served, model)


def test_a_relative_search_path_is_that_of_the_current_folder(served, model, monkeypatch, tmp_path, clock):
    clock.move()
    monkeypatch.chdir(tmp_path)
    assert not is_recalled(served, model)


@pytest.mark.parametrize("how", ["variable", "file", "new file"])
def test_changed_settings_are_those_of_the_next_second(model, monkeypatch, tmp_path, how, clock):
    file = tmp_path / "config.toml"
    file.write_text("cuda_major = 12\n")
    monkeypatch.setenv("ENGINECACHE_CONFIG", str(file))
    asked = []

    def place(backend, *args, cuda_major=None, **kwargs):
        asked.append((backend, cuda_major))
        return fake_place(backend, *args, **kwargs)

    settings = Settings({"dir": tmp_path / "cache"})
    cache = EngineCache(settings.config, builder=FakeBuilder(), place=place)
    cache._settings = settings
    cache.get(model, **ASK)
    time.sleep(SETTLE_NS / 1e9 + 0.05)
    cache.get(model, **ASK)
    assert is_recalled(cache, model)
    if how == "variable":
        monkeypatch.setenv("ENGINECACHE_BACKEND", "tensorrt-rtx")
    elif how == "file":
        file.write_text('backend = "tensorrt-rtx"\ncuda_major = 12\n')
    else:
        (tmp_path / "other.toml").write_text('backend = "tensorrt-rtx"\ncuda_major = 12\n')
        monkeypatch.setenv("ENGINECACHE_CONFIG", str(tmp_path / "other.toml"))
    clock.move()
    cache.get(model, **ASK)
    assert asked[-1] == ("tensorrt-rtx", 12)


def test_settings_that_become_unreadable_change_nothing(monkeypatch, tmp_path, caplog):
    file = tmp_path / "config.toml"
    file.write_text('backend = "tensorrt-rtx"\n')
    monkeypatch.setenv("ENGINECACHE_CONFIG", str(file))
    settings = Settings({"dir": tmp_path / "cache"})
    file.write_text('backend = "tensor')
    assert settings.refresh().backend == "tensorrt-rtx"
    assert "the former ones stay" in caplog.text
    file.write_text('backend = "tensorrt"\ndir = "/elsewhere"\n')
    assert (settings.refresh().backend, settings.config.dir) == ("tensorrt", tmp_path / "cache")


# The name of a request is made once


def meanwhile(cache: EngineCache, monkeypatch: pytest.MonkeyPatch, act) -> None:
    """Have something happen between the naming of the next request and its key."""
    identify = cache._memo.identify

    def first(*args, **kwargs):
        monkeypatch.setattr(cache._memo, "identify", identify)
        act()
        return identify(*args, **kwargs)

    monkeypatch.setattr(cache._memo, "identify", first)


def forget(cache: EngineCache) -> None:
    cache._hits._hits.clear()


def test_a_folder_changed_meanwhile_names_no_other_model(served, model, monkeypatch, tmp_path):
    other = save(linear(seed=9), tmp_path / "elsewhere" / model.name)
    theirs = served.get(other, **ASK).key
    time.sleep(SETTLE_NS / 1e9 + 0.05)
    forget(served)
    monkeypatch.chdir(model.parent)
    place = served._place
    monkeypatch.setattr(served, "_place", lambda *a, **k: (os.chdir(other.parent), place(*a, **k))[1])
    ours = served.get(model.name, **ASK).key
    monkeypatch.setattr(served, "_place", place)
    assert ours != theirs
    for folder, key in ((model.parent, ours), (other.parent, theirs)):
        monkeypatch.chdir(folder)
        assert served.get(model.name, **ASK).key == key


def test_values_that_another_thread_changes_meanwhile_are_those_of_the_call(served, model, monkeypatch):
    forget(served)
    dims = {"batch": [1, 2, 4]}
    resolve = served._resolve

    def change_and_resolve(request):
        dims["batch"][2] = 8
        return resolve(request)

    right = served.get(model, dims={"batch": [1, 2, 4]}).key
    forget(served)
    monkeypatch.setattr(served, "_resolve", change_and_resolve)
    assert served.get(model, dims=dims).key == right
    monkeypatch.setattr(served, "_resolve", resolve)
    assert served.get(model, dims=dims).key != right


def test_mapping_that_another_thread_adds_to_is_named_as_it_was(monkeypatch):
    dims = {"batch": (1, 2, 4), "width": 8}
    frozen = hit_cache._frozen

    def grow_and_freeze(value):
        dims[f"name {len(dims)}"] = 1
        return frozen(value)

    monkeypatch.setattr(hit_cache, "_frozen", grow_and_freeze)
    assert hit_cache._thawed(frozen(dims)) == {"batch": (1, 2, 4), "width": 8}


@pytest.mark.parametrize("change", ["sys.path", "environment", "settings"])
def test_what_changes_while_a_request_is_resolved_is_remembered_under_no_name(
    served, model, monkeypatch, tmp_path, change
):
    forget(served)

    def act():
        if change == "sys.path":
            monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        elif change == "environment":
            monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
        else:
            monkeypatch.setenv("ENGINECACHE_BACKEND", "tensorrt-rtx")

    meanwhile(served, monkeypatch, act)
    served.get(model, **ASK)
    assert served._hits._hits == {}


def test_what_load_builds_again_is_of_the_same_request(open_cache, model, monkeypatch, tmp_path):
    """The first plan is refused; by then the folder and the values are others."""
    cache = open_cache()
    save(linear(seed=9), tmp_path / "elsewhere" / model.name)
    monkeypatch.chdir(model.parent)
    dims = {"batch": [1, 2, 4]}
    loaded = []

    def load(record, *_args, **_kwargs):
        loaded.append(record.key)
        if len(loaded) == 1:
            os.chdir(tmp_path / "elsewhere")
            dims["batch"][2] = 8
            raise LoadError("TensorRT crashed on it")
        return "engine"

    monkeypatch.setattr(cache._loader, "load", load)
    assert cache.load(model.name, dims=dims) == "engine"
    assert len(loaded) == 2
    assert len(set(loaded)) == 1


def test_a_use_is_noted_every_second(served, model, clock):
    entry = served.get(model, **ASK)
    note = served.root.uses / entry.key
    clock.move()
    os.utime(note, (1, 1))
    served.get(model, **ASK)
    assert note.stat().st_mtime > 1


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "LD_LIBRARY_PATH"])
def test_a_variable_that_decides_the_gpu_is_part_of_the_request(served, model, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert not is_recalled(served, model)


def test_a_relative_path_is_that_of_this_folder(served, model, monkeypatch, tmp_path):
    monkeypatch.chdir(model.parent)
    served.get(model.name, **ASK)
    assert is_recalled(served, model.name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert not is_recalled(served, model.name)


@pytest.mark.parametrize(
    "ask",
    [
        {"dims": {"batch": (1.0, 2, 4)}},
        {"dims": {"batch": (True, 2, 4)}},
        {"dims": {"batch": (1, 2, 5)}},
        {"dims": {"batch": (1, 2, 4)}, "workspace_bytes": 1 << 30},
        {"dims": {"batch": (1, 2, 4)}, "rebuild": True},
        {"dims": {"batch": (1, 2, 4)}, "verify_model": True},
        {"dims": {"batch": (1, 2, 4)}, "no_such_keyword": 1},
    ],
    ids=str,
)
def test_another_request_is_another_request(served, model, ask):
    assert not is_recalled(served, model, **ask)


def test_values_that_can_be_read_only_once_are_not_remembered(served, model):
    precision = (name for name in ())
    served.get(model, **ASK, precision=precision)
    assert not is_recalled(served, model, **ASK, precision=precision)


def test_bytes_of_a_model_and_young_models_go_the_long_way(open_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "SETTLE_NS", 60_000_000_000)
    cache = open_cache()
    path = save(linear(seed=4), tmp_path / "young.onnx")
    for _ in range(2):
        cache.get(path, **ASK)
    assert not is_recalled(cache, path)
    for _ in range(2):
        cache.get(path.read_bytes(), **ASK)
    assert not is_recalled(cache, path.read_bytes())


def test_a_bad_request_is_refused_as_before(served, model):
    with pytest.raises(ProfileError):
        served.get(model, dims={"batch": (4, 2, 1)})


def test_there_is_a_limit(served, model, monkeypatch):
    monkeypatch.setattr(hit_cache, "MAX_HITS", 1)
    served.get(model, dims={"batch": (1, 2, 8)})
    time.sleep(SETTLE_NS / 1e9 + 0.05)
    served.get(model, dims={"batch": (1, 2, 8)})
    assert len(served._hits._hits) == 1


@pytest.mark.parametrize(
    ("changed_ns", "age_ns", "expected"),
    [
        (1_790_000_000_123_456_789, hit_cache.TICK_NS - 1_000_000, False),
        (1_790_000_000_123_456_789, hit_cache.TICK_NS, True),
        (1_790_000_000_000_000_000, 1_999_000_000, False),  # of a clock of whole seconds
        (1_790_000_000_000_000_000, 2_000_000_000, True),
    ],
)
def test_the_registry_is_asked_until_another_change_would_show(monkeypatch, changed_ns, age_ns, expected):
    monkeypatch.setattr(fingerprint, "SETTLE_NS", 2_000_000_000)
    monkeypatch.setattr(time, "time_ns", lambda: changed_ns + age_ns)
    assert hit_cache._are_settled((1, 4096, changed_ns, changed_ns - 5_000_000_000)) is expected


def test_the_row_is_asked_for_once_a_second_and_no_more_often(served, model, monkeypatch):
    time.sleep(SETTLE_NS / 1e9 + 0.05)
    asked = []
    monkeypatch.setattr(type(served._storage.reader), "is_current", lambda *of: asked.append(of) or True)
    now_s = time.monotonic() + hit_cache.LOOK_EVERY_S
    monkeypatch.setattr(hit_cache, "time", SimpleNamespace(monotonic=lambda: now_s, time_ns=time.time_ns))
    for seconds in range(1, 4):
        for _ in range(5):
            assert served.get(model, **ASK).outcome == "hit"
        assert len(asked) == seconds
        now_s += hit_cache.LOOK_EVERY_S


def test_hit_is_looked_up_anew_when_its_check_is_another(served, open_cache, model):
    entry = served.get(model, **ASK)
    failed = check_of(entry.digest, verdict="failed", reason="NaN")
    open_cache()._storage.record_check(entry.record, canonical_json(failed))
    again = served.get(model, **ASK)
    assert [reason.code for reason in again.reasons] == ["exact", "warning"]
    assert again.record.check == failed


def test_waiters_of_a_published_engine_do_not_take_the_lock(open_cache, model):
    cache, other = open_cache(), open_cache()
    resolved = cache._resolve(Request.of(model, ASK))
    asked = []

    def waiting(_waiting):
        if not asked:
            asked.append(True)
            # As another process would: it has the lock, publishes, and keeps the lock.
            other._publication.build(resolved)

    with cache._storage.locks.hold(resolved.key.digest, 0.0):
        entry = other.get(model, **ASK, waiting=waiting, timeout_s=30)
    assert entry.outcome == "hit"
    assert entry.reasons[0].code == "waited"


def test_who_waits_goes_on_waiting_while_the_registry_is_away(open_cache, model):
    cache = open_cache()
    entry = cache.get(model, **ASK)
    is_there = cache._hits.watch_for(entry.key)
    away = cache.root.registry_path.rename(cache.root.path / "registry.away")
    assert not is_there()
    away.rename(cache.root.registry_path)
    assert is_there()
