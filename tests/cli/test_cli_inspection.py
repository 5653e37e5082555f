import contextlib
import datetime as dt
import json
import os
import re
import shutil
import sqlite3
import time
from pathlib import Path

import pytest

from enginecache.storage.registry.schema import HEAD

KEY = re.compile(r"[0-9a-f]{64}")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def stored(cli, model):
    """Two engines, older first, as their JSON records."""
    return [cli("get", model, "--dim", f"batch={size}", "--json").json for size in (1, 2)]


def test_ls_on_a_pipe_is_full_values_without_heading_newest_first(cli, stored):
    rows = cli("ls").rows
    assert [row[0] for row in rows] == [record["key"] for record in reversed(stored)]
    key, name, backend, version, reach, device, size, seconds, created, used, pinned, adopted, check = rows[0]
    assert KEY.fullmatch(key)
    assert (name, backend, version, reach, device) == ("model.onnx", "tensorrt-rtx", "1.7.1.116", "8.9", "")
    assert (int(size), float(seconds) > 0, pinned, adopted, check) == (4096, True, "no", "no", "")
    assert dt.datetime.fromisoformat(created.replace("Z", "+00:00")) <= dt.datetime.fromisoformat(
        used.replace("Z", "+00:00")
    ) + dt.timedelta(seconds=1)


def test_ls_quiet_is_keys_and_limit_is_the_newest(cli, stored):
    assert cli("ls", "-q").out.split() == [record["key"] for record in reversed(stored)]
    assert cli("ls", "-q", "--limit", 1).out.split() == [stored[1]["key"]]
    assert cli("ls", "--limit", 0).code == 2


def test_ls_json_is_an_array_of_raw_records(cli, stored):
    records = cli("ls", "--json").json
    assert [record["key"] for record in records] == [record["key"] for record in reversed(stored)]
    assert (records[0]["size_bytes"], records[0]["pinned"]) == (4096, False)
    assert records[0]["last_used_at"].endswith("Z")


def test_empty_cache_lists_nothing_and_says_so_on_standard_error(cli, folder):
    ran = cli("ls")
    assert (ran.code, ran.out) == (0, "")
    assert str(folder) in ran.err
    assert cli("ls", "--json").json == []
    assert cli("ls", "-q").err == ""


def test_table_has_a_heading_short_keys_and_units(cli, stored):
    shown = ANSI.sub("", cli("ls", terminal=80).out)
    assert shown.split("\n", 1)[0].split() == ["KEY", "MODEL", "REACH", "SIZE", "LAST", "USED"]
    assert stored[0]["key"][:12] in shown
    assert stored[0]["key"][:13] not in shown
    assert "4 KiB" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "CREATED" in cli("ls", terminal=160).out


@pytest.mark.parametrize(
    ("width", "names"),
    [
        (12, ["MODEL"]),
        (24, ["KEY", "MODEL"]),
        (40, ["KEY", "MODEL", "SIZE"]),
        (60, ["KEY", "MODEL", "REACH", "SIZE", "LAST USED"]),
    ],
)
def test_narrow_terminal_shows_fewer_columns_and_cuts_no_heading(cli, stored, width, names):
    shown = ANSI.sub("", cli("ls", terminal=width).out).splitlines()
    assert re.split(r" {2,}", shown[0].strip()) == names
    assert all("model.onnx" in line for line in shown[1:])
    assert max(map(len, shown)) <= width
    assert len(shown) == 3


def test_long_model_name_keeps_a_readable_width_and_is_not_cut(cli, model):
    name = "a-detector-with-a-name-of-some-length-v8.onnx"
    cli("get", model.rename(model.with_name(name)), "--dim", "batch=1")
    shown = ANSI.sub("", cli("ls", terminal=40).out).splitlines()
    assert shown[0].split() == ["KEY", "MODEL"]
    assert max(map(len, shown)) <= 40
    assert "".join(line[14:].strip() for line in shown[1:]) == name


def test_no_color_and_dumb_terminals_are_honoured(cli, stored, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[34]\d", cli("ls", terminal=80).out)


def test_show_begins_with_what_a_reader_wants_and_is_short(cli, stored):
    rows = cli("show", stored[0]["key"][:16]).rows
    names = ["key", "model", "path", "size_bytes", "backend", "tensorrt_version", "compute_capabilities"]
    assert [row[0] for row in rows[:7]] == names
    facts = dict(rows)
    assert (facts["key"], facts["path"]) == (stored[0]["key"], stored[0]["path"])
    assert (facts["profiles[0].x"], facts["tensorrt_version"]) == ("1x8", "1.7.1.116")
    assert facts["builds[0]"].startswith("succeeded after ")
    assert len(rows) < 30
    assert "4 KiB" in cli("show", stored[0]["key"], terminal=80).out


def test_show_names_options_at_their_defaults_in_one_line_and_the_others_with_their_values(cli, model):
    key = cli("get", model, "--dim", "batch=1:2:4", "--workspace", "1GiB", "--json").json["key"]
    facts = dict(cli("show", key).rows)
    assert facts["options.workspace_bytes"] == str(1 << 30)
    assert facts["profiles[0].x"] == "1x8..2x8..4x8"
    usual = facts["options_at_default"].split(",")
    assert "optimization_level" in usual
    assert "workspace_bytes" not in usual
    assert [name for name in facts if name.startswith("options.")] == ["options.workspace_bytes"]
    assert cli("show", key, "--json").json["fields"]["options"]["optimization_level"] == 3


def test_compute_capability_has_one_form_in_every_listing(cli, stored, model):
    key = stored[0]["key"]
    for ran in (cli("show", key), cli("ls"), cli("explain", model, "--dim", "batch=1", "--verbose")):
        assert "8.9" in ran.out
        assert not re.search(r"\[8, ?9\]|sm_89", ran.out), ran.out
    assert dict(cli("show", key).rows)["compute_capabilities"] == "8.9"
    assert "  target.compute_capabilities: 8.9\n" in cli("explain", model, "--dim", "batch=1", "--verbose").out


def test_show_json_has_the_key_the_builds_and_their_logs(cli, stored):
    shown = cli("show", stored[0]["key"], "--json").json
    assert shown["fields"]["options"] == shown["options"]
    (build,) = shown["builds"]
    assert Path(build["log"]).read_text(encoding="utf-8") == "a fake build\n"


def test_path_is_what_get_printed(cli, stored):
    assert cli("path", stored[0]["key"].upper()).out.strip() == stored[0]["path"]


@pytest.mark.parametrize("command", ["show", "path", "rm", "pin", "unpin"])
@pytest.mark.parametrize(("key", "code"), [("zz", 2), ("", 2), ("0" * 64, 3), ("0" * 65, 3), ("%", 2), ("_", 2)])
def test_no_such_key_is_an_error_with_a_way_out(cli, command, key, code):
    ran = cli(command, key)
    assert (ran.code, ran.out) == (code, "")
    assert "`enginecache ls`" in ran.err


def test_ambiguous_prefix_is_exit_2_and_lists_the_keys(cli, model):
    keys = {}
    for size in range(1, 18):  # sixteen characters: the seventeenth key shares one at the latest
        key = cli("get", model, "--dim", f"batch={size}", "--json").json["key"]
        if key[0] in keys:
            break
        keys[key[0]] = key
    ran = cli("show", key[0])
    assert (ran.code, ran.out) == (2, "")
    assert key[:16] in ran.err
    assert keys[key[0]][:16] in ran.err


def test_damaged_engine_has_no_path_and_is_set_aside(cli, stored, folder):
    other = folder / "tmp" / "other"
    other.write_bytes(b"x" * 4096)
    other.replace(stored[0]["path"])
    ran = cli("path", stored[0]["key"])
    assert (ran.code, ran.out) == (3, "")
    assert "quarantine" in ran.err
    assert "`enginecache get`" in ran.err


@pytest.mark.parametrize("command", ["path", "show", "pin", "unpin", "rm"])
@pytest.mark.parametrize("characters", [8, 64])
def test_engine_that_was_set_aside_is_no_unknown_key_to_any_command(cli, stored, folder, command, characters):
    Path(stored[0]["path"]).chmod(0o600)
    Path(stored[0]["path"]).write_bytes(b"short")
    assert cli("path", stored[0]["key"]).code == 3
    ran = cli(command, stored[0]["key"][:characters])
    assert (ran.code, ran.out) == (3, "")
    assert f"{stored[0]['key'][:12]} (model.onnx): its engine was found damaged and set aside at 20" in ran.err
    assert "(its size is not the one that was stored)" in ran.err
    assert "Run `enginecache get` again with its model and options" in ran.err
    (kept,) = (folder / "quarantine").iterdir()
    assert f"The damaged file is kept as {kept}." in ran.err
    assert cli("get", stored[0]["model"]["path"], "--dim", "batch=1").code == 0
    assert cli(command, stored[0]["key"][:characters], *(["--yes"] if command == "rm" else [])).code == 0


def test_several_engines_that_were_set_aside_are_listed_with_their_reasons(cli, stored, cache):
    for record in stored:
        Path(record["path"]).unlink()
        assert "its file is missing" in cli("path", record["key"]).err
    error = cache._not_stored("")  # what a prefix that both have gets
    assert error.what.endswith(": 2 were set aside")
    assert all(f"{record['key'][:16]}  model.onnx: its engine was found" in error.fix for record in stored)


def test_stats_count_and_say_why_it_missed(cli, stored, folder):
    rows = cli("stats").rows
    assert {len(row) for row in rows} == {9}
    facts = {row[1]: row[2] for row in rows if row[0] == "count"}
    assert (facts["entries"], facts["size_bytes"], facts["misses"]) == ("2", "8192", "2")
    assert [row[:8] for row in rows if row[0] != "count"] == [
        ["miss", "model.onnx", "1", stored[1]["key"], "differs", stored[0]["key"], "model.onnx", "profiles[0].x"],
        ["miss", "model.onnx", "1", stored[0]["key"], "absent", "", "", ""],
    ]
    totals = cli("stats", "--json").json
    assert (totals["dir"], totals["builds_succeeded"], len(totals["latest_misses"])) == (str(folder), 2, 2)
    assert [miss["model"] for miss in totals["latest_misses"]] == ["model.onnx"] * 2
    shown = cli("stats", terminal=80).out
    assert "8 KiB" in shown
    assert "model.onnx" in shown


def test_stats_count_engines_by_their_last_use_and_claim_no_hits(cli, stored, cache):
    counts = cli("stats", "--json").json
    assert (counts["used_within_1d"], counts["used_within_30d"]) == (2, 2)
    assert not any("hit" in name for name in counts)
    two_days_ago = time.time() - 2 * 86400
    os.utime(cache.root.uses / stored[0]["key"], (two_days_ago, two_days_ago))
    (cache.root.uses / ("0" * 64)).touch()  # of no engine
    counts = cli("stats", "--json").json
    assert (counts["used_within_1d"], counts["used_within_30d"]) == (1, 2)
    cli("path", stored[0]["key"])
    assert cli("stats", "--json").json["used_within_1d"] == 2


def test_doctor_reports_one_line_each_on_a_pipe(cli, stored, folder):
    ran = cli("doctor")
    assert ran.code == 0
    assert all(len(row) == 4 and row[0] in {"ok", "warning"} for row in ran.rows)
    assert ["ok", "folder", f"{folder}, readable and writable", ""] in ran.rows
    checks = cli("doctor", "--json").json
    assert [check["name"] for check in checks] == [row[1] for row in ran.rows]
    assert "ok       folder        " in cli("doctor", terminal=80).out


def test_doctor_makes_no_folder(cli, folder):
    shutil.rmtree(folder)
    assert cli("doctor").code == 0
    assert not folder.exists()


def test_doctor_exits_with_the_code_of_the_problem(cli, folder, tmp_path):
    (folder / "registry.sqlite").write_text("this is no database, and long enough to be looked at" * 10)
    ran = cli("doctor")
    assert ran.code == 6
    assert any(row[:2] == ["problem", "registry"] and row[3] for row in ran.rows)
    assert json.loads(cli("doctor", "--json").out)
    (folder / "registry.sqlite").unlink()
    folder.chmod(0o707)
    ran = cli("doctor")
    folder.chmod(0o700)
    assert ran.code == 1
    assert "Name a folder below it" in ran.out


def mark_schema(folder, revision, reader):
    with contextlib.closing(sqlite3.connect(folder / "registry.sqlite")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", [revision])
        connection.execute("UPDATE schema_info SET oldest_reader = ?", [reader])


def test_registry_of_a_newer_release_is_exit_6(cli, stored, folder):
    mark_schema(folder, "9999", 99)
    ran = cli("ls")
    assert (ran.code, ran.out) == (6, "")
    assert "Upgrade enginecache" in ran.err
    mark_schema(folder, HEAD, 1)


def test_show_says_each_fact_once(cli, stored):
    names = [row[0] for row in cli("show", stored[0]["key"]).rows]
    assert len(names) == len(set(names))
    assert not any(name.startswith(("options.", "fields.")) or name == "model.path" for name in names)


def test_model_is_readable_on_a_terminal_of_80_columns(cli, stored):
    shown = cli("ls", terminal=80).out
    assert stored[0]["model"]["name"] in shown
    assert "BACKEND" not in shown
    assert "BACKEND" in cli("ls", terminal=160).out


def test_stats_do_not_count_an_interrupt_as_a_failed_build(cli, model, builder):
    def interrupt(_request):
        raise KeyboardInterrupt

    builder.before = interrupt
    assert cli("get", model, "--dim", "batch=1").code == 130
    assert cli("stats", "--json").json["builds_failed"] == 0
    builder.before = None
