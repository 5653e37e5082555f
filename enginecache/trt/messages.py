"""TensorRT's lines for display: without places in its source, wrappings and noise.

Lines as TensorRT-RTX 1.7.1 (which shares TensorRT 11's parser and builder) writes them, 2026-11.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_REASON_CHARACTERS = 600

_WRAPPING = re.compile(r"^\S+ Error Code \d+: (?P<code>[\w ]+) \((?P<inner>.*)\)$", re.DOTALL)
_TELLING_CODES = {"OutOfMemory": "out of memory: "}
"""Codes of TensorRT without which its sentence says nothing: ``Requested size was 12036633 bytes``."""
_PLACES = (
    re.compile(r"\s*\bIn \w+ at \S+:\d+"),
    re.compile(r"\[\S+:\d+: \w+\]\s*"),
    re.compile(r"^\S+\.(?:cpp|h):\d+: "),
)
_CONDITION = re.compile(r'^\w+ && "(?P<text>.*)"$')
_BRACKETED = re.compile(r"^\((?P<text>[^()]*)\)$")
NO_DRIVER = re.compile(r"cudaError (?:35|100)\b|driver version is insufficient|no CUDA-capable device")


def clean_lines(lines: Sequence[str]) -> list[str]:
    """Return error lines without source places, repetitions and the noise of a machine without a driver.

    Each error on a machine without a driver is followed by a ``cudaError 35`` of its own, which explains nothing; it
    stays where it is all there is.
    """
    cleaned = list(dict.fromkeys(filter(None, (clean_line(line) for text in lines for line in _split(text)))))
    telling = [line for line in cleaned if not NO_DRIVER.search(line)]
    return telling or cleaned


def _split(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith(("---", "Node name:"))]


def clean_line(line: str) -> str:
    """Return one line without source places, TensorRT's wrapping and the condition of a C++ check."""
    match = _WRAPPING.match(line)
    line = _TELLING_CODES.get(match["code"], "") + match["inner"] if match else line
    for place in _PLACES:
        line = place.sub("", line)
    condition = _CONDITION.match(line.strip())
    line = condition["text"] if condition else line
    bracketed = _BRACKETED.match(line.strip())
    line = bracketed["text"] if bracketed else line
    return line.strip(" .")[:MAX_REASON_CHARACTERS]
