"""Whatever a user can write ends in a result or in an ``EngineCacheError``: command lines, variables, files, calls.

The commands, options and settings come from the program itself, so a new one is tried too. Runs in this process, with a
builder that builds nothing: what is odd here never reaches TensorRT.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import typer
from fakes import FakeBuilder, fake_place
from hypothesis import example, given
from hypothesis import strategies as st
from models import linear, save

from enginecache.cache import EngineCache
from enginecache.cli.app import app
from enginecache.cli.error_report import wants_json
from enginecache.cli.main import main
from enginecache.config import _SETTINGS as SETTINGS
from enginecache.config import Config
from enginecache.errors import EngineCacheError, OptionError, shown
from enginecache.pipeline.results import Entry

EXIT_CODES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 130}
WITH_DATA_AND_A_CODE = {"check", "doctor", "verify", "explain", "inspect"}
"""Their exit code is about what they print; the others fail without a result."""

ODD_WORDS = r"""
    = : - -- a= =1 batch= batch=1:2 batch=0 batch=-1 batch=1:8:4 x: :1x2 nan inf -inf -1 0 1e400 1_000 ٣ 99999999999999d
    1e300d 2147483648 batch=2147483648 batch=9223372036854775808 x:18446744073709551616x8 x:1x8,x:1x8 'x:1x8 0x10 1Gb
    999999T sm_ sm_999 ~ ~nosuchuser/x ~/x . /dev/null /dev/zero /dev/null/x /proc/self/mem file://x [ {} %s {0} $HOME *
    ' " \ None true ffff TF32=OFF TF32= FP16 =OFF fp16 auto tensorrt tensorrt-rtx portable 8.9 89 8.9.9 🦀
"""
ODD_TEXTS = [
    *ODD_WORDS.split(),
    *("", " ", "\0", "a\0b", "\udcff", "\ud800", "\x1b[2J", "\n", "\r\n", "\t", "\u202e", "é" * 300, "a" * 100_000),
    *("x" * 250, "[" * 3000, "f" * 64, "g" * 64, "9" * 5000),
]
# No slash: a path of its own must not lead out of the test's folder.
TEXTS = st.sampled_from(ODD_TEXTS) | st.text(st.characters(exclude_characters="/"), max_size=12)
VARIABLES = [f"ENGINECACHE_{name.upper()}" for name in SETTINGS] + ["ENGINECACHE_CONFIG", "ENGINECACHE_UNKNOWN"]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Place:
    """A folder with a model and a cache that has an engine of it."""

    folder: Path
    key: str

    @property
    def model(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def open(self, config: Config | None = None, **arguments: Any) -> EngineCache:
        return EngineCache(config or Config.load(**arguments), builder=FakeBuilder(), place=fake_place)

    def run(self, arguments: Sequence[str], **environ: str) -> Ran:
        """Run a command line in this process, as a user without settings of their own."""
        out, err = io.BytesIO(), io.BytesIO()
        streams = [
            io.TextIOWrapper(file, encoding="utf-8", errors=how) for file, how in zip((out, err), ERRORS, strict=True)
        ]
        given = {"HOME": str(self.folder), "ENGINECACHE_DIR": str(self.cache), "PATH": os.environ["PATH"], **environ}
        with (
            mock.patch.dict(os.environ, given, clear=True),
            mock.patch.object(sys, "argv", ["enginecache", *arguments]),
            mock.patch.object(EngineCache, "open", self.open),
            contextlib.redirect_stdout(streams[0]),
            contextlib.redirect_stderr(streams[1]),
            chdir(self.folder),
            pytest.raises(SystemExit) as ended,
        ):
            main()
        for stream in streams:
            stream.flush()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Ran(code or 0, out.getvalue().decode(errors="surrogateescape"), err.getvalue().decode())


ERRORS = ("strict", "backslashreplace")
"""Return the form in which Python writes what standard output and standard error cannot encode."""


@contextlib.contextmanager
def chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("odd")
    model = save(linear(), folder / "model.onnx")
    with mock.patch.dict(os.environ, {"ENGINECACHE_CONFIG": os.devnull}):
        cache = EngineCache(Config(dir=folder / "cache"), builder=FakeBuilder(), place=fake_place)
        entry = cache.get(model, dims={"batch": 4})
        yield Place(folder, entry.key)
        assert cache.verify(deep=True).is_clean


def check(ran: Ran, arguments: Sequence[str]) -> None:
    """An exit code of the contract, no traceback, no bug, and one object on standard output where JSON was asked."""
    assert ran.code in EXIT_CODES
    assert "Traceback" not in ran.err
    assert "unexpected error" not in ran.err, ran.err
    assert ran.code == 0 or ran.err or arguments[0] in WITH_DATA_AND_A_CODE
    if not wants_json(arguments):
        return
    printed = json.loads(ran.out)
    if ran.code and not (arguments[0] in WITH_DATA_AND_A_CODE and "error" not in printed):
        assert set(printed) == {"error"}
        assert {"code", "exit_code", "message", "fix"} <= set(printed["error"])
        assert printed["error"]["exit_code"] == ran.code
        assert printed["error"]["code"] != "unexpected"


COMMANDS = {
    (*parents, name): [
        parameter
        for parameter in command.params
        if parameter.param_type_name == "option" and not {"--help", "--json"} & set(parameter.opts)
    ]
    for parents, group in [((), typer.main.get_command(app)), (("db",), typer.main.get_command(app).commands["db"])]
    for name, command in group.commands.items()
    if name != "db"
}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with odd values for some of its options and its argument."""
    names = draw(st.sampled_from(sorted(COMMANDS)))
    line = [*names]
    for option in draw(st.lists(st.sampled_from(COMMANDS[names]), max_size=3)):
        flag = draw(st.sampled_from(option.opts))
        if option.is_flag:
            line.append(flag)
        elif draw(st.booleans()) and flag.startswith("--"):
            line.append(f"{flag}={draw(TEXTS)}")
        else:
            line += [flag, draw(TEXTS)]
    line += draw(st.sampled_from([["--json"], []]))
    if names[0] not in {"ls", "stats", "doctor", "prune", "verify", "db"}:
        line.append(draw(st.sampled_from(["model.onnx", "cache", "KEY"]) | TEXTS))
    return line


@given(command_lines())
@example(["get", "--dim", "batch=\udcff", "--json", "model.onnx"])
@example(["get", "--dir", "\0", "model.onnx"])
@example(["inspect", "--json", "cache"])
@example(["inspect", "--loads-here", "--json", "model.onnx"])
@example(["check", "--json", "KEY", "--model", "model.onnx"])
def test_no_command_line_leaves_a_traceback(place, line):
    line = [place.key if word == "KEY" else word for word in line]
    check(place.run(line), line)


LOOKING = [["ls", "--json"], ["get", "model.onnx", "--dim", "batch=4", "--json"], ["stats"], ["verify", "--json"]]


@given(st.sampled_from(VARIABLES), TEXTS, st.sampled_from(LOOKING))
def test_no_variable_leaves_a_traceback(place, name, value, line):
    value = value.replace("\0", "").encode(errors="replace").decode()
    check(place.run(line, **{name: value}), line)


ODD_TOML = r"""
    1 -1 1.5 nan inf true [] [1] [['a']] {} {a=1} 1979-05-27 07:32:00 1979-05-27T07:32:00Z 'x' "\u0000" "\u202e" 1e400
    0x7fffffffffffffffffff
"""
TOML_VALUES = st.sampled_from(["", "[" * 5000, '"""\n"""', "9" * 5000, *ODD_TOML.split()]) | TEXTS.map(
    lambda text: json.dumps(text, ensure_ascii=False)
)
TOML = st.lists(
    st.tuples(st.sampled_from([*SETTINGS, "unknown", "dir.x", '""', "a b"]), TOML_VALUES).map(" = ".join), max_size=2
).map(lambda lines: "\n".join(lines).encode(errors="replace"))


@given(TOML | st.binary(max_size=40), st.sampled_from(LOOKING))
def test_no_settings_file_leaves_a_traceback(place, content, line):
    file = place.folder / "config.toml"
    file.write_bytes(content)
    check(place.run(line, ENGINECACHE_CONFIG=str(file)), line)


class Hostile:
    """An object that nothing takes."""

    def __repr__(self) -> str:
        return "<an object\x1b[2J>"


ODD_NUMBERS = [0, -1, 1, 3, 2**31, 2**63, 10**400, True, False, 1.5, float("nan"), float("inf"), -0.0]
ODD_VALUES = st.recursive(
    st.none()
    | st.sampled_from(ODD_NUMBERS)
    | TEXTS
    | st.binary(max_size=4)
    | st.builds(Hostile)
    | st.builds(pow, st.just(10), st.just(5000))
    | st.just({1, 2}),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["x", "batch", "", 1, None, "\udcff"]), inner, max_size=2)
    ),
    max_leaves=6,
)


def call(function: Any, *arguments: Any, **keywords: Any) -> None:
    with contextlib.suppress(EngineCacheError):
        function(*arguments, **keywords)


KEYWORDS = {
    method: sorted(inspect.signature(getattr(EngineCache, method)).parameters.keys() - {"self", "model", "trial"})
    for method in ("get", "explain", "load")
}


@given(st.sampled_from(sorted(KEYWORDS)), st.data())
def test_no_keyword_of_a_request_raises_an_error_of_another_kind(place, method, data):
    ask = data.draw(st.dictionaries(st.sampled_from(KEYWORDS[method]), ODD_VALUES, max_size=2))
    cache = place.open(dir=place.cache)
    with mock.patch.object(Entry, "load"):
        call(getattr(cache, method), place.model, **{"dims": {"batch": 4}, **ask})


@given(ODD_VALUES, st.sampled_from(["get", "explain", "load"]))
def test_no_model_raises_an_error_of_another_kind(place, model, method):
    cache = place.open(dir=place.cache)
    with chdir(place.folder), mock.patch.object(Entry, "load"):
        call(getattr(cache, method), model)


@given(st.dictionaries(st.sampled_from(sorted({*Config.__dataclass_fields__} - {"dir_from"})), ODD_VALUES, max_size=2))
def test_no_setting_of_an_open_raises_an_error_of_another_kind(place, settings):
    with chdir(place.folder):
        call(lambda: EngineCache.open(**{"dir": place.cache, **settings}).entries())


CALLS = {
    "plan_prune": ("max_size_bytes", "older_than_s"),
    "entries": ("limit",),
    "misses": ("limit",),
    "builds": ("key", "limit"),
    "find": ("prefix",),
    "find_intact": ("prefix",),
    "is_intact": ("engine",),
    "path": ("engine",),
    "pin": ("engine",),
    "remove": ("engine",),
    "unpin": ("engine",),
    "with_last_use": ("engine",),
}


@given(st.sampled_from(sorted(CALLS)), st.data())
def test_no_argument_of_a_method_raises_an_error_of_another_kind(place, method, data):
    ask = {name: data.draw(ODD_VALUES, name) for name in CALLS[method]}
    call(getattr(place.open(dir=place.cache), method), **ask)


def test_unknown_keyword_is_a_type_error(place):
    with pytest.raises(TypeError, match="dim"):
        place.open(dir=place.cache).get(place.model, dim={"batch": 4})


def test_loading_by_an_unknown_policy_is_refused_before_anything_is_loaded(place):
    entry = place.open(dir=place.cache).get(place.model, dims={"batch": 4})
    with pytest.raises(OptionError, match="trial: 'nevr'"):
        entry.load(trial="nevr")


@pytest.mark.parametrize("name", ["progress", "waiting", "made"])
def test_callback_that_cannot_be_called_is_refused_before_the_build(place, name):
    with pytest.raises(OptionError, match=name):
        place.open(dir=place.cache).get(place.model, dims={"batch": 5}, **{name: 1})


def test_value_whose_text_fails_is_named_by_its_type():
    assert shown(10**5000) == "<int>"
    assert shown([10**5000]) == "<list>"
    assert shown("x" * 1000) == "'" + "x" * 199 + "..."
