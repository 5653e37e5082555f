"""Write ``docs/cli.md`` from the commands themselves: ``python docs/make_cli_reference.py``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import typer

from enginecache.cli.app import app

PATH = Path(__file__).with_name("cli.md")

HEAD = """\
# Command line

Written by `docs/make_cli_reference.py` from the commands themselves. `enginecache COMMAND --help` says the same.
Every command also takes `-h` and `--help`. `enginecache --install-completion` sets up completion in your shell, and
`enginecache --show-completion` prints it.

"""

OTHERS = {"help", "install_completion", "show_completion"}
"""Options that typer adds, in words of its own."""


def reference() -> str:
    """The whole page."""
    root: Any = typer.main.get_command(app)
    return HEAD + "\n".join(_sections(root, "enginecache"))


def _sections(command: Any, name: str) -> list[str]:
    sections = [_section(command, name)]
    for child in getattr(command, "commands", {}).values():
        sections += _sections(child, f"{name} {child.name}")
    return sections


def _section(command: Any, name: str) -> str:
    text, _, examples = inspect.cleandoc(command.help or "").replace("\b\n", "").partition("Examples:\n")
    usage = " ".join([name, *(f"{p.metavar}" for p in command.params if not p.opts[0].startswith("-"))])
    usage += " COMMAND" if hasattr(command, "commands") else ""
    lines = [f"## {name}", "", f"    {usage} [OPTIONS]", "", text.strip(), ""]
    rows = [_row(parameter) for parameter in command.params if parameter.name not in OTHERS]
    if rows:
        lines += ["| | |", "|---|---|", *rows, ""]
    if examples:
        lines += ["```sh", *(line.strip() for line in examples.splitlines()), "```", ""]
    return "\n".join(lines)


def _row(parameter: Any) -> str:
    if not parameter.opts[0].startswith("-"):
        return f"| `{parameter.metavar}` | {parameter.help} |"
    names = " ".join(f"`{name}`" for name in parameter.opts)
    value = f" `{parameter.metavar}`" if parameter.metavar else ""
    return f"| {names}{value} | {parameter.help} |"


if __name__ == "__main__":
    PATH.write_text(reference(), encoding="utf-8")
