"""``check``, ``get --check`` and what shows their results."""

import json
import re
from pathlib import Path

import check_models
import numpy as np
import pytest

ASK = ("--dim", "batch=1:2:4", "--fp16")


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    monkeypatch.setattr("enginecache.quality.entries.Checker", check_models.HereChecker)


def test_get_with_a_check_prints_the_path_and_says_that_it_passed(cli, model):
    ran = cli("get", model, *ASK, "--check")
    assert (ran.code, Path(ran.out.strip()).is_file()) == (0, True)
    assert "passed a check of its graph alone, on a CPU" in ran.err


def test_get_whose_check_fails_is_exit_9_with_the_numbers(cli, model):
    ran = cli("get", model, *ASK, "--check", "--max-error", "1e-9", "--json")
    assert ran.code == 9
    error = ran.json["error"]
    assert (error["code"], error["exit_code"]) == ("check", 9)
    assert error["check"]["outputs"][0]["name"] == "y"
    assert error["check"]["tolerance"] == 1e-9
    assert "Leave --fp16 out" in error["fix"]
    assert cli("ls").out == ""


def test_check_prints_a_line_for_each_output_and_point(cli, model):
    cli("get", model, *ASK)
    ran = cli("check", model, *ASK)
    assert ran.code == 0
    assert [row[:3] for row in ran.rows] == [["0", "opt", "y"], ["0", "min", "y"], ["0", "max", "y"]]
    assert all(0 < float(row[3]) < 0.05 for row in ran.rows)
    assert "passed a check of its graph alone, on a CPU" in ran.err
    shown = cli("check", model, *ASK, terminal=120).out
    assert "OUTPUT" in shown
    assert float(ran.rows[0][3]) == pytest.approx(float(re.search(r"opt +y +(\S+) ", shown)[1]), rel=0.01)


def test_check_by_key_needs_the_model(cli, model, tmp_path):
    cli("get", model, *ASK)
    key = cli("ls", "-q").out.strip()
    assert cli("check", key[:12], "--model", model).code == 0
    ran = cli("check", key)
    assert (ran.code, "--model FILE" in ran.err) == (2, True)
    assert cli("check", "0" * 64, "--model", model).code == 3
    assert cli("check", key, "--model", tmp_path / "none.onnx").code == 2
    ran = cli("check", key, "--model", model, "--fp16")
    assert (ran.code, "--fp16 with --model" in ran.err) == (2, True)


def test_check_of_what_is_not_stored_is_exit_3_and_builds_nothing(cli, model, builder):
    ran = cli("check", model, *ASK)
    assert (ran.code, ran.out, builder.count) == (3, "", 0)
    assert "get --check" in ran.err


@pytest.mark.parametrize("flags", [("--max-error", "1e-9"), ()])
def test_check_that_did_not_pass_is_exit_9_with_its_record(cli, model, flags):
    ask = ASK if flags else ASK[:2]  # without a conversion there is nothing to compare
    cli("get", model, *ask)
    ran = cli("check", model, *ask, *flags, "--json")
    assert (ran.code, ran.json["verdict"]) == (9, "failed" if flags else "uninformative")
    assert {"key", "scope", "reference", "inputs", "outputs", "tolerance", "points", "reason"} <= set(ran.json)


def test_result_is_in_ls_show_and_explain(cli, model):
    cli("get", model, *ASK)
    assert (cli("ls").rows[0][-1], cli("ls", "--json").json[0]["check"]) == ("", None)
    cli("check", model, *ASK)
    key = cli("ls", "-q").out.strip()
    assert cli("ls").rows[0][-1] == "passed"
    assert cli("ls", "--json").json[0]["check"]["verdict"] == "passed"
    assert cli("show", key, "--json").json["check"]["scope"] == "graph"
    facts = dict(cli("show", key).rows)
    assert facts["check"].startswith("passed, scope graph, against onnxruntime")
    assert 0 < float(facts["check.error.y"]) < float(facts["check.tolerance"]) == 0.05
    assert cli("explain", model, *ASK, "--json").json["check"]["verdict"] == "passed"
    assert "check: passed, scope graph" in cli("explain", model, *ASK).out
    assert "check: passed, scope graph" in cli("explain", model, *ASK, "--verbose").out
    assert cli("get", model, *ASK, "--json").json["check"]["verdict"] == "passed"


def test_inputs_and_ranges_reach_the_check(cli, model, tmp_path):
    cli("get", model, *ASK)
    np.savez(tmp_path / "given.npz", x=np.ones((3, 8)) * np.arange(8))
    found = cli("check", model, *ASK, "--inputs", tmp_path / "given.npz", "--json").json
    assert [(point["at"], point["shapes"]) for point in found["points"]] == [("given", {"x": [3, 8]})]
    found = cli("check", model, *ASK, "--input-range", "x=0:1", "--check-seed", "7", "--json").json
    assert (found["inputs"], found["seed"]) == ([{"name": "x", "from": "range 0:1"}], 7)


@pytest.mark.parametrize(
    "flags",
    [
        *(("--input-range", "x"), ("--input-range", "z=0:1"), ("--inputs", "none.npz"), ("--inputs", "")),
        *(("--check-seed", "-1"), ("--max-error", "-1"), ("--max-error", "nan")),
        ("--input-range", "x=0:1", "--input-range", "x=0:2"),
    ],
)
def test_options_that_no_check_can_have_are_exit_2(cli, model, builder, flags):
    assert cli("get", model, *ASK, "--check", *flags).code == 2
    assert builder.count == 0


def test_options_of_a_check_without_one_are_exit_2(cli, model, builder):
    ran = cli("get", model, *ASK, "--max-error", "0.1")
    assert (ran.code, builder.count) == (2, 0)
    assert "--require-check" in ran.err


def test_repeated_command_line_is_checked_anew_where_a_check_is_required(cli, model):
    assert cli("get", model, *ASK, "--require-check").code == 0
    assert cli("get", model, *ASK, "--require-check", "--offline").code == 0
    assert cli("check", model, *ASK, "--max-error", "1e-9").code == 9
    assert cli("get", model, *ASK, "--require-check", "--offline").code == 9
    assert json.loads(cli("get", model, *ASK, "--json").out)["check"]["verdict"] == "failed"
