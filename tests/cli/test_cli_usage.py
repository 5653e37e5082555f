import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer

import enginecache
from enginecache.cli.app import app
from enginecache.cli.output import _plain, format_age
from enginecache.files.units import utc_now
from enginecache.storage.registry.schema import HEAD

ROOT = Path(__file__).parents[2]


def walk(command, path=()):
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from walk(child, (*path, name))


COMMANDS = dict(walk(typer.main.get_command(app)))
EXAMPLES = [
    line.strip()
    for command in COMMANDS.values()
    for line in (command.help or "").partition("Examples:\n")[2].splitlines()
    if line.strip()
]


def enginecache_words(example):
    """The words of the enginecache command in an example: inside ``$(...)``, or before a pipe."""
    inner = re.search(r"\$\((enginecache [^)]*)\)", example)
    return shlex.split(inner[1] if inner else example.split("|")[0])


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_says_what_it_does_in_one_line_and_ends_in_examples(cli, path):
    ran = cli(*path, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == cli(*path, "-h").out
    command = COMMANDS[path]
    if path == ("db",):
        return
    assert 1 <= len((command.help or "").partition("Examples:\n")[2].split("\n  enginecache")) <= 4
    assert "Examples:" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80


def test_list_of_commands_cuts_no_sentence(cli):
    assert "..." not in cli("--help").out.partition("Commands:")[2]
    assert "..." not in cli("db", "--help").out.partition("Commands:")[2]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_understood(example):
    name, *words = enginecache_words(example)
    assert name == "enginecache"
    path = tuple(words[: 2 if words[0] == "db" else 1])
    # Parses options and arguments as a call would, and calls nothing.
    with COMMANDS[path].make_context("enginecache", words[len(path) :]) as context:
        assert "dir" in context.params


def test_every_command_takes_dir_and_means_the_same_by_it():
    helps = {
        next(parameter.help for parameter in command.params if "--dir" in parameter.opts)
        for path, command in COMMANDS.items()
        if path and path != ("db",)
    }
    assert len(helps) == 1


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["get", "--bogus"], "--bogus"),
        (["bogus"], "bogus"),
        (["show"], "KEY"),
        (["get"], "MODEL"),
        (["ls", "--limit", "x"], "--limit"),
        (["get", "m.onnx", "--opt-level", "x"], "--opt-level"),
        (["db", "bogus"], "bogus"),
    ],
)
def test_usage_error_is_exit_2_and_names_the_help(cli, arguments, what):
    ran = cli(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert what in ran.err
    assert "--help' for help" in ran.err


def test_version(cli):
    assert cli("--version").out == f"enginecache {enginecache.__version__}\n"


def test_database_commands(cli, folder):
    shutil.rmtree(folder)
    for command in ("current", "check"):
        ran = cli("db", command)
        assert (ran.code, ran.out) == (2, "")
        assert "the folder does not exist" in ran.err
    assert not folder.exists()
    assert cli("db", "upgrade", "--json").json == {"schema": 1, "before": None, "revision": HEAD}
    assert cli("db", "upgrade").err == f"schema {HEAD} -> {HEAD}\n"
    assert cli("db", "current", "--json").json == {"schema": 1, "revision": HEAD, "newest_known": HEAD}
    assert cli("db", "check").code == 0


def test_reference_is_that_of_the_commands():
    spec = importlib.util.spec_from_file_location("make_cli_reference", ROOT / "docs/make_cli_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    assert module.reference() == written, "run `python docs/make_cli_reference.py`"


def test_control_characters_cannot_break_a_line_or_steer_a_terminal():
    assert _plain("a\tb\nc\x1b[31md\x9be") == r"a\tb\nc\x1b[31md\x9be"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "just now"), (59, "just now"), (60, "1 min ago"), (7199, "1 h ago"), (86400 * 3, "3 d ago")],
)
def test_ages_are_rounded_down(seconds, text):
    import datetime as dt

    assert format_age(utc_now() - dt.timedelta(seconds=seconds)) == text
