"""The README and the manual show what really happens."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from enginecache.config import Config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {"cli.md", "environment.md", "python.md"}
"""Their words are those of docstrings and rules; the examples in ``cli.md`` run in ``tests/cli/test_cli_usage.py``."""
NO_CODE = {"", "text"}

_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``why`` says why it does not run."""

    page: str
    language: str
    text: str
    why: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0][:60]}"


def blocks_of(path: Path) -> list[Block]:
    found = _BLOCK.finditer(path.read_text(encoding="utf-8"))
    return [Block(path.name, match["language"], match["text"], match["why"] or "") for match in found]


BLOCKS = [block for path in PAGES if path.name not in GENERATED for block in blocks_of(path)]


def run_of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and not block.why]


def normal(text: str, home: Path | str = "/home/you") -> str:
    """Without what differs between two runs: progress, the home folder, digests, times."""
    text = text.replace(str(home), "/home/you")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("building "))
    text = re.sub(r"\b[0-9a-f]{2}/[0-9a-f]{64}", "XX/HEX", text)
    text = re.sub(r"\b[0-9a-f]{12,64}\b", "HEX", text)
    return re.sub(r"\d+(\.\d+)? s\b", "TIME s", text).strip()


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One home folder for all blocks of a page, which are read in order."""
    return {path.name: tmp_path_factory.mktemp("home") for path in PAGES}


def run(command: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ENGINECACHE_", "XDG_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**inherited, "HOME": str(home), "PATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def script(name: str):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_a_landing_page():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert lines[2].startswith("enginecache is a cache of TensorRT engines")


# Code blocks


def test_each_block_runs_or_says_why_not():
    runs = {"console", "python", "toml"}
    silent = [str(block) for block in BLOCKS if block.language not in runs | NO_CODE and not block.why]
    assert silent == []


@pytest.mark.rtx
@pytest.mark.parametrize("block", run_of("console"), ids=str)
def test_a_terminal_block_prints_what_it_shows(block, homes):
    home = homes[block.page]
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, *shown = part.splitlines()
        assert command.startswith("enginecache ")
        ran = run(["bash", "-c", command], home)
        assert normal("\n".join(shown)) in normal(ran.stderr + ran.stdout, home), ran


@pytest.mark.rtx
@pytest.mark.parametrize("page", sorted({block.page for block in run_of("python")}))
def test_python_blocks_of_a_page_run_and_print_what_their_comments_say(page, homes):
    code = "\n".join(block.text for block in run_of("python") if block.page == page)
    ran = run([sys.executable, "-c", code], homes[page])
    assert ran.returncode == 0, ran.stderr
    shown = re.findall(r"^ *print\(.*\)  # (.*)$", code, flags=re.MULTILINE)
    printed = normal(ran.stdout, homes[page]).splitlines()
    assert len(shown) == len(printed)
    for wanted, line in zip(shown, printed, strict=True):
        start, _, end = normal(wanted).partition("...")
        assert line.startswith(start)
        assert line.endswith(end)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.why], ids=str)
def test_a_block_that_does_not_run_is_well_formed(block):
    if block.language == "python":
        compile(block.text, block.page, "exec")
    if block.language == "sh":
        assert subprocess.run(["bash", "-n"], input=block.text, text=True, check=False).returncode == 0


@pytest.mark.parametrize("block", run_of("toml"), ids=str)
def test_an_example_of_the_settings_can_be_read(block, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(block.text, encoding="utf-8")
    assert Config.load({"ENGINECACHE_CONFIG": str(file)}).dir_from


# Links


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.*?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_each_link_leads_to_a_file_and_a_heading(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        led = (path.parent / name).resolve() if name else path
        assert led.is_file(), target
        assert ROOT in led.parents, target
        assert not anchor or anchor in anchors(led), target


def test_each_page_of_the_manual_that_is_named_exists_and_is_in_the_index():
    sources = [*PAGES, *(ROOT / "enginecache").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    named = {
        name
        for path in sources
        for name in re.findall(r"\bdocs/[a-z_]+\.(?:md|py|svg)", path.read_text(encoding="utf-8"))
    }
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"]({path.name})" not in index] == ["index.md"]


# What is generated


def test_the_python_reference_is_that_of_the_docstrings():
    written = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    assert script("make_python_reference").reference() == written, "run `python docs/make_python_reference.py`"


def words(picture: str) -> str:
    """The text of a terminal picture, a line of it on a line."""
    lines: dict[str, list[str]] = {}
    for y, text in re.findall(r'<text [^>]*?y="([\d.]+)"[^>]*>(.*?)</text>', picture):
        lines.setdefault(y, []).append(html.unescape(text).replace("\xa0", " "))
    joined = (" ".join("".join(parts).split()) for parts in lines.values())
    return re.sub(r"TIME s ago|just now", "NOW", normal("\n".join(joined)))


@pytest.mark.rtx
def test_the_terminal_picture_is_current_and_names_nothing_of_a_machine():
    picture = (ROOT / "docs/terminal.svg").read_text(encoding="utf-8")
    assert "enginecache get examples/cifar.onnx" in words(picture)
    assert words(script("make_terminal_picture").picture()) == words(picture), (
        "run `python docs/make_terminal_picture.py`"
    )
    assert set(re.findall(r"(?<![\w./])/\w+", words(picture))) == {"/home"}


# Tables


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_commands_of_the_table_are_all_commands():
    from enginecache.cli.app import app

    table = page("operations.md").split("Every option is in", 1)[0]
    named = set(re.findall(r"`([a-z]+)(?: [^`]*)?`", table))
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    groups = {group.name for group in app.registered_groups}
    assert (commands | groups) <= named


def kinds_of_errors() -> list[type]:
    from enginecache import errors

    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


def test_the_exit_codes_of_the_table_are_those_of_the_errors():
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page("troubleshooting.md"), flags=re.MULTILINE)}
    assert {kind.exit_code for kind in kinds_of_errors()} | {0, 130} == codes


def test_the_error_codes_of_the_table_are_those_of_the_errors():
    listed = re.findall(r"^\| `(\w+)` \| (\d+) \|", page("troubleshooting.md"), flags=re.MULTILINE)
    raised = {(kind.code, str(kind.exit_code)) for kind in kinds_of_errors() if hasattr(kind, "what") or kind.code}
    assert sorted(listed) == sorted(raised - {("error", "1")})


def test_the_settings_of_the_table_are_all_settings():
    from enginecache.config import _SETTINGS

    named = set(re.findall(r"^\| `(\w+)` \| `ENGINECACHE_", page("settings.md"), flags=re.MULTILINE))
    assert named == set(_SETTINGS)


def test_the_reason_codes_of_the_table_are_all_codes():
    from enginecache.key.matching import REASON_CODES

    listed = re.findall(r"^\| `(\w+)` \| [^|]+ \|$", page("keys.md").split("Each reason has", 1)[1], re.MULTILINE)
    assert sorted(listed) == sorted(REASON_CODES)


def test_the_architecture_names_each_module():
    found = {path.stem for path in (ROOT / "enginecache").glob("*.py") if not path.stem.startswith("__")}
    found |= {f"{path.parent.name}/" for path in (ROOT / "enginecache").glob("*/__init__.py")}
    named = set(re.findall(r"`([\w/]+)`", page("architecture.md")))
    assert sorted(found - {"migrations/"} - named) == []


def test_each_promise_is_held_by_tests_that_exist():
    table = page("reliability.md").split("| promise |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    assert len(table) >= 20
    for row in table:
        held_by = re.findall(r"`(tests/[\w/]+\.py)`((?:: `\w+`(?:, `\w+`)*)?)", row.rsplit("|", 2)[1])
        assert held_by, row
        for file, names in held_by:
            tests = set(re.findall(r"^def test_(\w+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))
            assert set(re.findall(r"`(\w+)`", names)) <= tests, file
