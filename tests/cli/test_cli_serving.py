import os
import re
import shutil
import time
from pathlib import Path

import pytest
from models import linear, save

from enginecache.errors import BuilderCrashError, BuildError, LockTimeoutError, ModelChangedError, ToolchainError

BATCH = ("--dim", "batch=1:8:32")


def test_get_prints_the_path_alone_and_talks_on_standard_error(cli, model, builder):
    ran = cli("get", model, *BATCH)
    assert ran.code == 0
    assert Path(ran.out.rstrip("\n")).read_bytes().startswith(b"vtrt")
    assert ran.out.count("\n") == 1
    assert "building model.onnx: Building engine, step 3 of 6" in ran.err
    assert "built in" in ran.err
    assert "no engine of this model is stored" in ran.err


def test_second_get_is_a_hit_with_the_same_path(cli, model, builder):
    first = cli("get", model, *BATCH)
    second = cli("get", model, *BATCH)
    assert (second.code, second.out) == (0, first.out)
    assert second.err.startswith("hit in ")
    assert builder.count == 1


def test_quiet_says_nothing_but_warnings(cli, model):
    assert cli("get", model, *BATCH, "-q").err == ""
    assert cli("get", model, *BATCH, "-q", "--workspace", "1MiB").err.startswith("warning: a workspace of 1 MiB")


def test_json_stands_instead_of_the_path(cli, model):
    ran = cli("get", model, *BATCH, "--json")
    assert ran.json["outcome"] == "built"
    assert ran.json["model"]["path"] == str(model)
    assert ran.json["profiles"] == [{"x": {"min": [1, 8], "opt": [8, 8], "max": [32, 8]}}]
    assert ran.out.isascii()
    assert "\n" in cli("get", model, *BATCH, "--json", terminal=80).out.strip()


@pytest.mark.parametrize("flags", [(), ("-q",)])
def test_offline_miss_is_exit_3_with_nothing_on_standard_output(cli, model, builder, flags):
    ran = cli("get", model, *BATCH, "--offline", *flags)
    assert (ran.code, ran.out, builder.count) == (3, "", 0)
    assert "Leave --offline out" in ran.err


def test_rebuild_builds_again(cli, model, builder):
    cli("get", model, *BATCH)
    assert "a rebuild was asked for" in cli("get", model, *BATCH, "--rebuild").err
    assert builder.count == 2


def test_copy_is_whole_and_is_no_link(cli, model, tmp_path):
    copy = tmp_path / "copy.engine"
    path = Path(cli("get", model, *BATCH, "-o", copy).out.strip())
    assert copy.read_bytes() == path.read_bytes()
    assert copy.stat().st_nlink == 1
    assert copy.stat().st_ino != path.stat().st_ino


@pytest.mark.parametrize(("where", "what"), [("", "is a folder"), ("none/x", "no folder"), (None, "-o is empty")])
def test_copy_that_cannot_be_is_said_before_the_build(cli, model, builder, tmp_path, where, what):
    ran = cli("get", model, *BATCH, "-o", "" if where is None else tmp_path / where)
    assert (ran.code, ran.out, builder.count) == (2, "", 0)
    assert what in ran.err


def test_copy_is_named_on_standard_error_and_the_path_in_the_cache_on_standard_output(cli, model, tmp_path, folder):
    ran = cli("get", model, *BATCH, "-o", tmp_path / "m.plan")
    assert ran.out.startswith(str(folder))
    assert ran.err.endswith(f"copied to {tmp_path / 'm.plan'}\n")
    assert "copied" not in cli("get", model, *BATCH, "-q", "-o", tmp_path / "m.plan").err


@pytest.mark.parametrize("how", ["itself", "link", "hard link"])
@pytest.mark.parametrize("victim", ["model.onnx", "weights.bin", "notes.txt", "config.toml", "cache/registry.sqlite"])
def test_copy_never_replaces_a_file_that_is_no_plan(cli, model, builder, cache, tmp_path, victim, how):
    file = model if victim == "model.onnx" else tmp_path / victim
    if not file.exists():
        file.write_bytes(b"weights and other words")
    kept = file.read_bytes()
    target = file if how == "itself" else tmp_path / "m.plan"
    if how == "link":
        target.symlink_to(file)
    elif how == "hard link":
        target.hardlink_to(file)
    ran = cli("get", model, *BATCH, "-o", target)
    assert (ran.code in {1, 2}, ran.out, builder.count) == (True, "", 0)
    assert file.read_bytes() == kept
    assert target.is_symlink() == (how == "link")


def test_copy_never_takes_the_place_of_a_hard_link_to_a_stored_engine(cli, model, builder, tmp_path):
    stored = Path(cli("get", model, *BATCH).out.strip())
    (tmp_path / "m.plan").hardlink_to(stored)
    ran = cli("get", model, *BATCH, "-o", tmp_path / "m.plan")
    assert ran.code == 2
    assert "hard link to a stored engine" in ran.err
    (tmp_path / "m.plan").unlink()


@pytest.mark.parametrize("magic", [b"ftrt", b"ptrt", b"vtrt", b""])
def test_copy_replaces_a_plan_and_an_empty_file(cli, model, tmp_path, magic):
    (tmp_path / "m.plan").write_bytes(magic * 100)
    ran = cli("get", model, *BATCH, "-o", tmp_path / "m.plan")
    assert ran.code == 0, ran.err
    assert (tmp_path / "m.plan").read_bytes() == Path(ran.out.strip()).read_bytes()


@pytest.mark.parametrize(("length", "code"), [(200, 0), (255, 0), (256, 2)])
def test_copy_takes_names_as_long_as_the_file_system_does(cli, model, builder, tmp_path, length, code):
    ran = cli("get", model, *BATCH, "-o", tmp_path / ("p" * length))
    assert (ran.code, builder.count) == (code, 1 if code == 0 else 0), ran.err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_copy_into_the_cache_or_over_a_device_is_refused_before_the_build(cli, model, builder, cache, folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for target in (folder / "x.plan", folder / "engines" / "x", "/dev/null", "/dev/stdout", tmp_path / "pipe", "-"):
        ran = cli("get", model, *BATCH, "-o", target)
        assert ran.code in {1, 2}
        assert (ran.out, builder.count) == ("", 0)


@pytest.mark.parametrize("command", ["get", "explain"])
@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["--target", ""], 2, "'' is not a compute capability"),
        (["--target", "sm_90a"], 2, "architecture-specific"),
        (["--target", "portable", "--target", "89"], 2, "cannot be combined"),
        (["--device", "-1"], 2, "--device: -1 is not a device"),
        (["--opt-level", "9"], 2, "optimization level 9"),
        (["--opt-level", "-1"], 2, "optimization level -1"),
        (["--workspace", "0"], 2, "0 bytes"),
        (["--workspace", "1x"], 2, "--workspace: '1x' is not a size"),
        (["--workspace", ""], 2, "--workspace: '' is not a size"),
        (["--dim", "batch"], 2, "NAME=MIN:OPT:MAX"),
        (["--dim", "batch=3:2:1"], 2, "not in order"),
        (["--dim", "none=1"], 2, "no dynamic dimension 'none'"),
        (["--min-shapes", "x:1x8"], 2, "do not make profiles"),
        (["--opt-shapes", "x"], 2, "not NAME:SHAPE"),
        (["--opt-shapes", "x:1x9"], 2, "static size of 8"),
        (["--opt-shapes", "z:1x9"], 2, "no input 'z'"),
        (["--dir", ""], 2, "empty path"),
        (["--dir", "{model}"], 1, "is not a folder"),
        (["--dir", "{model}/below"], 1, "cannot be used"),
    ],
)
def test_bad_value_is_an_error_with_a_way_out(cli, model, builder, command, arguments, code, what):
    arguments = [argument.format(model=model) for argument in arguments]
    shapes = () if any("shapes" in argument or "--dim" in argument for argument in arguments) else BATCH
    ran = cli(command, model, *shapes, *arguments)
    assert (ran.code, ran.out, builder.count) == (code, "", 0)
    first, *rest = ran.err.splitlines()
    assert first.startswith("error: ")
    assert what in ran.err
    assert rest
    assert all(line.startswith("  ") for line in rest)


@pytest.mark.parametrize(
    ("name", "what"),
    [("", "MODEL is empty"), ("-", "there is no file"), ("none.onnx", "there is no file"), (".", "is a folder")],
)
def test_no_model_is_exit_2(cli, tmp_path, monkeypatch, name, what):
    monkeypatch.chdir(tmp_path)
    ran = cli("get", name)
    assert (ran.code, ran.out) == (2, "")
    assert what in ran.err
    assert ran.err.count("\n") >= 2


def test_file_that_is_no_model_is_exit_2(cli, tmp_path):
    (tmp_path / "text.onnx").write_text("not ONNX")
    assert cli("get", tmp_path / "text.onnx").code == 2


def test_dynamic_model_without_shapes_is_told_the_exact_flags(cli, model):
    ran = cli("get", model)
    assert ran.code == 2
    assert "--dim batch=1:8:32" in ran.err
    assert "--min-shapes x:1x8 --opt-shapes x:8x8 --max-shapes x:32x8" in ran.err
    assert cli("get", model, *BATCH).code == 0


def test_flags_of_trtexec_and_named_dimensions_ask_for_the_same(cli, model, builder):
    cli("get", model, *BATCH)
    ran = cli("get", model, "--min-shapes", "x:1x8", "--opt-shapes", "x:8x8", "--max-shapes", "x:32x8")
    assert ran.err.startswith("hit")
    assert builder.count == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BuildError("refused: no tactic", "Try --workspace.", "/logs/1.log"), 7),
        (BuilderCrashError("the builder died of SIGSEGV", "", "/logs/1.log"), 7),
        (ToolchainError("another TensorRT was loaded"), 8),
        (ModelChangedError("the model changed while building", "Ask again."), 2),
        (LockTimeoutError("timed out"), 5),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_the_builder_raises_becomes_text_and_an_exit_code(cli, model, builder, error, code):
    def fail(_request):
        raise error

    builder.before = fail
    ran = cli("get", model, *BATCH)
    assert (ran.code, ran.out) == (code, "")
    assert "Traceback" not in ran.err
    if isinstance(error, BuildError):
        assert "  The builder's log: /logs/1.log\n" in ran.err
    builder.before = None
    remembered = 7 if isinstance(error, BuildError) else 0
    assert cli("get", model, *BATCH).code == remembered
    assert cli("get", model, *BATCH, "--rebuild").code == 0


def test_waiting_longer_than_the_time_out_is_exit_5(cli, model, cache):
    key = cli("explain", model, *BATCH, "--json").json["key"]
    with cache._storage.locks.hold(key, None):
        ran = cli("get", model, *BATCH, "--timeout", "0.2s")
    assert (ran.code, ran.out) == (5, "")
    assert re.search(
        r"^waiting for process \d+ on \S+ to build model\.onnx, which began \d+ s ago: 0 s so far$",
        ran.err,
        re.MULTILINE,
    )
    assert re.search(
        r"timed out after 0\.2 s of waiting for process \d+ on \S+, which began \d+ s ago$", ran.err, re.MULTILINE
    )
    assert "--timeout" in ran.err


def test_the_line_of_an_outcome_names_the_key_of_the_engine_that_is_given(cli, model):
    first = cli("get", model, *BATCH, "--json")
    second = cli("get", model, "--dim", "batch=1:2:9")
    assert f", key {first.json['key'][:12]}): no engine of this model is stored" in first.err
    built = cli("get", model, "--dim", "batch=1:2:9", "--json").json["key"]
    assert built != first.json["key"]
    assert re.search(
        rf"^built in [\d.]+ s \(.*, key {built[:12]}\): the nearest stored engine, ", second.err, re.MULTILINE
    )


def test_an_engine_of_a_wider_reach_is_a_hit_that_explain_and_get_describe_alike(cli, model):
    stored = cli("get", model, *BATCH, "--target", "sm_86", "--target", "sm_89", "--json").json
    ran = cli("get", model, *BATCH, "--target", "sm_86", "--offline")
    assert (ran.code, ran.out) == (0, f"{stored['path']}\n")
    assert re.search(
        r"^hit in .* a stored engine covers compute capability 8\.6: it was built for", ran.err, re.MULTILINE
    )
    assert "warning" not in ran.err
    explained = cli("explain", model, *BATCH, "--target", "sm_86", "--verbose").out
    assert explained.startswith("hit: a stored engine covers compute capability 8.6: it was built for several targets")
    assert f"stored   {stored['key']}\n" in explained


def test_an_engine_that_was_set_aside_as_damaged_is_a_reason_from_then_on(cli, model):
    path = Path(cli("get", model, *BATCH, "--json").json["path"])
    path.chmod(0o600)
    path.write_bytes(b"x" * path.stat().st_size)
    cli("get", model, *BATCH, "--offline")
    for _ in range(2):
        ran = cli("get", model, *BATCH, "--offline")
        assert (ran.code, ran.out) == (3, "")
        assert "its engine was found damaged and set aside at 20" in ran.err
        assert cli("explain", model, *BATCH, "--verbose").out.startswith(
            "miss: its engine was found damaged and set aside at 20"
        )
    assert "its engine was found damaged" in cli("get", model, *BATCH).err
    assert "found damaged" not in cli("explain", model, *BATCH, "--verbose").out


def test_explain_of_a_miss_names_key_fields_and_builds_nothing(cli, model, builder):
    ran = cli("explain", model, *BATCH, "--verbose")
    assert (ran.code, builder.count) == (0, 0)
    assert ran.out.startswith("miss: no engine of this model is stored\n")
    assert "  profiles[0].x.max: [32,8]\n" in ran.out
    assert '  toolchain.version: "1.7.1.116"\n' in ran.out


def test_explain_of_a_hit_names_the_digest(cli, model):
    got = cli("get", model, *BATCH, "--json").json
    ran = cli("explain", model, *BATCH, "--verbose")
    assert ran.code == 0
    assert ran.out.startswith("hit: ")
    assert got["digest"] in ran.out
    assert got["key"] in ran.out
    explained = cli("explain", model, *BATCH, "--json").json
    assert (explained["verdict"], explained["key"], explained["digest"]) == ("hit", got["key"], got["digest"])


def test_explain_names_the_nearest_engine_and_every_differing_field(cli, model):
    got = cli("get", model, *BATCH, "--json").json
    ran = cli("explain", model, *BATCH, "--target", "sm_120", "--opt-level", "5", "--verbose")
    assert f"refused     {got['key']}  model.onnx\n" in ran.out
    assert "  options.optimization_level: asked 5, stored 3\n" in ran.out
    assert "  it runs on compute capability 8.9, and 12.0 is asked for\n" in ran.out
    (candidate,) = cli("explain", model, *BATCH, "--target", "sm_120", "--opt-level", "5", "--json").json["candidates"]
    assert candidate["verdict"] == "refused"
    assert [reason["code"] for reason in candidate["reasons"]] == ["reach", "differs"]
    assert [entry["field"] for entry in candidate["differing"]] == [
        "options.optimization_level",
        "target.compute_capabilities",
    ]


def test_explain_names_the_last_failure_once_and_its_log(cli, model, builder):
    def fail(_request):
        raise BuildError("refused: no tactic")

    builder.before = fail
    cli("get", model, *BATCH)
    ran = cli("explain", model, *BATCH, "--verbose")
    assert ran.out.count("refused: no tactic") == 1
    assert Path(ran.out.rsplit("log: ", 1)[1].strip()).exists()


@pytest.mark.parametrize(
    "name", ["x" * 250 + ".onnx", "[red]bold[red].onnx", "größe 模型.onnx", "a\tb.onnx", "-x.onnx"]
)
def test_odd_model_names_go_through(cli, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    save(linear(), tmp_path / name)
    assert cli("get", *BATCH, "--", name).code == 0
    (row,) = cli("ls").rows
    assert (row[1], len(row)) == (name.replace("\t", r"\t"), 13)
    assert cli("show", row[0]).code == 0
    _, *lines = cli("ls", terminal=80).out.splitlines()  # the heading has escapes in it
    folded = "".join(line[14:].split("  ")[0].strip() for line in lines)
    assert folded.replace(" ", "") == row[1].replace(" ", "")
    assert max(map(len, lines)) <= 80


def test_same_model_under_another_path_is_a_hit(cli, model, builder, tmp_path):
    cli("get", model, *BATCH)
    shutil.copy(model, tmp_path / "other.onnx")
    os.utime(tmp_path / "other.onnx", (time.time() - 60,) * 2)
    assert cli("get", tmp_path / "other.onnx", *BATCH, "--json").json["outcome"] == "hit"
    assert builder.count == 1


def test_options_of_precision_and_reach_are_asked_of_the_builder_and_are_in_the_key(cli, model, builder, tmp_path):
    plugin = tmp_path / "plugin.so"
    plugin.write_bytes(b"a library")
    flags = ["--fp16", "--convert-io", "--strip-plan", "--builder-flag", "sparse-weights", "--builder-flag", "TF32=off"]
    shown = cli("get", model, *BATCH, *flags, "--plugin", plugin, "--json").json
    (request,) = builder.requests
    assert request.options.precision == ("fp16",)
    assert (request.options.convert_io, request.options.strip_plan) == (True, True)
    assert request.options.builder_flags == ("SPARSE_WEIGHTS", "TF32=OFF")
    assert [library.path for library in request.options.plugins] == [plugin]
    assert request.conversion is not None
    assert (shown["conversion"]["precision"], shown["conversion"]["keeps_io"]) == ("fp16", False)
    assert shown["options"] == request.options.keyed()
    assert cli("get", model, *BATCH, "--json").json["key"] != shown["key"]


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--accept", "anything"], "'--accept': 'anything' is not one of 'exact', 'compatible'."),
        (["--hardware-compatibility", "all"], "'--hardware-compatibility': 'all' is not one of 'none', 'same"),
        (["--backend", "cuda"], "'--backend': 'cuda' is not one of 'auto', 'tensorrt', 'tensorrt-rtx'."),
    ],
)
@pytest.mark.parametrize("command", ["get", "explain"])
def test_a_word_that_is_not_a_choice_is_an_error_that_lists_the_choices(cli, model, command, flags, what):
    ran = cli(command, model, *BATCH, *flags)
    assert (ran.code, ran.out) == (2, "")
    assert what in ran.err


@pytest.mark.parametrize(
    ("flags", "code", "what"),
    [
        (["--builder-flag", "FP16"], 2, "its own option"),
        (["--plugin", "/nothing/here.so"], 2, "cannot be read"),
        (["--plugin", ""], 2, "--plugin is empty"),
        (["--int8"], 2, "QuantizeLinear"),
        (["--fp16", "--bf16"], 2, "together"),
    ],
)
def test_option_that_cannot_be_had_is_said_before_anything_is_built(cli, model, builder, flags, code, what):
    ran = cli("get", model, *BATCH, *flags)
    assert (ran.code, ran.out, builder.count) == (code, "", 0)
    assert what in ran.err
    assert "\n  " in ran.err


def test_compatible_engine_is_marked_and_never_silent(cli, model):
    stored = cli("get", model, *BATCH, "--json").json
    ran = cli("get", model, "--dim", "batch=2:4:8", "--accept", "compatible", "--quiet", "--json")
    assert (ran.json["outcome"], ran.json["key"]) == ("compatible", stored["key"])
    assert ran.json["requested_key"] != stored["key"]
    assert [reason["code"] for reason in ran.json["reasons"]] == ["containing_profile"]
    assert f"warning: the engine {stored['key'][:12]} is not the one that was asked for: its profiles" in ran.err
    shown = cli("explain", model, "--dim", "batch=2:4:8", "--accept", "compatible", "--verbose")
    assert shown.out.startswith("compatible: ")
    assert cli("explain", model, "--dim", "batch=2:4:8", "--verbose").out.startswith("miss: ")


def test_no_timing_cache_reaches_the_build(cli, model, builder):
    cli("get", model, *BATCH, "--no-timing-cache")
    assert builder.requests[0].timing_cache is None


def test_explain_is_the_verdict_and_the_nearest_engine_and_no_list_of_defaults(cli, model):
    assert cli("explain", model, *BATCH).out == "miss: no engine of this model is stored\n"
    cli("get", model, *BATCH)
    assert cli("explain", model, *BATCH).out.count("\n") == 1
    out = cli("explain", model, *BATCH, "--opt-level", "5").out
    assert "nearest: " in out
    assert "optimization_level" in out
    assert out.count("\n") <= 4


def test_explain_gates_a_deployment_with_exit_code(cli, model):
    assert (cli("explain", model, *BATCH).code, cli("explain", model, *BATCH, "--exit-code").code) == (0, 3)
    cli("get", model, *BATCH)
    assert cli("explain", model, *BATCH, "--exit-code").code == 0
