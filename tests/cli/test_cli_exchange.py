"""``inspect``, ``adopt``, ``export`` and ``import`` on the command line."""

import json
import os
from pathlib import Path

import pytest
from foreign_files import ep_context, rtx_plan, trt_plan, ultralytics

PLAN = rtx_plan()
DIM = ("--dim", "batch=1:32:64")
CONTRACT = {
    "path",
    "kind",
    "backend",
    "tensorrt_version",
    "compute_capabilities",
    "size_bytes",
    "declared_size_bytes",
    "is_complete",
    "wrapper",
    "digest",
    "entry",
    "loads_here",
}


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "foreign.engine"
    path.write_bytes(PLAN)
    return path


def test_inspect_prints_an_object_for_each_file(cli, plan, tmp_path):
    (tmp_path / "y.engine").write_bytes(ultralytics(trt_plan()))
    ran = cli("inspect", plan, tmp_path / "y.engine", "--json")
    assert ran.code == 0
    one, other = ran.json
    assert set(one) >= CONTRACT
    assert (one["kind"], one["backend"], one["tensorrt_version"]) == ("plan", "tensorrt-rtx", "1.7.1.116")
    assert (one["compute_capabilities"], one["declared_size_bytes"], one["is_complete"]) == (["8.9"], 400, True)
    assert (one["wrapper"], one["entry"], one["error"]) == (None, None, None)
    assert other["wrapper"] == "ultralytics"
    assert other["built_on"]["sm_count"] == 132
    assert other["loads_here"]["verdict"] == "no"
    assert other["loads_here"]["reasons"][0]["code"] == "wrapper"


def test_inspect_finds_the_entry_of_a_copy(cli, model, tmp_path):
    built = cli("get", model, *DIM, "-o", tmp_path / "copy.engine", "--json").json
    (found,) = cli("inspect", tmp_path / "copy.engine", "--json").json
    (listed,) = cli("ls", "--json").json
    assert found["entry"] == listed
    assert found["digest"] == built["digest"]
    row = cli("inspect", tmp_path / "copy.engine").rows[0]
    assert row[10] == built["key"]
    assert cli("inspect", tmp_path / "copy.engine", "--no-digest", "--json").json[0]["entry"] is None


def test_inspect_of_a_terminal_shows_everything_of_an_entry(cli, model, tmp_path):
    cli("get", model, *DIM, "-o", tmp_path / "copy.engine")
    shown = cli("inspect", tmp_path / "copy.engine", terminal=100).out
    for word in ("loads_here", "entry.key", "entry.profiles[0].x", "entry.model.weights", "entry.builds[0]"):
        assert word in shown


def test_inspect_says_a_damage_once(cli, plan):
    plan.write_bytes(PLAN[:-1])
    assert cli("inspect", plan, terminal=100).out.count("it is cut off") == 1


@pytest.mark.parametrize(
    ("data", "code"), [(PLAN, 0), (PLAN[:-1], 4), (b"", 4), (b"text", 0), (ep_context(PLAN[:-1]), 4)]
)
def test_inspect_exits_4_for_damage(data, code, cli, tmp_path):
    (tmp_path / "x.engine").write_bytes(data)
    assert cli("inspect", tmp_path / "x.engine").code == code


def test_inspect_exits_3_if_asked_and_one_does_not_load_here(cli, plan, tmp_path):
    (tmp_path / "text").write_bytes(b"text")
    assert cli("inspect", tmp_path / "text").code == 0
    assert cli("inspect", plan, tmp_path / "text", "--loads-here").code == 3
    (tmp_path / "text").write_bytes(PLAN[:-1])
    assert cli("inspect", plan, tmp_path / "text", "--loads-here").code == 4


def test_inspect_goes_on_after_a_file_that_cannot_be_read(cli, plan, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    ran = cli("inspect", tmp_path / "pipe", tmp_path / "none", plan, "--json")
    assert ran.code == 2
    assert [item["error"] and item["error"]["code"] for item in ran.json] == ["invalid_input", "invalid_input", None]
    assert ran.json[2]["kind"] == "plan"
    assert "pipe is a pipe" in ran.err


def test_inspect_prints_a_name_that_is_not_utf_8(cli, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.plan")
    Path(name).write_bytes(PLAN)
    ran = cli("inspect", name)
    assert (ran.code, len(ran.rows)) == (0, 1)
    assert r"\xff\n.plan" in ran.rows[0][0]
    assert json.dumps(cli("inspect", name, "--json").json).isascii()


def test_inspect_needs_no_cache_and_makes_none(cli, plan, tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINECACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    ran = cli("inspect", plan, "--json")
    assert (ran.code, ran.err, ran.json[0]["entry"]) == (0, "", None)
    assert not (tmp_path / "home").exists()


def test_inspect_says_so_where_the_cache_cannot_be_looked_in(cli, plan, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    ran = cli("inspect", plan, "--dir", tmp_path / "other")
    assert ran.code == 0
    assert "the cache was not looked in" in ran.err


def test_adopt_marks_the_engine_wherever_it_is_shown(cli, plan, model):
    ran = cli("adopt", plan, "--model", model, *DIM, "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["adopted"], ran.json["is_new"]) == (True, True)
    assert "tensorrt_version" in ran.json["verified"]
    assert "model" in ran.json["unverified"]
    assert "verified: size" in ran.err
    key = ran.json["key"]
    assert cli("ls", "--json").json[0]["adopted"] is True
    assert cli("ls").rows[0][11] == "yes"
    assert "adopted" in cli("show", key).out
    assert "adopted" in cli("explain", model, *DIM).out
    taken = cli("get", model, *DIM, "--accept", "compatible", "--offline", "--json")
    assert (taken.json["outcome"], taken.json["adopted"]) == ("compatible", True)
    assert "another program built it" in taken.err
    assert cli("get", model, *DIM, "--offline").code == 3
    again = cli("adopt", plan, "--model", model, *DIM)
    assert again.out.strip() == taken.json["path"]
    assert "was adopted before" in again.err


def test_adopt_refuses_with_what_to_do(cli, tmp_path, model):
    (tmp_path / "y.engine").write_bytes(ultralytics(PLAN))
    ran = cli("adopt", tmp_path / "y.engine", "--model", model, *DIM)
    assert ran.code == 2
    assert "tail -c +" in ran.err
    (tmp_path / "y.engine").write_bytes(rtx_plan("1.6.1.120"))
    assert cli("adopt", tmp_path / "y.engine", "--model", model, *DIM).code == 8
    assert cli("adopt", tmp_path / "y.engine").code == 2
    assert cli("ls").out == ""


def test_export_and_import_carry_engines(cli, model, tmp_path):
    keys = [cli("get", model, "--dim", f"batch=1:2:{top}", "--json").json["key"] for top in (4, 8)]
    one = cli("export", keys[0][:12], "-o", tmp_path / "one.tar")
    assert (one.code, one.out.strip()) == (0, str(tmp_path / "one.tar"))
    both = cli("export", "--all", "-o", tmp_path / "both.tar", "--json")
    assert {entry["key"] for entry in both.json["entries"]} == set(keys)
    assert both.json["size_bytes"] == (tmp_path / "both.tar").stat().st_size
    other = tmp_path / "other"
    first = cli("import", tmp_path / "one.tar", "--dir", other)
    assert first.rows == [[keys[0], "model.onnx", "4096", "imported"]]
    assert f"made a new cache in {other}" in first.err
    second = cli("import", tmp_path / "both.tar", "--dir", other, "--json").json
    assert (second["imported"], second["there"], second["kept"]) == ([keys[1]], [keys[0]], [])
    assert set(cli("ls", "-q", "--dir", other).out.split()) == set(keys)


def test_export_and_import_refuse_what_makes_no_sense(cli, model, tmp_path):
    key = cli("get", model, *DIM, "--json").json["key"]
    target = tmp_path / "b.tar"
    assert cli("export", "-o", target).code == 2
    assert cli("export", key, "--all", "-o", target).code == 2
    assert cli("export", key).code == 2
    assert cli("export", "0000", "-o", target).code == 3
    assert cli("export", key, "-o", model).code == 2
    assert not target.exists()
    assert cli("import", model).code == 2
    cli("export", key, "-o", target)
    target.write_bytes(target.read_bytes()[:-1])
    cut = cli("import", target, "--dir", tmp_path / "other", "--json")
    assert (cut.code, cut.json["error"]["code"]) == (4, "bundle")
    assert not (tmp_path / "other").exists()
    assert cli("export", key, "-o", "/dev/full").code == 2
