"""The command line: parse, call one library method, hand the value to one output sink."""

from __future__ import annotations


def main() -> None:
    """Run the command line of this process; ends it with the exit code."""
    from enginecache.cli.app import app

    app(prog_name="enginecache")
