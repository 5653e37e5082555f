"""Messages name flags; exceptions name keywords, which can be copied into a call."""

from __future__ import annotations

import pytest
import typer
from models import linear, save

from enginecache.cli.app import app
from enginecache.errors import BuildError, EngineCacheError, OptionError, ProfileError
from enginecache.keywords import in_python


@pytest.mark.parametrize(
    ("flags", "keywords"),
    [
        ("Leave --offline out.", "Leave offline=True out."),
        ("Use --backend tensorrt-rtx, or --target sm_89.", "Use backend='tensorrt-rtx', or target='sm_89'."),
        ("Choose one with --device, such as --device 1.", "Choose one with device, such as device=1."),
        ("Raise --workspace, such as --workspace 1GiB.", "Raise workspace_bytes, such as workspace_bytes=1073741824."),
        ("Take --fp16.", "Take precision='fp16'."),
        ("--dim batch=1:8:32 --dim height=320", "dims={'batch': (1, 8, 32), 'height': 320}"),
        ("--dim 'my batch=MIN:OPT:MAX'.", "dims={'my batch': (MIN, OPT, MAX)}."),
        ("such as --dim NAME=SIZE.", "such as dims={'NAME': SIZE}."),
        ("no shape in --max-shapes", "no shape in maximum shapes"),
        ("Build it again with --rebuild and --check.", "Build it again with rebuild=True and check=True."),
        ("another tolerance with --max-error", "another tolerance with CheckOptions.max_error"),
        ("Run `enginecache get --offline`.", "Run `enginecache get --offline`."),
        ("an input named --x stays", "an input named --x stays"),
    ],
)
def test_flags_become_keywords_outside_of_commands(flags, keywords):
    assert in_python(flags) == keywords


def test_every_flag_of_get_becomes_a_keyword_but_for_those_of_the_output():
    get = typer.main.get_command(app).commands["get"]
    flags = {flag for option in get.params for flag in option.opts if flag.startswith("--")}
    assert {flag for flag in flags if in_python(flag) == flag} == {"--output", "--json", "--quiet"}


def test_shape_flags_become_one_profile_each():
    shapes = "--min-shapes 'x:1x3,\"a,b\":1,s:' --opt-shapes 'x:2x3,\"a,b\":1,s:' --max-shapes 'x:4x3,\"a,b\":1,s:'"
    profile = {"x": ((1, 3), (2, 3), (4, 3)), "a,b": ((1,), (1,), (1,)), "s": ((), (), ())}
    assert eval(f"dict({in_python(shapes)})") == {"profiles": [profile]}
    two = f"{shapes} {shapes} --dim n=1:2:3"
    assert eval(f"dict({in_python(two)})") == {"profiles": [profile, profile], "dims": {"n": (1, 2, 3)}}


def test_advice_of_an_exception_can_be_copied_into_the_call(open_cache, tmp_path):
    cache, model = open_cache(), save(linear(), tmp_path / "model.onnx")
    with pytest.raises(ProfileError) as caught:
        cache.get(model)
    lines = [line.strip() for line in str(caught.value).splitlines() if line.startswith(("  dims=", "  profiles="))]
    assert len(lines) == 2
    for line in lines:
        assert cache.get(model, **eval(f"dict({line})")).outcome in {"built", "hit"}


def test_an_error_has_flags_for_the_command_line_and_keywords_for_python():
    error = BuildError("it failed", "Try --rebuild.", "/logs/--offline")
    assert error.lines() == ["it failed", "Try --rebuild.", "The builder's log: /logs/--offline"]
    assert (error.what, error.fix) == ("it failed", "Try --rebuild.")
    assert "Try rebuild=True." in str(error)
    assert str(OptionError("a\x1bb")) == r"a\x1bb"
    assert str(EngineCacheError("a", "b\n\nc")) == "a\nb\nc"
