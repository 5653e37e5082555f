"""The checks of the house, each a test: none is skipped, and each tool reads its settings from pyproject.toml."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "--no-cache", "."),
        ("ruff", "format", "--no-cache", "--check", "."),
        ("mypy",),
        ("lint-imports", "--no-cache"),
    ],
    ids=" ".join,
)
def test_check_finds_nothing(command, tmp_path):
    cache = ("--cache-dir", str(tmp_path)) if command[0] == "mypy" else ()
    ran = subprocess.run(
        [SCRIPTS / command[0], *command[1:], *cache], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_libraries_that_are_imported_by_name_are_so_in_their_places_alone():
    """import-linter cannot see these."""
    users = {
        path.relative_to(ROOT / "enginecache").as_posix()
        for path in (ROOT / "enginecache").rglob("*.py")
        if re.search(r"\bimport_module\(|__import__", path.read_text(encoding="utf-8"))
    }
    assert users == {"__init__.py", "trt/loaded_version.py", "storage/registry/schema.py"}
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "enginecache").rglob("*.py")}
    assert [name for name, text in texts.items() if re.search(r"^\s*(import|from) tensorrt", text, re.MULTILINE)] == []


def test_no_module_is_long():
    lengths = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").count("\n")
        for path in (ROOT / "enginecache").rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_ci_runs_the_one_command_of_the_readme():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=False).returncode == 0
    (pattern,) = re.findall(r"grep -xE '(.*)' README\.md", script)
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line.strip() for line in readme if re.fullmatch(pattern, line)] == [
        "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && .venv/bin/python -m pytest"
    ]
    assert "pytest" not in script.replace(pattern, "")
