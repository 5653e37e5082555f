import io
import os
import sys
import time
from pathlib import Path

import pytest

DAY_S = 86400


@pytest.fixture
def stored(cli, model, folder):
    """Three engines that were last used three, two and one day ago."""
    records = [cli("get", model, "--dim", f"batch={size}", "--json").json for size in (1, 2, 3)]
    for days, record in zip((3, 2, 1), records, strict=True):
        os.utime(folder / "uses" / record["key"], (time.time() - days * DAY_S,) * 2)
    return records


def keys(cli):
    return set(cli("ls", "-q").out.split())


@pytest.fixture
def answer(monkeypatch):
    """Standard input and error are a terminal where the answer is typed."""

    def type_in(text):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    return type_in


def test_rm_deletes_row_and_file_and_says_what_it_freed(cli, stored):
    ran = cli("rm", stored[0]["key"][:16], "--yes")
    assert (ran.code, ran.out) == (0, "")
    assert "freed 4 KiB" in ran.err
    assert not Path(stored[0]["path"]).exists()
    assert keys(cli) == {record["key"] for record in stored[1:]}


def test_rm_json_names_key_and_bytes(cli, stored):
    key = stored[0]["key"]
    dry = cli("rm", key, "--dry-run", "--json").json
    assert dry == {"schema": 1, "dry_run": True, "key": key, "freed_bytes": 0}
    assert cli("rm", key, "-y", "--json").json == {"schema": 1, "dry_run": False, "key": key, "freed_bytes": 4096}


@pytest.mark.parametrize("json", [(), ("--json",)])
@pytest.mark.parametrize("command", [("rm", "{key}"), ("prune", "--max-size", "0")])
def test_off_a_terminal_nothing_is_deleted_without_yes(cli, stored, command, json):
    ran = cli(*(part.format(key=stored[0]["key"]) for part in command), *json)
    assert (ran.code, bool(ran.out)) == (2, bool(json))
    assert "refusing to delete" in ran.err
    assert "without --yes" in ran.err
    assert "--dry-run" in ran.err
    assert len(keys(cli)) == 3


@pytest.mark.parametrize(
    ("typed", "code", "left"), [("y\n", 0, 2), ("n\n", 0, 3), ("\n", 0, 3), ("", 0, 3), ("YES\n", 0, 2)]
)
def test_on_a_terminal_it_asks_on_standard_error(cli, stored, answer, typed, code, left):
    answer(typed)
    ran = cli("rm", stored[0]["key"])
    assert (ran.code, ran.out) == (code, "")
    assert "delete the engine" in ran.err
    assert ("nothing was changed" in ran.err) == (left == 3)
    assert len(keys(cli)) == left


def test_prune_shows_what_would_go_before_it_asks(cli, stored, answer):
    answer("n\n")
    ran = cli("prune", "--max-size", "4KiB")
    assert ran.code == 0
    assert "nothing was changed" in ran.err
    assert [row[0] for row in ran.rows] == [record["key"] for record in stored[:2]]
    assert "delete 2 engines (8 KiB)? [y/N] " in ran.err
    assert len(keys(cli)) == 3


def test_dry_run_changes_nothing(cli, stored):
    before = keys(cli)
    ran = cli("rm", stored[0]["key"], "--dry-run")
    assert (ran.code, ran.out) == (0, "")
    assert ran.err.startswith("would delete")
    ran = cli("prune", "--max-size", "0", "--dry-run")
    assert ran.code == 0
    assert "would delete 3 engines (12 KiB)" in ran.err
    assert keys(cli) == before


def test_prune_takes_what_is_quickest_to_build_again_and_says_why(cli, stored, builder, model, folder):
    builder.seconds = 0.2
    dear = cli("get", model, "--dim", "batch=9", "--json").json
    os.utime(folder / "uses" / dear["key"], (time.time() - 9 * DAY_S,) * 2)
    ran = cli("prune", "--max-size", "8KiB", "--dry-run")
    assert [row[0] for row in ran.rows] == [record["key"] for record in stored[:2]]
    assert [(row[2], *row[4:6]) for row in ran.rows] == [("4096", "0.001", "cheapest")] * 2
    assert float(ran.rows[0][6]) == pytest.approx(0.001 * 2**18, abs=1e-3)
    ran = cli("prune", "--older-than", "8d", "--dry-run")
    assert [(row[0], row[5]) for row in ran.rows] == [(dear["key"], "old")]
    assert "WHY" in cli("prune", "--max-size", "8KiB", "--dry-run", terminal=100).out


def test_prune_takes_the_least_recently_used_of_equals_first(cli, stored):
    ran = cli("prune", "--max-size", "4KiB", "--yes")
    assert ran.code == 0
    assert [row[0] for row in ran.rows] == [record["key"] for record in stored[:2]]
    assert "freed 8 KiB" in ran.err
    assert keys(cli) == {stored[2]["key"]}


def test_prune_by_age(cli, stored):
    assert cli("prune", "--older-than", "36h", "--yes").code == 0
    assert keys(cli) == {stored[2]["key"]}


def test_prune_json_is_the_plan_and_what_it_freed(cli, stored):
    record = cli("prune", "--max-size", "8KiB", "--yes", "--json").json
    assert record == {
        "schema": 1,
        "dry_run": False,
        "entries": [
            {
                "key": stored[0]["key"],
                "size_bytes": 4096,
                "build_seconds": 0.001,
                "last_used_at": record["entries"][0]["last_used_at"],
                "reason": "cheapest",
                "priority": pytest.approx(0.001 * 2**18),
            }
        ],
        "garbage": [],
        "planned_bytes": 4096,
        "freed_bytes": 4096,
        "kept_bytes": 8192,
        "shortfall_bytes": 0,
        "staying": [],
    }


def test_prune_json_says_what_had_to_stay(cli, stored, model):
    cli("pin", stored[0]["key"])
    cli("get", model, "--dim", "batch=2")
    record = cli("prune", "--max-size", "0", "--dry-run", "--json").json
    assert [entry["key"] for entry in record["entries"]] == [stored[2]["key"]]
    assert record["shortfall_bytes"] == 8192
    assert record["staying"] == [
        {"reason": "pinned", "engines": 1, "size_bytes": 4096},
        {"reason": "young", "engines": 1, "size_bytes": 4096},
    ]


def test_prune_without_a_limit_deletes_no_engine_and_says_how_to(cli, stored, monkeypatch):
    ran = cli("prune")
    assert (ran.code, ran.out) == (0, "")
    assert "nothing to delete" in ran.err
    assert "--max-size" in ran.err
    monkeypatch.setenv("ENGINECACHE_MAX_SIZE", "1TiB")
    assert "--max-size" not in cli("prune").err


def test_prune_lists_stray_files(cli, stored, folder, monkeypatch):
    (folder / "tmp" / "blob-leftover").write_bytes(b"x" * 100)
    assert "nothing to delete" in cli("prune").err
    assert "orphan within its grace time" in cli("verify").err
    monkeypatch.setenv("ENGINECACHE_GRACE", "0")
    ran = cli("prune", "--yes")
    assert ran.rows == [[str(folder / "tmp" / "blob-leftover"), "a temporary file", "100"]]
    assert "0 engines and 1 stray file (100 B)" in ran.err
    assert not (folder / "tmp" / "blob-leftover").exists()


def test_what_was_used_just_now_stays_and_prune_says_so(cli, stored, model):
    cli("get", model, "--dim", "batch=1")
    ran = cli("prune", "--max-size", "0", "--older-than", "0", "--yes")
    assert "still 4 KiB over the limit; kept: 1 engine used or published within the last 10 min (4 KiB)" in ran.err
    assert keys(cli) == {stored[0]["key"]}


def test_prune_keeps_what_was_used_within_the_setting(cli, stored, monkeypatch):
    monkeypatch.setenv("ENGINECACHE_KEEP_RECENT", "60h")
    ran = cli("prune", "--max-size", "0", "--yes")
    assert "still 8 KiB over the limit; kept: 2 engines used or published within the last 2 days (8 KiB)" in ran.err
    assert keys(cli) == {record["key"] for record in stored[1:]}
    monkeypatch.setenv("ENGINECACHE_KEEP_RECENT", "0")
    assert cli("prune", "--max-size", "0", "--yes").code == 0
    assert keys(cli) == set()


@pytest.mark.parametrize(
    "arguments", [("--max-size", "1x"), ("--max-size", ""), ("--older-than", "x"), ("--older-than", "-1d")]
)
def test_limits_that_cannot_be_read_name_their_flag(cli, arguments):
    ran = cli("prune", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert f"error: {arguments[0]}: " in ran.err


def test_pinned_engines_stay_until_they_are_unpinned(cli, stored):
    key = stored[0]["key"]
    assert [cli("pin", key).code for _ in range(2)] == [0, 0]
    assert cli("show", key, "--json").json["pinned"] is True
    cli("prune", "--max-size", "0", "--yes")
    assert keys(cli) == {key}
    ran = cli("rm", key, "--yes")
    assert ran.code == 2
    assert f"enginecache unpin {key[:12]}" in ran.err
    assert cli("rm", key, "--dry-run").err == ran.err
    assert [cli("unpin", key).code for _ in range(2)] == [0, 0]
    assert cli("rm", key, "--yes").code == 0


def test_clean_cache_verifies_with_exit_0(cli, stored):
    ran = cli("verify", "--deep")
    assert (ran.code, ran.out) == (0, "")
    assert "OK: 3 engines checked, nothing to repair" in ran.err
    assert cli("verify", "--json").json == {
        "schema": 1,
        "entries": 3,
        "clean": True,
        "findings": [],
        "garbage_in_grace": [],
        "kept": {"quarantined": 0, "set_asides": [], "registries": 0, "failures": 0, "unfinished_builds": 0},
    }


def test_findings_are_exit_4_and_are_repaired_with_leave(cli, stored, folder):
    Path(stored[0]["path"]).unlink()
    other = folder / "tmp" / "other"
    other.write_bytes(b"x" * 4096)
    other.replace(stored[1]["path"])
    ran = cli("verify")
    assert ran.code == 4
    assert {(row[0], row[1]) for row in ran.rows} == {("dangling", stored[0]["key"]), ("digest", stored[1]["key"])}
    assert all(row[3].startswith("--repair would") for row in ran.rows)
    assert cli("verify", "--json").json["clean"] is False
    assert "KIND" in cli("verify", terminal=120).out

    ran = cli("verify", "--repair")
    assert (ran.code, ran.out) == (2, "")
    ran = cli("verify", "--repair", "--yes")
    assert ran.code == 0
    assert {row[3] for row in ran.rows} == {"repaired"}
    assert "2 findings" in ran.err
    assert cli("verify").code == 0
    assert keys(cli) == {stored[2]["key"]}


def test_a_damaged_registry_is_exit_6_with_the_command_that_repairs_it(cli, stored, folder):
    registry = folder / "registry.sqlite"
    registry.write_bytes(b"no database" * 1000)
    ran = cli("ls")
    assert (ran.code, ran.out) == (6, "")
    assert "enginecache verify --repair --yes" in ran.err
    ran = cli("verify")
    assert ran.code == 4
    assert [row[:2] for row in ran.rows] == [["registry", str(registry)]]
    assert "0 engines checked, 1 finding" in ran.err
    assert cli("verify", "--repair").code == 2
    ran = cli("verify", "--repair", "--yes")
    assert ran.code == 0
    assert "back are 3 entries and 0 pins" in ran.rows[0][2]
    assert ran.rows[0][3] == "repaired"
    assert "kept, not a fault: 1 damaged registry file" in ran.err
    assert keys(cli) == {record["key"] for record in stored}
    (kept,) = (folder / "quarantine").iterdir()
    assert kept.read_bytes() == b"no database" * 1000


@pytest.mark.parametrize("command", [("ls",), ("db", "upgrade")])
def test_a_lost_registry_is_not_replaced_by_an_empty_one(cli, stored, folder, command):
    (folder / "registry.sqlite").unlink()
    ran = cli(*command)
    assert (ran.code, ran.out) == (6, "")
    assert "is lost" in ran.err
    assert "enginecache verify --repair --yes" in ran.err
    assert not (folder / "registry.sqlite").exists()
    assert cli("verify", "--repair", "--yes").code == 0
    assert keys(cli) == {record["key"] for record in stored}


def test_what_is_kept_is_told_and_is_exit_0(cli, stored, folder):
    path = Path(stored[0]["path"])
    path.chmod(0o600)
    path.write_bytes(b"x" * 4096)
    path.chmod(0o400)
    assert cli("verify", "--repair", "--yes").code == 0
    ran = cli("verify")
    assert (ran.code, ran.out) == (0, "")
    assert "kept, not a fault: 1 quarantined engine" in ran.err
    assert f"not built anew since: {stored[0]['key'][:12]} (model.onnx): its engine was found damaged" in ran.err
    kept = cli("verify", "--json").json["kept"]
    assert (kept["quarantined"], [lost["key"] for lost in kept["set_asides"]]) == (1, [stored[0]["key"]])


@pytest.mark.parametrize("command", [["ls"], ["stats"], ["verify"], ["prune", "--dry-run"], ["show", "ab"]])
def test_what_only_looks_makes_no_cache_at_a_mistyped_folder(cli, tmp_path, command):
    ran = cli(*command, "--dir", tmp_path / "cahce")
    assert (ran.code, ran.out) == (2, "")
    assert f"--dir: there is no cache in {tmp_path / 'cahce'}" in ran.err
    assert not (tmp_path / "cahce").exists()
