"""Write ``docs/terminal.svg``, the README's picture, from real output: ``python docs/make_terminal_picture.py``.

It needs TensorRT-RTX, and no GPU. Times and sizes are those of the machine that it runs on.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
PATH = Path(__file__).with_name("terminal.svg")
WIDTH = 120
HOME = "/home/you"

COMMANDS = (
    "enginecache get examples/cifar.onnx --dim batch=1:32:64 --target sm_89",
    "enginecache get examples/cifar.onnx --dim batch=1:32:64 --target sm_89",
    "enginecache explain examples/cifar.onnx --dim batch=1:32:64 --target sm_89 --workspace 1GiB",
    "enginecache ls",
)


def picture() -> str:
    """Run the commands in a home folder of their own and return what a terminal showed, as SVG."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    with tempfile.TemporaryDirectory() as home:
        for command in COMMANDS:
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
            console.print(Text.from_ansi(_run(command, home).replace(home, HOME)))
    # No fonts from the web: the picture is complete in itself, and readers have a monospaced font.
    without_fonts = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(title="enginecache", code_format=without_fonts, unique_id="enginecache")


def _run(command: str, home: str) -> str:
    """Return what the command says and prints, without its progress; standard output is a terminal."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ENGINECACHE_", "XDG_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**kept, "HOME": home, "PATH": path, "TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, WIDTH, 0, 0))
    with os.fdopen(leader, "rb", buffering=0) as terminal:
        arguments = shlex.split(command)
        ran = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=follower, stderr=subprocess.PIPE)
        os.close(follower)
        said = ran.communicate(timeout=120)[1].decode()
        shown = _drain(terminal).decode()
    if ran.returncode:
        raise RuntimeError(f"{command} ended with {ran.returncode}: {said}")
    lines = [line for line in said.splitlines() if not line.startswith("building ")]
    return "\n".join([*lines, shown.replace("\r\n", "\n").rstrip("\n")]).strip("\n")


def _drain(terminal: io.FileIO) -> bytes:
    chunks = []
    while True:
        try:
            chunk = terminal.read(1 << 16)
        except OSError:  # how Linux ends a terminal whose other side is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    return b"".join(chunks)


if __name__ == "__main__":
    PATH.write_text(picture(), encoding="utf-8")
