"""Builder options: our frozen record of what TensorRT's builder config is set to."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, field, fields
from typing import Any

from enginecache.errors import OptionError

MIB = 1 << 20
SMALL_WORKSPACE_BYTES = 16 * MIB
_SIZE = re.compile(r"(?P<number>\d{1,19}(?:\.\d{1,9})?)\s*(?P<unit>[kmgt]i?b?|b)?", re.IGNORECASE | re.ASCII)
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_MAX_BYTES = 1 << 62


def _keyed(reason: str, default: Any) -> Any:
    """A field that decides the plan's bytes, and so is part of the key."""
    return field(default=default, metadata={"keyed": True, "reason": reason})


@dataclass(frozen=True)
class BuildOptions:
    """What the builder config is set to.

    Every field carries, in its metadata, whether it is part of the key and why.

    Attributes:
        workspace_bytes: Limit of the workspace memory pool in bytes; None leaves TensorRT's own default, which is the
            device's whole memory. 1 GiB is usual.
        optimization_level: ``builder_optimization_level``, 0 (fastest build) to 5 (fastest engine).
            3 is TensorRT's default. Source: NVIDIA, IBuilderConfig, TensorRT 8.6 to 11.4.

    Raises:
        OptionError: A value is out of range.
    """

    workspace_bytes: int | None = _keyed("a smaller workspace excludes tactics, and so changes the plan", None)
    optimization_level: int = _keyed("decides how many tactics are tried", 3)

    def __post_init__(self) -> None:
        # 3.0 and True are equal to integers and make other keys: one request must not have two.
        if self.workspace_bytes is not None:
            object.__setattr__(self, "workspace_bytes", _whole("workspace_bytes", self.workspace_bytes))
        object.__setattr__(self, "optimization_level", _whole("optimization_level", self.optimization_level))
        if self.workspace_bytes is not None and not 0 < self.workspace_bytes <= _MAX_BYTES:
            message = f"a workspace of {self.workspace_bytes} bytes is out of range"
            raise OptionError(message, "Give a size from 1 byte to 4 EiB, such as --workspace 1GiB.")
        if not 0 <= self.optimization_level <= 5:
            message = f"optimization level {self.optimization_level} is out of range"
            raise OptionError(message, "Give --opt-level 0 (fastest build) to 5 (fastest engine); 3 is the default.")

    def keyed(self) -> dict[str, int | None]:
        """The fields that belong to the key, defaults written out, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["keyed"]}

    def warnings(self) -> tuple[str, ...]:
        """What the user should know about these values before a build."""
        if self.workspace_bytes is not None and self.workspace_bytes < SMALL_WORKSPACE_BYTES:
            text = (
                f"a workspace of {format_size(self.workspace_bytes)} is very small: TensorRT may find no tactic, or a "
                "slow one; 1GiB is usual"
            )
            return (text,)
        return ()


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise OptionError(f"{name} is {value!r}, which is not a whole number", "Give an integer.")
    return operator.index(value)


def parse_size(text: str) -> int:
    """Read a size in bytes: ``1GiB``, ``512M``, ``65536``. All units are powers of 1024.

    Raises:
        OptionError: The text is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        message = f"{text!r} is not a size"
        raise OptionError(message, "Write it as 1GiB, 512MiB or a number of bytes.")
    unit = (match["unit"] or "").lower()[:1]
    return int(float(match["number"]) * _UNITS[unit]) if "." in match["number"] else int(match["number"]) * _UNITS[unit]


def format_size(size_bytes: int) -> str:
    """A size for people: ``1.0 GiB``, ``512 KiB``. Never for ``--json``."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size == int(size) else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
