from __future__ import annotations

import pytest
from fakes import FakeBuilder, fake_cache

ASK = {"dims": {"batch": (1, 2, 4)}}
WIDER = {"dims": {"batch": (1, 2, 8)}}


class ConstantBuilder(FakeBuilder):
    def build(self, request, progress=None):
        built = super().build(request, progress)
        built.plan_path.write_bytes(b"the same plan")
        return built


def rewrite(path, data):
    path.chmod(0o600)
    path.write_bytes(data)
    path.chmod(0o400)


def flip_a_bit(path):
    rewrite(path, bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def cut_short(path):
    rewrite(path, path.read_bytes()[:-1])


def remove(path):
    path.unlink()


def make_a_folder(path):
    path.unlink()
    path.mkdir()


def open_to_writing(path):
    path.chmod(0o644)


DAMAGE = {remove: "dangling", make_a_folder: "dangling", cut_short: "size", flip_a_bit: "digest"}


def test_an_empty_cache_is_clean(open_cache):
    found = open_cache().verify(deep=True)
    assert (found.entries, found.findings, found.young_garbage, found.is_clean) == (0, (), (), True)


def test_whole_entries_are_clean(open_cache, model):
    cache = open_cache()
    cache.get(model, **ASK)
    cache.get(model, **WIDER)
    found = cache.verify(deep=True)
    assert (found.entries, found.findings) == (2, ())


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_left_then_repaired_then_clean(open_cache, model, damage):
    cache = open_cache()
    entry = cache.get(model, **ASK)
    damage(entry.path)
    for _ in range(2):
        found = cache.verify(deep=True)
        (finding,) = found.findings
        assert (finding.kind, finding.subject, finding.is_repaired) == (DAMAGE[damage], entry.key, False)
        assert entry.digest[:12] in finding.text
        assert not found.is_clean
    repaired = cache.verify(deep=True, repair=True)
    assert repaired.is_clean
    assert [finding.is_repaired for finding in repaired.findings] == [True]
    assert cache.verify(deep=True).findings == ()
    assert len(list(cache.root.quarantine.iterdir())) == (damage is not remove)
    assert cache.get(model, **ASK).outcome == "built"


def test_a_shared_blob_is_repaired_once_for_all_its_entries(open_cache, model):
    cache = open_cache(ConstantBuilder())
    flip_a_bit(cache.get(model, **ASK).path)
    other = cache.get(model, **WIDER)  # heals it
    flip_a_bit(other.path)
    assert [finding.kind for finding in cache.verify(deep=True).findings] == ["digest", "digest"]
    assert len(cache.verify(deep=True, repair=True).findings) == 1
    assert cache.entries() == []


def test_a_wrong_mode_is_found_and_set_right(open_cache, model):
    cache = open_cache()
    entry = cache.get(model, **ASK)
    entry.path.chmod(0o644)
    (finding,) = cache.verify().findings
    assert (finding.kind, finding.subject) == ("mode", entry.key)
    assert "0644, not 0400" in finding.text
    assert cache.verify(repair=True).is_clean
    assert entry.path.stat().st_mode & 0o777 == 0o400
    assert cache.get(model, **ASK).outcome == "hit"


def test_an_orphan_within_its_grace_time_is_told_and_no_finding(tmp_path, model):
    """Without ``open_cache``: young garbage is left, on purpose."""
    cache = fake_cache(tmp_path / "cache")
    entry = cache.get(model, **ASK)
    cache._registry.remove(entry.key)
    found = cache.verify(repair=True)
    assert (found.findings, found.is_clean) == ((), True)
    assert [item.path for item in found.young_garbage] == [entry.path]
    assert entry.path.exists()


def test_an_orphan_past_its_grace_time_is_deleted_by_a_repair(open_cache, model):
    cache = open_cache(grace_s=0.0)
    entry = cache.get(model, **ASK)
    cache._registry.remove(entry.key)
    assert [finding.kind for finding in cache.verify().findings] == ["orphan"]
    assert entry.path.exists()
    assert cache.verify(repair=True).is_clean
    assert not entry.path.exists()


def test_an_orphan_that_got_a_row_since_the_list_was_made_stays(open_cache, model):
    cache = open_cache(grace_s=0.0)
    entry = cache.get(model, **ASK)
    cache._registry.remove(entry.key)
    (item,) = cache._garbage()[0]
    cache.get(model, **ASK)
    assert not cache._removal.delete_garbage(item)
    assert entry.path.exists()


@pytest.mark.parametrize("deep", [False, True])
def test_an_entry_removed_while_it_is_checked_is_no_finding(open_cache, model, deep):
    cache, other = open_cache(), open_cache()
    record = cache.get(model, **ASK).record
    check_blob = cache._memo.check_blob

    def check_then_remove(*args, **kwargs):
        state = check_blob(*args, **kwargs)
        other.remove(record)
        return state

    def remove_then_check(*args, **kwargs):
        other.remove(record)
        return check_blob(*args, **kwargs)

    for check in (check_then_remove, remove_then_check):
        cache._memo.check_blob = check
        assert cache.verify(deep=deep).findings == ()
        cache._memo.check_blob = check_blob
        record = cache.get(model, **ASK).record


def test_only_a_deep_check_reads_what_was_verified_before(open_cache, model, monkeypatch):
    monkeypatch.setattr("enginecache.fingerprint.SETTLE_NS", 0)
    cache = open_cache()
    cache.get(model, **ASK)
    cache.verify()
    reads = []
    read = cache._store.read
    cache._store.read = lambda digest: (reads.append(digest), read(digest))[1]
    cache.verify()
    assert reads == []
    cache.verify(deep=True)
    assert len(reads) == 1


def test_the_record_has_plain_values(open_cache, model):
    cache = open_cache()
    entry = cache.get(model, **ASK)
    entry.path.chmod(0o600)
    found = cache.verify(repair=True).to_json()
    assert (found["schema"], found["entries"], found["clean"], found["garbage_in_grace"]) == (1, 1, True, [])
    assert found["findings"][0]["kind"] == "mode"
    assert found["findings"][0]["repaired"] is True
