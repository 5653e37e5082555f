"""A command fails with one line, an exit code, an object with --json, and never a traceback."""

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys

import pytest
from models import EXAMPLE

from enginecache import errors
from enginecache.cache import EngineCache
from enginecache.cli.error_report import wants_json
from enginecache.errors import EngineCacheError
from enginecache.storage.folder import Root

COMMAND = [sys.executable, "-m", "enginecache"]
BATCH = ("--dim", "batch=1:8:32")


def fail_with(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        TypeError("bad \x1b[2J\nthing"),
        RecursionError("deep"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
        OverflowError("too large"),
        AssertionError(),
        type("Panic", (BaseException,), {})("a panic"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_unforeseen_exception_is_one_line_and_its_details_are_in_the_logs(cli, cache, monkeypatch, error):
    monkeypatch.setattr(EngineCache, "get", fail_with(error))
    ran = cli("get", "m.onnx", "--json")
    assert ran.code == 1
    assert "Traceback" not in ran.err
    assert ran.err.startswith(f"error: unexpected error: {type(error).__name__}")
    assert "\x1b" not in ran.err
    assert ran.err.count("\n") == 2
    (log,) = cache.root.logs.iterdir()
    assert f"Details were written to {log}" in ran.err
    assert "Traceback" in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600
    assert ran.json["error"]["code"] == "unexpected"
    assert re.fullmatch(r"[0-9a-f]{32}\.log", log.name), "a name that is deleted with the other old logs"


def test_details_never_go_into_a_folder_that_is_no_cache(cli, tmp_path, monkeypatch):
    (tmp_path / "project/logs").mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(EngineCache, "open", fail_with(TypeError("bad")))
    ran = cli("get", "m.onnx", "--dir", tmp_path / "project")
    assert list((tmp_path / "project/logs").iterdir()) == []
    assert f"Details were written to {tmp_path}/enginecache-error-" in ran.err


def test_memory_that_ran_out_is_called_so(cli, monkeypatch):
    monkeypatch.setattr(EngineCache, "get", fail_with(MemoryError()))
    ran = cli("get", "m.onnx", "--json")
    assert (ran.code, ran.json["error"]["code"]) == (1, "out_of_memory")
    assert "out of memory" in ran.err


@pytest.mark.parametrize("is_limited", [True, False])
def test_error_that_python_has_no_words_for_is_memory_where_memory_is_limited(cli, monkeypatch, is_limited):
    error = SystemError("<built-in function compile> returned NULL without setting an exception")
    monkeypatch.setattr(EngineCache, "get", fail_with(error))
    limit = 1 << 30 if is_limited else resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (limit, limit))
    ran = cli("get", "m.onnx")
    assert ran.code == 1
    assert ("out of memory" in ran.err) is is_limited
    assert ("this is a bug" in ran.err) is not is_limited


def test_broken_package_is_no_bug_in_enginecache(cli, monkeypatch):
    monkeypatch.setattr(EngineCache, "get", fail_with(ImportError("built for another NumPy", name="numpy.core")))
    ran = cli("get", "m.onnx")
    assert ran.code == 1
    assert "a Python package that enginecache needs cannot be imported: built for another NumPy" in ran.err
    assert "pip check" in ran.err
    assert "this is a bug" not in ran.err


def test_import_that_lacks_memory_is_not_a_missing_package(cli, monkeypatch):
    error = ImportError("libx.so: failed to map segment from shared object")
    monkeypatch.setattr(EngineCache, "get", fail_with(error))
    assert cli("get", "m.onnx", "--json").json["error"]["code"] == "out_of_memory"


def test_error_of_the_system_that_nobody_translated_is_in_words(cli, cache, monkeypatch):
    monkeypatch.setattr(EngineCache, "get", fail_with(OSError(30, "Read-only file system", "/x")))
    ran = cli("get", "m.onnx", "--json")
    assert (ran.code, ran.json["error"]["code"]) == (1, "store")
    assert ran.err.startswith("error: /x: Read-only file system")


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EngineCacheError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_an_object_with_its_code_and_exit_code(cli, cache, monkeypatch, kind):
    monkeypatch.setattr(EngineCache, "get", fail_with(kind("what \x1b", "fix")))
    ran = cli("get", "m.onnx", "--json")
    assert ran.code == kind.exit_code
    expected = {"code": kind.code, "exit_code": kind.exit_code, "message": "what \x1b", "fix": "fix"}
    assert ran.json == {"error": expected}
    assert ran.err == "error: what \\x1b\n  fix\n"
    assert cli("get", "m.onnx").out == ""


def test_codes_are_different_and_documented():
    codes = {kind.code for kind in KINDS}
    assert len(codes) == len(KINDS)


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        (["get", "--json"], "usage", 2),
        (["get", "m.onnx", "--bogus", "--json"], "usage", 2),
        (["bogus", "--json"], "usage", 2),
        (["show", "f00", "--json"], "not_cached", 3),
        (["show", "xyz", "--json"], "option", 2),
        (["rm", "--json"], "usage", 2),
        (["prune", "--max-size", "x", "--json"], "option", 2),
    ],
)
def test_failing_command_prints_one_object_with_json(cli, cache, arguments, code, exit_code):
    ran = cli(*arguments)
    assert ran.code == exit_code
    assert (ran.json["error"]["code"], ran.json["error"]["exit_code"]) == (code, exit_code)
    assert ran.json["error"]["message"]


def test_interrupt_is_an_object_too(cli, cache, monkeypatch):
    monkeypatch.setattr(EngineCache, "get", fail_with(KeyboardInterrupt()))
    ran = cli("get", "m.onnx", "--json")
    assert (ran.code, ran.json["error"]["code"], ran.err) == (130, "interrupted", "interrupted\n")


def test_json_is_looked_for_before_the_end_of_the_options():
    assert wants_json(["get", "x", "--json"])
    assert not wants_json(["get", "--", "--json"])


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["ls", "--model", "x"], None),
        (["ls", "--sort", "x"], None),
        (["get", "m.onnx", "--min-shape", "x:1"], "--min-shapes"),
        (["get", "m.onnx", "--fp-16"], "--fp16"),
        (["ls", "--dri", "x"], "--dir"),
    ],
)
def test_only_options_that_look_like_the_typed_one_are_suggested(cli, arguments, hint):
    err = cli(*arguments).err
    assert "No such option: --" in err
    assert (hint in err.partition("Possible options: ")[2]) if hint else "Possible options" not in err


def run(*arguments, limit=None, **environ):
    """Run a command line in a process of its own, under a limit."""

    def restrict():
        if limit is not None:
            name, value = limit
            resource.setrlimit(name, (value, value))

    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=restrict,
        env={**os.environ, **environ},
    )


@pytest.mark.rtx
@pytest.mark.parametrize("mib", [100, 200, 300])
def test_little_memory_is_called_so_and_is_no_interrupt(folder, mib):
    ran = run("get", EXAMPLE, *BATCH, "--target", "sm_89", limit=(resource.RLIMIT_AS, mib << 20))
    assert ran.returncode == 1, ran.stderr
    assert "out of memory" in ran.stderr or "ran out of memory" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.rtx
@pytest.mark.parametrize("count", [6, 8, 10])
def test_few_descriptors_are_named_with_the_limit_to_raise(folder, count):
    EngineCache.open(dir=folder)
    ran = run("get", EXAMPLE, *BATCH, "--target", "sm_89", limit=(resource.RLIMIT_NOFILE, count))
    assert ran.returncode == 1, ran.stderr
    assert "Too many open files" in ran.stderr
    assert "ulimit -n" in ran.stderr
    assert EngineCache.open(dir=folder).explain(EXAMPLE, dims={"batch": (1, 8, 32)}, target="sm_89").failure == "" or (
        "Too many open files" in ran.stderr
    )


@pytest.mark.parametrize(
    "environ",
    [
        {"ENGINECACHE_GRACE": "99999999999999d"},
        {"ENGINECACHE_TIMEOUT": "1e300d"},
        {"ENGINECACHE_FAILURE_TTL": "nan"},
        {"ENGINECACHE_MAX_SIZE": "9" * 19 + "T"},
        {"ENGINECACHE_CUDA_MAJOR": "9" * 5000},
    ],
    ids=lambda environ: next(iter(environ)),
)
def test_absurd_setting_is_an_error_line_that_names_it(folder, environ):
    ran = run("verify", **environ)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert next(iter(environ)) in ran.stderr
    assert max(map(len, ran.stderr.splitlines())) < 300


def test_signal_that_ends_a_command_is_not_an_unexpected_error(folder):
    """The report of an interrupt does not stand in the way of the signal that caused it."""
    Root.open(folder)
    code = (
        "import os, signal, sys; import enginecache.cache as c\n"
        "c.EngineCache.get = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.argv = ['enginecache', 'get', 'x']\n"
        "from enginecache.cli.main import main; main()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (-signal.SIGTERM, "interrupted\n")


def test_object_of_an_error_is_one_line_on_a_pipe(cli):
    out = cli("show", "xyz", "--json").out
    assert out.count("\n") == 1
    json.loads(out)


@pytest.mark.parametrize("name", ["cache", "with space", "it's"])
@pytest.mark.parametrize("form", ["--dir={}", "--dir {}"])
def test_suggested_command_names_the_folder_that_was_named_and_runs(cli, model, tmp_path, name, form):
    folder = tmp_path / name
    key = cli("get", model, "--dim", "batch=1", "--dir", folder, "--json").json["key"]
    cli("pin", key, "--dir", folder)
    given = [word.format(folder) for word in form.split()]
    ran = cli("rm", key, "--yes", *given)
    (command,) = re.findall(r"Run `enginecache (unpin [^`]*)`", ran.err)
    assert cli(*shlex.split(command)).code == 0
    assert cli("rm", key, "--yes", *given).code == 0
    fix = cli("show", key, "--json", *given).json["error"]["fix"]
    assert fix == f"See `enginecache ls --dir {shlex.quote(str(folder))}`."


def test_suggested_command_has_no_folder_where_none_was_given(cli):
    assert "See `enginecache ls`." in cli("show", "0" * 64).err
