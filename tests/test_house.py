"""Rules of the code that no linter checks, and the script that runs everything."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


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


def test_ci_runs_every_check():
    """The linters are steps of their own: two of them take longer than most of the tests."""
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for command in ("ruff check .", "ruff format --check .", "mypy", "lint-imports"):
        assert re.search(rf"^\s*\.venv/bin/{re.escape(command)}$", script, re.MULTILINE), command
        assert f".venv/bin/{command}" in contributing, command
