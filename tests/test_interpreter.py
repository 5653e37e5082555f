"""The Python of a child process: only one that is known to be a Python, and its faults are not the model's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from fakes import TOOLCHAIN, fake_place
from models import linear, save

from enginecache.cache import EngineCache
from enginecache.config import Config
from enginecache.errors import ConfigError, InterpreterError
from enginecache.trt import child, interpreter
from enginecache.trt.interpreter import Interpreter, environment_for, interpreters

HERE = Path(os.path.realpath(sys.executable))
PREFIXES = ("prefix", "exec_prefix", "base_prefix", "base_exec_prefix")


def script(path: Path, text: str = "") -> Path:
    """A program that leaves a trace where it is started."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho started >> '{path.parent}/started'\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def _to_every_pipe(line: str) -> str:
    """A program that takes the descriptors which it is given for its own, as something that Python loads may do."""
    write = (
        "import os; pipes = [n for n in range(3, 30) if os.path.realpath(f'/proc/self/fd/{n}').find('/pipe:') >= 0]; "
        f"[os.write(n, b'{line}' + bytes([10])) for n in pipes]"
    )
    return f'{HERE} -S -c "{write}"'


def is_started(path: Path) -> bool:
    return (path.parent / "started").exists()


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No Python is where the prefixes say."""
    for name in PREFIXES:
        monkeypatch.setattr(sys, name, str(tmp_path / "nowhere"))
    monkeypatch.setattr(sys, "_base_executable", "", raising=False)


@pytest.fixture
def open_real(tmp_path):
    """Opens a cache with the real builder, for a TensorRT-RTX that the tests believe in."""

    def open_one(**settings) -> EngineCache:
        return EngineCache(Config(dir=tmp_path / "cache", **settings), place=fake_place)

    return open_one


def test_a_python_is_taken_as_it_is():
    assert interpreters()[0] == Interpreter(sys.executable)


@pytest.mark.parametrize("executable", [None, "", 5, b"/usr/bin/python3", "/bin/true", "/no/such/python3", "python3"])
def test_where_the_executable_is_no_python_the_prefix_has_one(monkeypatch, executable):
    monkeypatch.setattr(sys, "executable", executable)
    (first, *_) = interpreters()
    assert first.path.startswith(sys.prefix)
    assert os.path.realpath(first.path) == str(HERE)


def test_program_that_embeds_python_is_not_started_though_it_has_the_name_of_one(monkeypatch, nowhere):
    monkeypatch.setattr(sys, "executable", os.path.realpath("/proc/self/exe"))
    monkeypatch.setattr(sys, "orig_argv", [])
    with pytest.raises(InterpreterError, match="no Python to run the builder with is known"):
        interpreters()


def test_executable_that_is_deleted_is_no_error_of_its_own(monkeypatch, nowhere):
    monkeypatch.delattr(sys, "executable")
    with pytest.raises(InterpreterError, match=r"sys\.executable is empty"):
        interpreters()


def test_executable_in_a_closed_folder_is_passed_over(monkeypatch):
    """As after a server has given up root: its own Python lies where it may not look any more."""
    real = os.stat

    def closed(path, *arguments, **keywords):
        if str(path).startswith("/closed/"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(os, "stat", closed)
    monkeypatch.setattr(sys, "executable", "/closed/bin/python3")
    (first, *_) = interpreters()
    assert os.path.realpath(first.path) == str(HERE)
    with pytest.raises(InterpreterError, match="not a program that this user may run"):
        interpreters("/closed/bin/python3")


def test_where_none_is_known_the_error_says_how_to_name_one(monkeypatch, nowhere):
    monkeypatch.setattr(sys, "executable", None)
    with pytest.raises(InterpreterError, match=r"sys\.executable is empty") as caught:
        interpreters()
    assert "ENGINECACHE_PYTHON" in caught.value.fix
    assert caught.value.exit_code == 8
    assert interpreters(HERE)[0].path == str(HERE)  # the advice helps


@pytest.mark.parametrize("name", ["uwsgi", "app.bin", "python-app", "mypython", "blender", "pythonserver", "ipython"])
def test_a_program_that_embeds_python_is_never_started(monkeypatch, nowhere, tmp_path, open_real, name):
    program = script(tmp_path / "programs" / name)
    monkeypatch.setattr(sys, "executable", str(program))
    cache = open_real()
    with pytest.raises(InterpreterError, match="is not a Python interpreter"):
        cache.get(save(linear(), tmp_path / "m.onnx"), dims={"batch": 4})
    assert not is_started(program)
    (attempt,) = cache.builds()
    assert (attempt.state, attempt.is_lasting) == ("failed", False)


def test_a_frozen_program_is_never_started_whatever_its_name(monkeypatch, nowhere, tmp_path):
    program = script(tmp_path / "programs" / "python3")
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(sys, "_base_executable", str(program), raising=False)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(InterpreterError, match="this program is frozen"):
        interpreters()
    assert interpreters(HERE) == (Interpreter(str(HERE), has_our_modules=False),)
    assert not is_started(program)


@pytest.mark.parametrize("name", ["python", "python3", "any-name"])
def test_a_link_counts_by_what_it_leads_to(monkeypatch, nowhere, tmp_path, name):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / name
    link.symlink_to(HERE)
    monkeypatch.setattr(sys, "executable", str(link))
    assert interpreters() == (Interpreter(str(link)),)
    link.unlink()
    link.symlink_to(script(tmp_path / "programs" / "server"))
    with pytest.raises(InterpreterError):
        interpreters()


def test_the_first_python_on_path_may_be_another_version(monkeypatch, nowhere, tmp_path):
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "programs" / "python2.7")))
    with pytest.raises(InterpreterError):
        interpreters()


@pytest.mark.parametrize(
    "name",
    ["python", "python3", "python3.12", "python3.13t", "python3.11d", "python3-dbg", "pypy3.10", ".python3.11-wrapped"],
)
def test_names_of_interpreters(name):
    assert interpreter._NAME.fullmatch(name)


def test_one_on_path_can_be_named(monkeypatch, tmp_path):
    program = script(tmp_path / "programs" / "mine")
    monkeypatch.setenv("PATH", str(program.parent))
    assert interpreters("mine")[0].path == str(program)
    with pytest.raises(InterpreterError, match="theirs, which is named to run the builder"):
        interpreters("theirs")


def test_settings_name_one(tmp_path):
    def load(text: str) -> str | None:
        return Config.load({"ENGINECACHE_CONFIG": "/dev/null", "ENGINECACHE_PYTHON": text}).python

    assert load("python3.11") == "python3.11"
    assert load("~/bin/python") == str(Path("~/bin/python").expanduser())
    assert Config(dir=tmp_path, python=Path("/usr/bin/python3")).python == "/usr/bin/python3"
    with pytest.raises(ConfigError):
        Config(dir=tmp_path, python="")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("exit 0", "is not a Python that can run enginecache: it ended with status 0"),
        ("echo no such module >&2; exit 1", "it ended with status 1: no such module"),
        ("kill -SEGV $$", "it ended by SIGSEGV"),
        (f'{HERE} "$@"', "starts Python as a process of its own"),
        (_to_every_pipe("no report"), "wrote 'no report' to a file descriptor that is not its own"),
        (_to_every_pipe("[1]"), "wrote '[1]' to a file descriptor"),
        (_to_every_pipe("{}"), "wrote '{}' to a file descriptor"),
    ],
)
def test_a_named_program_that_is_no_python_is_not_the_models_fault(open_real, tmp_path, text, why):
    program = script(tmp_path / "programs" / "python3", text)
    model = save(linear(), tmp_path / "m.onnx")
    cache = open_real(python=str(program))
    for _ in range(2):  # the second time too: nothing was remembered
        with pytest.raises(InterpreterError) as caught:
            cache.get(model, dims={"batch": 4})
        assert why in caught.value.what
    assert [build.is_lasting for build in cache.builds()] == [False, False]
    assert cache.explain(model, dims={"batch": 4}).verdict == "miss"


def test_a_program_that_hangs_is_ended(open_real, tmp_path, monkeypatch):
    monkeypatch.setattr(child, "START_TIMEOUT_S", 0.5)
    cache = open_real(python=str(script(tmp_path / "programs" / "python3", "exec sleep 60")))
    with pytest.raises(InterpreterError, match="has not run a child within"):
        cache.get(save(linear(), tmp_path / "m.onnx"), dims={"batch": 4})


def test_another_release_of_enginecache_is_refused(open_real, tmp_path, monkeypatch):
    monkeypatch.setattr(child, "VERSION", "99")
    with pytest.raises(InterpreterError, match=r"has enginecache [\d.]+, and this process has 99"):
        open_real().get(save(linear(), tmp_path / "m.onnx"), dims={"batch": 4})


@pytest.mark.rtx
def test_a_script_that_becomes_python_builds(open_real, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    wrapper = script(tmp_path / "programs" / "wrapper", f'exec "{sys.executable}" "$@"')
    entry = open_real(python=str(wrapper)).get(save(linear(), tmp_path / "m.onnx"), dims={"batch": 4})
    assert (entry.outcome, entry.record.tensorrt_version) == ("built", TOOLCHAIN.version)


@pytest.mark.rtx
def test_the_interpreters_own_modules_are_used_where_ours_do_not_serve(open_real, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(child, "module_search_path", lambda: [str(tmp_path / "nothing")])
    entry = open_real(python=sys.executable).get(save(linear(), tmp_path / "m.onnx"), dims={"batch": 4})
    assert entry.outcome == "built"


def test_a_frozen_program_gives_its_libraries_to_no_other_python(monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    own = Interpreter("/usr/bin/python3", has_our_modules=False)
    given = {"PYTHONPATH": "/bundle", "LD_LIBRARY_PATH": "/bundle", "LD_LIBRARY_PATH_ORIG": "/cuda", "TZ": "UTC"}
    assert environment_for(own, given) == {"LD_LIBRARY_PATH": "/cuda", "TZ": "UTC"}
    assert environment_for(Interpreter("/usr/bin/python3"), given) == given
