"""A TensorRT-RTX engine for more GPUs than asked is a hit: prebuilt for all of them, found by each."""

from __future__ import annotations

import contextlib
import os
import shutil
import time

import pytest
from fakes import FakeBuilder
from models import linear, save

from enginecache.cache import EngineCache
from enginecache.config import Config
from enginecache.errors import LoadError, NotCachedError
from enginecache.files import fingerprint
from enginecache.pipeline.request import Request
from enginecache.pipeline.results import Entry

SHAPES = {"dims": {"batch": (1, 2, 4)}}
BOTH = {**SHAPES, "target": ["sm_86", "sm_89"]}
ONE = {**SHAPES, "target": "sm_86"}
SETTLE_NS = 50_000_000


@pytest.fixture
def builder():
    return FakeBuilder()


@pytest.fixture
def cache(open_cache, builder, monkeypatch):
    # Files come to rest within a moment: here no two changes fall into one tick of the clock.
    monkeypatch.setattr(fingerprint, "SETTLE_NS", SETTLE_NS)
    return open_cache(builder)


def codes(entry):
    return [reason.code for reason in entry.reasons]


def damage(path):
    path.chmod(0o600)
    path.write_bytes(b"!" + path.read_bytes()[1:])


def test_an_engine_for_more_targets_is_a_hit_that_names_its_reach_and_both_keys(cache, builder, model):
    stored = cache.get(model, **BOTH)
    found = cache.get(model, **ONE, offline=True)
    assert (found.outcome, found.key, found.digest, codes(found)) == ("hit", stored.key, stored.digest, ["wider_reach"])
    assert found.requested_key != found.key
    assert "8.6, 8.9" in found.reasons[0].text
    record = found.to_json()
    assert (record["key"], record["requested_key"]) == (stored.key, found.requested_key)
    assert record["compute_capabilities"] == ["8.6", "8.9"]
    assert (builder.count, cache.stats().misses) == (1, 1)


def test_explain_says_hit_as_get_does(cache, model):
    stored = cache.get(model, **BOTH)
    explained = cache.explain(model, **ONE)
    assert (explained.verdict, explained.entry) == ("hit", stored.record)
    assert codes(explained) == ["wider_reach"]
    record = explained.to_json()
    assert (record["key"], record["digest"]) == (stored.key, stored.digest)
    assert record["requested_key"] == cache.get(model, **ONE).requested_key
    assert [(c["verdict"], c["reasons"][0]["code"]) for c in record["candidates"]] == [("exact", "wider_reach")]


def test_the_engine_for_exactly_the_asked_targets_comes_first(cache, model):
    cache.get(model, **BOTH)
    own = cache.get(model, **ONE, rebuild=True)
    assert (own.outcome, own.key) == ("built", own.requested_key)
    found = cache.get(model, **ONE)
    assert (found.key, codes(found)) == (own.key, ["exact"])


def test_of_several_the_narrowest_comes_first_and_of_these_the_newest(cache, model):
    for target in ("portable", ["sm_80", "sm_86"], ["sm_86", "sm_89"], ["sm_86", "sm_89", "sm_120"]):
        cache.get(model, **SHAPES, target=target, rebuild=True)
    assert cache.stats().entries == 4
    assert cache.get(model, **ONE).record.compute_capabilities == ("8.6", "8.9")


def test_portable_is_not_served_by_a_narrower_engine_and_serves_its_targets(cache, model):
    cache.get(model, **SHAPES, target=["sm_80", "sm_86", "sm_89"])
    portable = cache.get(model, **SHAPES, target="portable")
    assert portable.outcome == "built"
    assert cache.get(model, **SHAPES, target="sm_121").key == portable.key
    assert cache.get(model, **SHAPES, target="sm_75").outcome == "built"


@pytest.mark.parametrize(
    "changes", [{"dims": {"batch": (1, 2, 5)}}, {"workspace_bytes": 1 << 30}, {"dims": {"batch": (1, 2, 3)}}]
)
def test_an_engine_that_differs_in_anything_else_is_a_miss(cache, model, changes):
    cache.get(model, **BOTH)
    with pytest.raises(NotCachedError):
        cache.get(model, **{**ONE, **changes}, offline=True)


def test_another_models_engine_of_a_wider_reach_is_a_miss(cache, model, tmp_path):
    cache.get(model, **BOTH)
    assert cache.get(save(linear(seed=9), tmp_path / "other.onnx"), **ONE).outcome == "built"


def test_a_damaged_engine_of_a_wider_reach_is_set_aside_and_the_next_serves(cache, model):
    narrow, wide = cache.get(model, **BOTH), cache.get(model, **SHAPES, target="portable")
    damage(narrow.path)
    found = cache.get(model, **ONE)
    assert (found.key, codes(found)) == (wide.key, ["wider_reach", "corrupt"])
    damage(wide.path)
    built = cache.get(model, **ONE)
    assert (built.outcome, codes(built)) == ("built", ["corrupt"])
    assert len(list(cache.root.quarantine.iterdir())) == 2


def test_where_the_exact_engine_is_damaged_one_of_a_wider_reach_serves(cache, model):
    wide = cache.get(model, **BOTH)
    damage(cache.get(model, **ONE, rebuild=True).path)
    found = cache.get(model, **ONE, offline=True)
    assert (found.outcome, found.key, codes(found)) == ("hit", wide.key, ["wider_reach", "corrupt"])
    assert found.to_json()["outcome"] == "hit"


def test_a_hit_of_a_wider_reach_is_a_use_of_the_stored_engine(cache, model):
    stored = cache.get(model, **BOTH)
    use = cache.root.uses / stored.key
    os.utime(use, (1.0, 1.0))
    asked = cache.get(model, **ONE)
    assert use.stat().st_mtime > 1.0
    assert not (cache.root.uses / asked.requested_key).exists()


def recalled(cache, model):
    """Return the hit that the process repeats without reading the registry's rows, once the registry has settled."""
    time.sleep(SETTLE_NS / 1e9 + 0.05)
    cache.get(model, **ONE)
    return cache._hits.recall(cache._hits.name(model, ONE))


def test_a_process_gives_a_wider_engine_again_until_a_better_one_is_there(cache, open_cache, builder, model):
    wide = cache.get(model, **SHAPES, target="portable")
    assert recalled(cache, model).key == wide.key
    other = open_cache(builder)
    narrow = other.get(model, **BOTH, rebuild=True)
    assert narrow.key != wide.key
    assert cache.get(model, **ONE).key == narrow.key
    assert recalled(cache, model).key == narrow.key
    own = other.get(model, **ONE, rebuild=True)
    assert cache.get(model, **ONE).key == own.key
    assert recalled(cache, model).key == own.key


def test_a_process_sees_that_the_wider_engine_was_removed(cache, open_cache, model):
    stored = cache.get(model, **BOTH)
    assert recalled(cache, model) is not None
    open_cache().remove(stored.record)
    with pytest.raises(NotCachedError):
        cache.get(model, **ONE, offline=True)


def test_an_engine_of_a_wider_reach_that_appears_while_waiting_is_served(cache, open_cache, builder, model):
    other = open_cache(builder)

    def publish_wider(_waiting):
        other.get(model, **BOTH)
        held.close()

    key = cache._resolve(Request.of(model, ONE)).key.digest
    held = contextlib.ExitStack()
    held.enter_context(other._storage.locks.hold(key, 0.0))
    found = cache.get(model, **ONE, waiting=publish_wider)
    assert (found.outcome, codes(found)) == ("hit", ["waited", "wider_reach", "absent"])
    assert builder.count == 1


def test_load_takes_an_engine_of_a_wider_reach_and_after_a_bad_one_the_next(cache, builder, model, monkeypatch):
    narrow, wide = cache.get(model, **BOTH), cache.get(model, **SHAPES, target="portable")
    loaded = []

    def load(entry, **_):
        loaded.append(entry.key)
        if entry.key == narrow.key:
            cache._storage.quarantine(entry.record, "TensorRT refuses it")
            raise LoadError("TensorRT refuses it")
        return "an engine"

    monkeypatch.setattr(Entry, "load", load)
    assert cache.load(model, **ONE) == "an engine"
    assert loaded == [narrow.key, wide.key]
    assert builder.count == 2


@pytest.mark.rtx
def test_the_real_builders_plan_for_several_targets_is_a_hit_for_each(tmp_path):
    """TensorRT-RTX itself says what its plan reaches."""
    pytest.importorskip("tensorrt_rtx")
    path = save(linear(seed=1), tmp_path / "model.onnx")
    cache = EngineCache(Config(dir=tmp_path / "cache"))
    stored = cache.get(path, **BOTH)
    for target in ("sm_86", "8.9"):
        found = cache.get(path, **SHAPES, target=target, offline=True)
        assert (found.outcome, found.digest, codes(found)) == ("hit", stored.digest, ["wider_reach"])
    with pytest.raises(NotCachedError):
        cache.get(path, **SHAPES, target="sm_80", offline=True)
    portable = cache.get(path, **SHAPES, target="portable")
    assert cache.get(path, **SHAPES, target="sm_120", offline=True).digest == portable.digest
    assert cache.verify(deep=True).is_clean


def test_a_copied_folder_serves_what_was_prebuilt(cache, open_cache, model, tmp_path):
    stored = cache.get(model, **BOTH)
    shutil.copytree(cache.root.path, tmp_path / "on the node")
    found = open_cache(folder=tmp_path / "on the node").get(model, **ONE, offline=True)
    assert (found.outcome, found.digest) == ("hit", stored.digest)
    assert found.path.is_relative_to(tmp_path / "on the node")


def test_a_rebuild_builds_for_exactly_the_asked_targets(cache, builder, model):
    cache.get(model, **BOTH)
    rebuilt = cache.get(model, **ONE, rebuild=True)
    assert (rebuilt.outcome, rebuilt.key, rebuilt.record.compute_capabilities) == (
        "built",
        rebuilt.requested_key,
        ("8.6",),
    )
    assert builder.count == 2
