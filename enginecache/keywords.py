"""Command-line flags in the terms of Python: ``--target sm_89`` is the keyword ``target="sm_89"``.

Messages name flags. The command line prints them as they are; the text of an exception has the keywords of
:meth:`enginecache.EngineCache.get` instead, so that each reader gets advice to copy.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

_NAMES = {
    "--offline": "offline",
    "--rebuild": "rebuild",
    "--convert-io": "convert_io",
    "--version-compatible": "version_compatible",
    "--strip-plan": "strip_plan",
    "--verify-model": "verify_model",
    "--check": "check",
    "--require-check": "require_check",
    "--no-timing-cache": "timing_cache=False",
    "--inputs": "CheckOptions.inputs",
    "--input-range": "CheckOptions.ranges",
    "--check-seed": "CheckOptions.seed",
    "--max-error": "CheckOptions.max_error",
    "--backend": "backend",
    "--target": "target",
    "--accept": "accept",
    "--hardware-compatibility": "hardware_compatibility",
    "--device": "device",
    "--opt-level": "optimization_level",
    "--workspace": "workspace_bytes",
    "--timeout": "timeout_s",
    "--builder-flag": "builder_flags",
    "--plugin": "plugins",
    "--dim": "dims",
    "--dir": "dir",
}
_SWITCHES = frozenset(
    {
        "offline",
        "rebuild",
        "convert_io",
        "version_compatible",
        "strip_plan",
        "verify_model",
        "check",
        "require_check",
    }
)
_TEXTS = frozenset({"backend", "target", "accept", "hardware_compatibility"})
_LISTS = frozenset({"builder_flags", "plugins"})
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

_WORD = r"""(?:[^\s'"]|'[^']*'|"[^"]*")+"""
_SHAPES = rf"--min-shapes {_WORD} --opt-shapes {_WORD} --max-shapes {_WORD}"
_COMMAND = re.compile(r"(`[^`]*`)")
"""A command in a message; its flags stay."""
_DIM = rf"--dim (?:'[^']*=\w+(?::\w+:\w+)?'|{_WORD}=\w+(?::\w+:\w+)?)"
_RUN = re.compile(rf"(?:{_SHAPES}|{_DIM})(?: (?:{_SHAPES}|{_DIM}))*")
_VALUE = re.compile(
    r"--(?:backend (?:tensorrt-rtx|tensorrt|auto)|target (?:sm_\d+[a-z]?|portable)|accept (?:exact|compatible)"
    r"|hardware-compatibility (?:none|same_compute_capability|ampere_plus)|(?:device|opt-level) \d+"
    r"|workspace \d+(?:KiB|MiB|GiB)|builder-flag [A-Z_0-9]+(?:=OFF)?|plugin FILE)(?!\w)"
)
_FLAG = re.compile(r"--[a-z][a-z0-9-]*[a-z0-9]")


def in_python(text: str) -> str:
    """Return a message with keywords in place of flags; commands between backticks stay as they are."""
    if "--" not in text:
        return text
    parts = _COMMAND.split(text)
    return "".join(part if part.startswith("`") else _translated(part) for part in parts)


def _translated(text: str) -> str:
    for pattern, translate in _STEPS:
        text = pattern.sub(lambda match, translate=translate: translate(match[0]), text)  # type: ignore[misc]
    return text


def _shapes(line: str) -> str:
    """Return the keywords ``dims`` and ``profiles`` for a line of flags that give shapes."""
    words = shlex.split(line)
    dims: list[str] = []
    profiles: list[str] = []
    corners: list[dict[str, str]] = []
    for flag, value in zip(words[::2], words[1::2], strict=True):
        if flag == "--dim":
            name, _, sizes = value.rpartition("=")
            numbers = sizes.split(":")
            dims.append(f"{name!r}: {numbers[0] if len(numbers) == 1 else '(' + ', '.join(numbers) + ')'}")
            continue
        corners.append(_shapes_of(value))
        if len(corners) == 3:
            inputs = (f"{name!r}: ({', '.join(corner[name] for corner in corners)})" for name in corners[0])
            profiles.append("{" + ", ".join(inputs) + "}")
            corners = []
    found = [f"profiles=[{', '.join(profiles)}]"] if profiles else []
    return ", ".join([*found, *([f"dims={{{', '.join(dims)}}}"] if dims else [])])


def _shapes_of(text: str) -> dict[str, str]:
    """Return the shapes in ``x:1x3,"y,z":4``, as tuples are written in Python."""
    found: dict[str, str] = {}
    for item in re.findall(r"""(?:[^,'"]|'[^']*'|"[^"]*")+""", text):
        name, _, shape = item.rpartition(":")
        sizes = [size for size in shape.split("x") if size]
        is_quoted = len(name) > 1 and name[0] == name[-1] and name[0] in "'\""
        found[name[1:-1] if is_quoted else name] = f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
    return found


def _value(flag: str) -> str:
    """Return the keyword for a flag with its value."""
    flag, value = flag.split(" ")
    name = _NAMES[flag]
    if name in _LISTS:
        return f"{name}=[{value!r}]"
    if name == "workspace_bytes":
        return f"{name}={int(value[:-3]) * _UNITS[value[-3:]]}"
    return f"{name}={value!r}" if name in _TEXTS else f"{name}={value}"


def _flag(flag: str) -> str:
    """Return the keyword for a flag that stands alone."""
    if flag in {"--fp16", "--bf16", "--int8", "--fp8"}:
        return f"precision={flag[2:]!r}"
    if flag in {"--min-shapes", "--opt-shapes", "--max-shapes"}:
        return {"--min": "minimum", "--opt": "optimum", "--max": "maximum"}[flag[:5]] + " shapes"
    name = _NAMES.get(flag)
    return flag if name is None else f"{name}=True" if name in _SWITCHES else name


_STEPS: tuple[tuple[re.Pattern[str], Callable[[str], str]], ...] = (
    (_RUN, _shapes),
    (_VALUE, _value),
    (_FLAG, _flag),
)
