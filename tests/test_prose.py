"""Plain English: the worst habits of the prose, held at zero. CONTRIBUTING.md has the rules and the words to use."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("enginecache", "tests", "docs", "migrations", "benchmarks", "examples")

HABITS = {
    r"(?<![a-z])mend(s|ed|ing)?(?![a-z])": "fix, repair",
    r"\bbeside\b": "next to, besides",
    r"\btold\b": "reported, known",
    r"\bat rest\b": "no longer being written",
    r"\bof ours\b": "our, enginecache's",
    r"\bfor people\b": "for display, human-readable",
    r"\b(can|could|may|to) be had\b|\bis had\b": "available, enabled",
    r"\b[Ww]ho waits\b": "a process that waits",
    r"\bis no part of\b": "is not part of",
    r"\bis no (finding|use|way out)\b": "is not a finding, is useless, does not help",
    r"\bletters\b": "characters",
    r"\ba text\b": "a string",
    r"\b(is|are|was|were|be|been) gone\b": "is missing, was deleted",
    r"\bfor ever\b": "forever",
}
"""Patterns without false positives, and words to use instead."""

_CODE = re.compile(r"`[^`\n]*`|^```.*?^```$", re.MULTILINE | re.DOTALL)
_WH = re.compile(r"(What|Whether|Which|Who|Whose|Why|How)\b")


def files() -> list[Path]:
    found = [path for name in FOLDERS for kind in ("*.py", "*.md") for path in (ROOT / name).rglob(kind)]
    own = [path for path in found if (ROOT / "enginecache/migrations") not in path.parents and path != Path(__file__)]
    return sorted([*own, *ROOT.glob("*.md")])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


FILES = files()


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every docstring, those of attributes too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield node.lineno, value.value.strip()


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".py"], ids=name_of)
def test_a_docstring_begins_with_a_verb_or_a_noun(path):
    assert [f"{line}: {text[:60]}" for line, text in docstrings(path) if _WH.match(text)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "enginecache").rglob("*.py")), ids=name_of)
def test_a_functions_docstring_begins_with_a_verb(path):
    functions = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    ]
    texts = [(node.name, ast.get_docstring(node) or "") for node in functions]
    assert [name for name, text in texts if re.match(r"(The|An?|As|Of|In|One|Digest|Size)\b|[`(]", text)] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_words_mean_what_readers_expect(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":  # not in code, which may quote the words
        text = _CODE.sub(lambda code: "\n" * code[0].count("\n"), text)
    found = [
        f"{text.count(chr(10), 0, match.start()) + 1}: {match[0]} (write: {instead})"
        for habit, instead in HABITS.items()
        for match in re.finditer(habit, text)
    ]
    assert found == []
