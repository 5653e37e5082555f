from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
from fakes import ConstantBuilder, fake_cache

from enginecache.cache import EngineCache
from enginecache.errors import RegistryError
from enginecache.files.digest import digest_of
from enginecache.pipeline.lookup import Lookup, Match, Miss
from enginecache.pipeline.request import Request
from enginecache.storage.storage import _LOCK as STORE_LOCK
from enginecache.storage.storage import Storage

ASK = {"dims": {"batch": (1, 2, 4)}}
WIDER = {"dims": {"batch": (1, 2, 8)}}


def key_of(cache: EngineCache, model: Path, ask=None):
    return cache._resolve(Request.of(model, ASK if ask is None else ask)).key


def rewrite(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)
    path.chmod(0o400)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    rewrite(path, data)


def cut_short(path: Path) -> None:
    rewrite(path, path.read_bytes()[:-1])


def empty(path: Path) -> None:
    rewrite(path, b"")


def remove(path: Path) -> None:
    path.unlink()


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").touch()


def link_to_equal_bytes(path: Path) -> None:
    elsewhere = path.parents[3] / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DAMAGE = {
    flip_a_bit: "do not have the digest",
    cut_short: "size is not the one",
    empty: "size is not the one",
    remove: "file is missing",
    make_a_folder: "file is missing",
    link_to_equal_bytes: "file is missing",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_corrupt_blob_is_a_miss_and_is_quarantined_with_the_reason(open_cache, model, damage):
    cache = open_cache()
    entry = cache.get(model, **ASK)
    damage(entry.path)
    found = cache._lookup.find(key_of(cache, model))
    assert isinstance(found, Miss)
    (reason,) = found.reasons
    assert reason.code == "corrupt"
    assert DAMAGE[damage] in reason.text
    kept = list(cache.root.quarantine.iterdir())
    assert len(kept) == (damage is not remove)
    assert all(str(path) in reason.text for path in kept)
    assert cache.entries() == []
    lost, absent = cache._lookup.find(key_of(cache, model)).reasons
    assert (lost.code, absent.code) == ("set_aside", "absent")
    assert "its engine was found damaged and set aside at 20" in lost.text
    assert DAMAGE[damage] in lost.text
    again = cache.get(model, **ASK)
    assert (again.outcome, again.digest) == ("built", entry.digest)


def test_a_damaged_blob_that_two_entries_share_is_forgotten_for_both(open_cache, model):
    builder = ConstantBuilder()
    cache = open_cache(builder)
    first, second = cache.get(model, **ASK), cache.get(model, **WIDER)
    assert first.path == second.path
    flip_a_bit(first.path)
    assert cache._lookup.find(key_of(cache, model)).reasons[0].code == "corrupt"
    assert cache.entries() == []
    assert len(list(cache.root.quarantine.iterdir())) == 1
    assert [cache.get(model, **ask).outcome for ask in (ASK, WIDER)] == ["built", "built"]
    assert builder.count == 4


def test_a_whole_blob_is_found_and_a_forced_check_reads_it(open_cache, model):
    cache = open_cache()
    record = cache.get(model, **ASK).record
    assert cache._lookup.find(key_of(cache, model)) == Match(record)
    assert cache._lookup.find(key_of(cache, model), force_check=True) == Match(record)


class BeforeTheLock:
    """Locks that let another process act after a damaged blob was seen and before it is set aside."""

    def __init__(self, cache: EngineCache, act) -> None:
        self._locks = cache._storage.locks
        self._act = act
        cache._storage.locks = self

    def hold(self, name, *arguments):
        if name == STORE_LOCK and self._act is not None:
            act, self._act = self._act, None
            act()
        return self._locks.hold(name, *arguments)


def test_a_blob_that_another_process_healed_meanwhile_is_served_and_not_quarantined(open_cache, model):
    cache = open_cache()
    entry = cache.get(model, **ASK)
    healed = cache._storage.blobs.stage(entry.path)
    flip_a_bit(entry.path)
    BeforeTheLock(cache, lambda: cache._storage.blobs.publish(healed))
    found = cache._lookup.find(key_of(cache, model))
    assert isinstance(found, Match)
    assert found.record.digest == entry.digest
    assert len(list(cache.root.quarantine.iterdir())) == 0


def test_an_entry_that_another_process_rebuilt_with_other_bytes_meanwhile_is_served(open_cache, model):
    cache, other = open_cache(), open_cache(ConstantBuilder())
    entry = cache.get(model, **ASK)
    flip_a_bit(entry.path)
    BeforeTheLock(cache, lambda: other.get(model, **ASK, rebuild=True))
    found = cache._lookup.find(key_of(cache, model))
    assert isinstance(found, Match)
    assert found.record.digest != entry.digest


def test_an_offline_get_during_a_rebuild_is_a_hit(open_cache, model):
    cache, other = open_cache(), open_cache(ConstantBuilder())
    cache.get(model, **ASK)
    check_blob = cache._storage.check

    def check_after_the_rebuild(*args, **kwargs):
        cache._storage.check = check_blob
        other.get(model, **ASK, rebuild=True)
        return check_blob(*args, **kwargs)

    cache._storage.check = check_after_the_rebuild
    entry = cache.get(model, **ASK, offline=True)
    assert entry.outcome == "hit"
    assert digest_of(entry.path.read_bytes()) == entry.digest


def test_nothing_stored_is_absent(open_cache, model):
    cache = open_cache()
    found = cache._lookup.find(key_of(cache, model))
    assert [reason.code for reason in found.reasons] == ["absent"]
    assert found.candidates == ()


def test_the_nearest_stored_engine_and_the_fields_that_differ_are_told(open_cache, model):
    cache = open_cache()
    entry = cache.get(model, **ASK)
    found = cache._lookup.find(key_of(cache, model, WIDER))
    assert [reason.code for reason in found.reasons] == ["differs"]
    assert entry.key[:12] in found.reasons[0].text
    assert [difference.field for difference in found.candidates[0].verdict.differing] == ["profiles[0].x"]


def test_a_root_whose_folder_of_locks_is_gone_cannot_set_aside_silently(tmp_path, model):
    """Without ``open_cache``: the folder is left damaged."""
    cache = fake_cache(tmp_path / "cache")
    flip_a_bit(cache.get(model, **ASK).path)
    (cache.root.locks / "store.lock").unlink()
    (cache.root.locks / "store.lock").mkdir()
    with pytest.raises(OSError, match="cannot be taken"):
        cache._lookup.find(key_of(cache, model))
    assert len(cache.entries()) == 1


def test_a_registry_whose_queries_contradict_each_other_is_an_error_and_no_endless_search(open_cache, model):
    cache = open_cache()
    key = key_of(cache, model)
    cache.get(model, **ASK)
    registry = mock.Mock(wraps=cache._registry)
    registry.find.side_effect = lambda _key: None  # as with a damaged index; the other queries see the row
    storage = Storage(cache.root)
    storage.registry = storage.reader = registry
    lookup = Lookup(storage)
    with pytest.raises(RegistryError, match="indexes do not agree"):
        lookup.find(key)
