"""Behaviour that only a separate process shows: pipes, closed streams, locales, signals."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import FakeBuilder, fake_place
from models import EXAMPLE
from waiting import LIMIT_S

from enginecache.cache import EngineCache
from enginecache.config import Config

COMMAND = [sys.executable, "-m", "enginecache"]


def run(*arguments, shell="", **environ):
    """Run a command line; ``shell`` is what a shell adds to it."""
    command = ["sh", "-c", f'"$@" {shell}', "sh", *COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, env={**os.environ, **environ}, timeout=LIMIT_S, check=False, cwd="/", text=True
    )


@pytest.fixture
def stored(tmp_path, model, monkeypatch):
    """Two engines in the cache that the environment names; the model has a name outside ASCII."""
    monkeypatch.setenv("ENGINECACHE_DIR", str(tmp_path / "cache"))
    cache = EngineCache(Config(dir=tmp_path / "cache"), builder=FakeBuilder(), place=fake_place)
    model = model.rename(model.with_name("größe.onnx"))
    yield [cache.get(model, dims={"batch": size}) for size in (1, 2)]
    assert cache.verify(deep=True).is_clean


def unread(tmp_path, *arguments):
    """Exit code and standard error of a command line whose reader has closed its end before the first byte."""
    code, err = tmp_path / "code", tmp_path / "err"
    script = f'{{ sleep 0.3; "$@" 2> {err}; echo $? > {code}; }} | true'
    subprocess.run(["bash", "-c", script, "bash", *COMMAND, *map(str, arguments)], timeout=LIMIT_S, check=True, cwd="/")
    return int(code.read_text()), err.read_text()


@pytest.mark.parametrize(
    "arguments", [("ls", "-q"), ("ls", "--json"), ("show", "{key}"), ("--help",), ("ls", "--help")]
)
def test_reader_that_has_enough_is_no_error(stored, tmp_path, arguments):
    assert unread(tmp_path, *(part.format(key=stored[0].key) for part in arguments)) == (0, "")


def test_reader_that_has_enough_changes_no_exit_code(stored, tmp_path):
    stored[0].path.chmod(0o600)
    stored[0].path.write_bytes(b"damaged")
    code, _ = unread(tmp_path, "verify", "--deep", "--json")
    assert code == 4
    stored[0].path.unlink()
    Path(f"{stored[0].path.with_suffix('.json')}").unlink()
    run("verify", "--repair", "--yes")


def test_path_that_nobody_reads_is_an_error_of_two_lines(stored, tmp_path):
    code, err = unread(tmp_path, "path", stored[0].key)
    assert code == 1
    assert err.startswith("error: standard output was closed before the answer was written to it\n")
    assert err.count("\n") == 2


def test_head_gets_its_line(stored):
    ran = run("ls", "-q", shell="| head -1")
    assert (ran.stdout, ran.stderr) == (f"{stored[1].key}\n", "")


@pytest.mark.parametrize("where", [">&-", "> /dev/full"])
@pytest.mark.parametrize("arguments", [("ls", "--json"), ("--version",), ("--help",), ("ls", "--help")])
def test_output_that_cannot_be_written_is_an_error_of_two_lines(stored, where, arguments):
    ran = run(*arguments, shell=where)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: standard output cannot be written: ")
    assert ran.stderr.count("\n") == 2


def test_closed_standard_error_puts_no_talk_into_the_data(stored, tmp_path):
    ran = run("path", stored[0].key, shell="2>&-")
    assert (ran.returncode, ran.stdout) == (0, f"{stored[0].path}\n")
    ran = run("pin", stored[0].key, shell="2>&- <&-")
    assert (ran.returncode, ran.stdout) == (0, "")
    ran = run("show", "0" * 64, shell="2>&-")
    assert (ran.returncode, ran.stdout) == (3, "")


@pytest.mark.parametrize(
    "environ",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii:strict"},
    ],
)
def test_locale_without_utf8_prints_what_it_can(stored, environ):
    ran = run("ls", **environ, shell="| iconv -f latin1 -t utf-8")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[0].split("\t")[1] in {"größe.onnx", "gr\\xf6\\xdfe.onnx"}
    records = json.loads(run("ls", "--json", **environ).stdout)
    assert records[0]["model"]["name"] == "größe.onnx"


def test_folder_whose_name_is_not_utf8_is_printed_byte_for_byte(stored, tmp_path):
    odd = tmp_path / os.fsdecode(b"\xff")
    (tmp_path / "cache").rename(odd)
    ran = subprocess.run(
        [*COMMAND, "ls", "--json", "--limit", "1"],
        capture_output=True,
        check=False,
        env={**os.environ, "ENGINECACHE_DIR": str(odd)},
    )
    odd.rename(tmp_path / "cache")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)[0]["path"].startswith(str(odd))


def on_terminal(*arguments, columns=80, **environ):
    """Return the output of a command line on a terminal."""
    main, side = pty.openpty()
    ran = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=side,
        stdout=side,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "COLUMNS": str(columns), "TERM": "xterm", **environ},
    )
    os.close(side)
    text = b""
    with contextlib.suppress(OSError):  # how Linux says that the last writer closed a terminal
        while chunk := os.read(main, 4096):
            text += chunk
    os.close(main)
    return ran.wait(timeout=LIMIT_S), text.decode()


def test_real_terminal_gets_a_table_and_no_colour_where_none_is_wanted(stored):
    code, text = on_terminal("ls", NO_COLOR="1", LC_ALL="C.UTF-8")
    assert code == 0
    assert "LAST USED" in text
    assert stored[0].key[:12] in text
    assert stored[0].key not in text
    assert "\x1b[3" not in text


@pytest.mark.rtx
def test_interrupted_build_is_exit_130_and_leaves_a_clean_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINECACHE_DIR", str(tmp_path / "cache"))
    command = [*COMMAND, "get", str(EXAMPLE), "--dim", "batch=1:8:32", "--target", "sm_89", "--opt-level", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ran:
        assert ran.stderr.readline() == f"made a new cache in {tmp_path / 'cache'}\n"
        assert ran.stderr.readline().startswith("building cifar.onnx")
        ran.send_signal(signal.SIGINT)
        out, err = ran.communicate(timeout=LIMIT_S)
    assert (ran.returncode, out, err) == (130, "", "interrupted\n")
    cache = EngineCache(Config(dir=tmp_path / "cache"))
    found = cache.verify(deep=True)
    assert found.is_clean
    assert not found.young_orphans


@pytest.mark.parametrize("variables", [{}, {"OPENBLAS_NUM_THREADS": "4"}])
def test_ctrl_c_under_a_memory_limit_is_an_interrupt_and_no_lack_of_memory(tmp_path, variables):
    """While NumPy is loaded, where OpenBLAS would raise the same signal for want of memory."""
    interrupting = tmp_path / "numpy"
    interrupting.mkdir()
    (interrupting / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    limited = 'ulimit -v 8000000; exec "$@"'
    environ = {**os.environ, **variables, "ENGINECACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    command = ["bash", "-c", limited, "bash", *COMMAND, "get", str(EXAMPLE), "--dim", "batch=4", "--target", "sm_89"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=LIMIT_S, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_before_the_command_line_is_parsed_is_an_interrupt_too(tmp_path):
    program = (
        "from enginecache.cli import fast_path\ndef stop(*_): raise KeyboardInterrupt\n"
        "fast_path.answer = stop\nfast_path.main()"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "interrupted\n")
