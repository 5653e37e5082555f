"""Checks of the cache's engines, by a fake builder and, in this process, the graph's half of the check."""

import sqlite3
import stat
from dataclasses import replace

import check_models as models
import onnx
import pytest
from fakes import H100, FakeBuilder
from models import linear, save

from enginecache import CheckError, CheckOptions, CheckUnavailableError, ModelError, NotCachedError, OptionError
from enginecache.host.targets import ComputeCapability
from enginecache.quality.entries import EntryChecks, stored_check
from enginecache.storage.names import is_temporary_folder
from enginecache.storage.registry.rows import AnswerRecord
from enginecache.trt.build.codec import CONVERTED_NAME, CONVERTED_WEIGHTS_NAME

HALF = {"dims": {"batch": (1, 2, 4)}, "precision": "fp16"}
STRICT = CheckOptions(max_error=1e-9)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    monkeypatch.setattr("enginecache.quality.entries.Checker", models.HereChecker)


def verdict_of(cache, entry):
    return (cache.find(entry.key).check or {}).get("verdict")


def test_get_with_a_check_publishes_an_engine_that_passed_with_its_numbers(open_cache, model):
    cache = open_cache()
    entry = cache.get(model, check=True, **HALF)
    check = entry.to_json()["check"]
    assert (entry.outcome, check["verdict"], check["scope"], check["digest"]) == (
        "built",
        "passed",
        "graph",
        entry.digest,
    )
    assert [point["at"] for point in check["points"]] == ["opt", "min", "max"]
    assert 0 < check["outputs"][0]["error"] < check["tolerance"]
    assert entry.reasons[-1].code == "checked"
    assert cache.find(entry.key).check == check


def test_failed_check_publishes_nothing_and_says_which_outputs(open_cache, model):
    cache = open_cache()
    with pytest.raises(CheckError, match="output y: error") as raised:
        cache.get(model, check=STRICT, **HALF)
    assert raised.value.exit_code == 9
    assert raised.value.check["outputs"][0]["name"] == "y"
    assert "Nothing was published" in str(raised.value)
    assert cache.entries() == []
    assert list(cache.root.tmp.iterdir()) == []
    (build,) = cache.builds()
    assert (build.state, "failed a check" in build.reason) == ("failed", True)


def test_conversion_that_overflows_is_not_published(open_cache, tmp_path):
    original, _ = models.bad_pairs()["overflow of a square, by the converter"]
    cache = open_cache()
    with pytest.raises(CheckError, match="output y"):
        cache.get(save(original, tmp_path / "bad.onnx"), precision="fp16", check=True)
    assert cache.entries() == []
    assert cache.get(tmp_path / "bad.onnx", check=True).outcome == "built"


def test_graph_that_was_built_is_checked_and_not_another_conversion(open_cache, model):
    def convert(request):
        folder = request.work_dir / CONVERTED_NAME
        folder.mkdir()
        (folder / CONVERTED_WEIGHTS_NAME).write_bytes(b"")
        (folder / "model.onnx").write_bytes(linear(seed=1).SerializeToString())

    with pytest.raises(CheckError, match="output y: error"):
        open_cache(FakeBuilder(before=convert)).get(model, check=True, **HALF)


def test_failed_check_is_no_failed_build(open_cache, model):
    cache = open_cache()
    with pytest.raises(CheckError):
        cache.get(model, check=STRICT, **HALF)
    assert cache.get(model, **HALF).outcome == "built"


def test_check_is_in_no_key(open_cache, model):
    cache = open_cache()
    key = cache.get(model, check=True, **HALF).key
    assert cache.get(model, **HALF).key == key == cache.get(model, require_check=True, **HALF).key


def test_stored_engine_is_checked_once(open_cache, model, monkeypatch):
    cache = open_cache()
    assert cache.get(model, **HALF).record.check is None
    checked = cache.get(model, check=True, **HALF)
    assert (checked.outcome, checked.record.check["verdict"]) == ("hit", "passed")
    monkeypatch.setattr(models.HereChecker, "check", None)
    again = cache.get(model, check=True, **HALF)
    assert again.record.check == checked.record.check
    assert cache.get(model, require_check=True, offline=True, **HALF).outcome == "hit"


def test_stored_engine_that_fails_is_marked_and_served_with_a_warning_unless_a_check_is_required(open_cache, model):
    cache = open_cache()
    entry = cache.get(model, **HALF)
    with pytest.raises(CheckError, match="the stored engine"):
        cache.get(model, check=STRICT, **HALF)
    assert verdict_of(cache, entry) == "failed"
    (warning,) = [reason for reason in open_cache().get(model, **HALF).reasons if reason.code == "warning"]
    assert "failed a check on" in warning.text
    for offline in (True, False):
        with pytest.raises(CheckError, match="failed a check"):
            cache.get(model, require_check=True, offline=offline, **HALF)
    assert cache.check(entry, model).verdict == "passed"
    assert cache.get(model, require_check=True, **HALF).key == entry.key


def test_engine_without_a_check_is_refused_offline_and_checked_otherwise_where_one_is_required(open_cache, model):
    cache = open_cache()
    entry = cache.get(model, **HALF)
    with pytest.raises(NotCachedError, match="was not checked"):
        cache.get(model, require_check=True, offline=True, **HALF)
    assert verdict_of(cache, entry) is None
    assert cache.get(model, require_check=True, **HALF).record.check["verdict"] == "passed"


def test_uninformative_check_publishes_with_a_warning_and_is_refused_where_a_check_is_required(open_cache, model):
    cache, ask = open_cache(), {"dims": {"batch": (1, 2, 4)}}
    entry = cache.get(model, check=True, **ask)
    assert (entry.outcome, entry.record.check["verdict"]) == ("built", "uninformative")
    assert "could not be judged" in entry.reasons[-1].text
    with pytest.raises(CheckError, match="could not be judged") as raised:
        cache.get(model, require_check=True, **ask)
    assert raised.value.check["verdict"] == "uninformative"
    with pytest.raises(NotCachedError, match="could not be judged"):
        cache.get(model, require_check=True, offline=True, **ask)


def test_rebuild_with_a_check_replaces_what_failed(open_cache, model):
    cache = open_cache()
    entry = cache.get(model, **HALF)
    with pytest.raises(CheckError):
        cache.get(model, check=STRICT, **HALF)
    again = cache.get(model, rebuild=True, check=True, **HALF)
    assert (again.outcome, verdict_of(cache, entry)) == ("built", "passed")


def test_inputs_that_do_not_fit_are_refused_before_a_build(open_cache, model):
    builder = FakeBuilder()
    cache = open_cache(builder)
    with pytest.raises(OptionError, match="not an input of the model"):
        cache.get(model, check=CheckOptions(ranges={"z": (0, 1)}), **HALF)
    with pytest.raises(OptionError, match="is not True, False or CheckOptions"):
        cache.get(model, check="yes", **HALF)
    assert builder.count == 0


def test_arrays_lie_in_the_cache_while_a_check_runs_and_are_deleted(open_cache, model, monkeypatch):
    seen, cache = [], open_cache()
    check = models.HereChecker.check

    def look(checker, subject, options, folder):
        found = check(checker, subject, options, folder)
        seen.append(is_temporary_folder(folder.parts[len(cache.root.tmp.parts)]))
        assert list(folder.glob("*.npz"))
        return found

    monkeypatch.setattr(models.HereChecker, "check", look)
    entry = cache.get(model, check=True, **HALF)
    cache.check(entry, model)
    assert seen == [True, True]
    assert list(cache.root.tmp.iterdir()) == []


def test_check_of_another_model_is_refused(open_cache, model, tmp_path):
    cache = open_cache()
    entry = cache.get(model, **HALF)
    with pytest.raises(ModelError, match="was built from another model"):
        cache.check(entry, save(linear(seed=1), tmp_path / "other.onnx"))


def test_model_that_differs_in_notes_alone_is_the_one_of_the_key(open_cache, model, tmp_path):
    other = linear()
    other.graph.value_info.append(onnx.helper.make_tensor_value_info("noted", 1, [1]))
    other, ask = save(other, tmp_path / "other.onnx"), {"dims": {"batch": (1, 2, 4)}}
    cache = open_cache()
    cache.get(model, **ask)
    entry = cache.get(other, check=True, **ask)
    assert (entry.outcome, entry.record.check["verdict"]) == ("hit", "uninformative")


def test_check_needs_the_key_and_the_model_alone(open_cache, model):
    cache = open_cache()
    entry = cache.get(model, **HALF)
    found = cache.check(entry.key[:12], model.read_bytes(), CheckOptions(seed=5))
    assert (found.verdict, found.seed, found.tolerance) == ("passed", 5, 0.05)
    assert cache.find(entry.key).check == found.to_json()


def test_engine_that_is_accepted_as_compatible_is_checked_at_its_own_profile(open_cache, model):
    cache = open_cache()
    cache.get(model, **HALF)
    narrow = {"dims": {"batch": (1, 2, 3)}, "precision": "fp16", "accept": "compatible"}
    entry = cache.get(model, check=True, **narrow)
    assert entry.outcome == "compatible"
    assert [point["shapes"]["x"][0] for point in entry.record.check["points"]] == [2, 1, 4]


def test_package_that_is_missing_is_exit_8_before_a_build(open_cache, model, monkeypatch):
    builder = FakeBuilder()
    monkeypatch.setattr("enginecache.quality.check.find_spec", lambda _name: None)
    with pytest.raises(CheckUnavailableError, match="pip install 'onnxruntime"):
        open_cache(builder).get(model, check=True, **HALF)
    assert builder.count == 0


def test_engine_that_passed_is_served_where_nothing_is_installed_that_checks(open_cache, model, monkeypatch):
    cache = open_cache()
    cache.get(model, check=True, **HALF)
    monkeypatch.setattr("enginecache.quality.check.find_spec", lambda _name: None)
    for offline in (True, False):
        assert cache.get(model, require_check=True, offline=offline, **HALF).outcome == "hit"
    with pytest.raises(NotCachedError):
        cache.get(model, require_check=True, offline=True, dims={"batch": (1, 2, 3)}, precision="fp16")


@pytest.mark.parametrize(
    ("before", "after", "is_kept"),
    [
        (("failed", "engine"), ("passed", "graph"), True),
        (("passed", "engine"), ("uninformative", "engine"), True),
        (("passed", "graph"), ("uninformative", "graph"), True),
        (("passed", "engine"), ("failed", "engine"), False),
        (("failed", "graph"), ("passed", "engine"), False),
        (("uninformative", "engine"), ("passed", "graph"), False),
    ],
)
def test_result_that_shows_less_replaces_none(open_cache, model, monkeypatch, before, after, is_kept):
    cache = open_cache()
    entry = cache.get(model, check=True, **HALF)
    known = stored_check(entry.record)
    for verdict, scope in (before, after):
        found = replace(known, verdict=verdict, scope=scope)
        monkeypatch.setattr(models.HereChecker, "check", lambda *_, found=found: found)
        if (verdict, scope) == before:
            cache._storage.record_check(entry.record, found.to_text())
        else:
            assert cache.check(entry, model).verdict == verdict
    now = stored_check(cache.find(entry.key))
    assert (now.verdict, now.scope) == (before if is_kept else after)


def test_check_with_other_plugins_than_those_of_the_engine_is_refused(open_cache, model, tmp_path):
    cache = open_cache()
    entry = cache.get(model, **HALF)
    (tmp_path / "other.so").write_bytes(b"\x7fELF")
    with pytest.raises(OptionError, match="built with other plugin libraries"):
        cache.check(entry, model, plugins=[tmp_path / "other.so"])
    assert verdict_of(cache, entry) is None


def test_folders_of_a_check_in_a_shared_cache_are_the_groups_too(open_cache, model, monkeypatch):
    modes, cache = [], open_cache(shared="group")
    check = models.HereChecker.check

    def look(checker, subject, options, folder):
        modes.append(stat.S_IMODE(folder.stat().st_mode))
        return check(checker, subject, options, folder)

    monkeypatch.setattr(models.HereChecker, "check", look)
    cache.check(cache.get(model, check=True, **HALF), model)
    assert modes == [cache.root.folder_mode] * 2


@pytest.mark.parametrize(("capability", "is_missed"), [((8, 9), True), ((9, 0), False)])
def test_package_that_runs_engines_is_missed_before_a_build_where_a_gpu_runs_this_one(
    open_cache, model, monkeypatch, capability, is_missed
):
    builder, gpu = FakeBuilder(), replace(H100, compute_capability=ComputeCapability(*capability))
    monkeypatch.setattr("enginecache.quality.check.find_spec", lambda name: None if "cuda" in name else name)
    cache = open_cache(builder)
    checks = EntryChecks(cache._storage, cache.config, find_device=lambda: gpu)
    monkeypatch.setattr(cache, "_checks", lambda _ask: checks)
    if is_missed:
        with pytest.raises(CheckUnavailableError, match="cuda-bindings is not installed"):
            cache.get(model, **HALF)
        assert builder.count == 0
    else:
        assert cache.get(model, **HALF).record.check["scope"] == "graph"


def test_answer_that_is_remembered_is_given_no_more_when_a_check_was_kept(open_cache, model):
    cache = open_cache()
    entry = cache.get(model, **HALF)
    answer = AnswerRecord("a" * 64, entry.key, entry.record.build_id, b"", b"", b"", "b" * 64, None)
    cache._storage.registry.remember_answer(answer)
    cache.check(entry, model)
    with sqlite3.connect(cache.root.registry_path) as connection:
        assert connection.execute("SELECT count(*) FROM answers").fetchone() == (0,)
