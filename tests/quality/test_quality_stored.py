"""Results of checks in the cache's rows and records."""

import sqlite3

ASK = {"dims": {"batch": (1, 2, 4)}, "target": "sm_89", "backend": "tensorrt-rtx"}


def test_check_is_in_the_row_and_comes_back_with_a_registry_that_was_lost(open_cache, model):
    cache = open_cache()
    record = cache.get(model, **ASK).record
    checked = cache._storage.record_check(record, '{"verdict":"failed"}')
    assert cache.find(record.key).check_json == checked.check_json == '{"verdict":"failed"}'
    assert cache.verify(deep=True).is_clean
    cache.root.registry_path.unlink()
    cache.verify(repair=True)
    assert cache.find(record.key).check_json == '{"verdict":"failed"}'


def test_check_of_an_entry_that_was_rebuilt_meanwhile_is_not_kept(open_cache, model):
    cache = open_cache()
    record = cache.get(model, **ASK).record
    again = cache.get(model, rebuild=True, **ASK).record
    assert again.build_id != record.build_id
    cache._storage.record_check(record, '{"verdict":"passed"}')
    assert cache.find(record.key).check_json is None


def test_what_is_no_text_in_the_place_of_a_check_is_a_damaged_row(open_cache, model):
    cache = open_cache()
    record = cache.get(model, **ASK).record
    with sqlite3.connect(cache.root.registry_path) as connection:
        connection.execute("UPDATE entries SET check_json = x'00ff'")
    assert "row" in {finding.kind for finding in cache.verify().findings}
    assert cache.verify(repair=True).is_clean
    assert cache.find(record.key).check_json is None
