"""What the README shows is what happens."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def normal(text: str, home: Path) -> str:
    """Without what differs between two runs: the home folder, digests and times."""
    text = text.replace(str(home), "/home/you")
    text = re.sub(r"\b[0-9a-f]{2}/[0-9a-f]{64}", "XX/HEX", text)
    text = re.sub(r"\b[0-9a-f]{12,64}\b", "HEX", text)
    return re.sub(r"\d+(\.\d+)? s\b", "TIME s", text).strip()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home folder for all blocks: they are read in order."""
    return tmp_path_factory.mktemp("home")


def environment(home: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ENGINECACHE_", "XDG_"))}
    scripts = str(Path(sys.executable).parent)
    return {**inherited, "HOME": str(home), "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.rtx
@pytest.mark.parametrize("block", blocks("console"), ids=lambda block: block.splitlines()[0][2:60])
def test_terminal_blocks_print_what_they_show(block, home):
    command, *shown = block.splitlines()
    assert command.startswith("$ enginecache ")
    ran = subprocess.run(
        shlex.split(command[2:]),
        cwd=ROOT,
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    printed = normal(ran.stderr + ran.stdout, home)
    wanted = normal("\n".join(shown), home)
    # A quick build may say no line of progress; `explain` goes on after the line that is shown.
    assert wanted in printed or wanted.split("\n", 1)[-1] in printed, ran


@pytest.mark.rtx
def test_python_blocks_run(home):
    script = "\n".join(blocks("python"))
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("hit ")
    assert "exact a stored engine has exactly this key" in ran.stdout


def test_the_commands_of_the_table_are_all_commands():
    from enginecache.cli.app import app

    table = README.split("## Commands", 1)[1].split("| exit code", 1)[0]
    named = set(re.findall(r"`([a-z]+)(?: [^`]*)?`", table.split("All options", 1)[0]))
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    groups = {group.name for group in app.registered_groups}
    assert (commands | groups) <= named


def test_the_exit_codes_of_the_table_are_those_of_the_errors():
    from enginecache import errors

    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)}
    raised = {
        kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)
    }
    assert raised | {0, 130} == codes


def test_the_settings_of_the_table_are_all_settings():
    from enginecache.config import _SETTINGS

    named = set(re.findall(r"^\| `(\w+)` \| `ENGINECACHE_", README, flags=re.MULTILINE))
    assert named == set(_SETTINGS)


def test_the_first_thirty_lines_say_what_why_and_how():
    head = "\n".join(README.splitlines()[:32])
    for words in (
        "A cache of TensorRT engines",
        "pip install",
        "$ enginecache get",
        "from enginecache import EngineCache",
    ):
        assert words in head
