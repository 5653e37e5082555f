"""Builder options: a frozen record of the settings of TensorRT's builder config."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from enginecache.config import require_choice
from enginecache.errors import OptionError, shown
from enginecache.files.units import MAX_BYTES, MIB, format_size

_SMALL_WORKSPACE_BYTES = 16 * MIB

Precision = Literal["fp16", "bf16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
HardwareCompatibility = Literal["none", "same_compute_capability", "ampere_plus"]
HARDWARE_COMPATIBILITIES: tuple[HardwareCompatibility, ...] = get_args(HardwareCompatibility)
"""From the narrowest reach to the widest."""

_FLAG = re.compile(r"(?P<name>[A-Z][A-Z0-9_]*)(?P<off>=OFF)?", re.ASCII)
FLAGS_WITH_OPTION = {
    **{name.upper(): f"--{name}" for name in PRECISIONS},
    "VERSION_COMPATIBLE": "--version-compatible",
    "STRIP_PLAN": "--strip-plan",
    "DISABLE_TIMING_CACHE": "--no-timing-cache",
}
"""Builder flags with an option of the command line: spelled twice, one request would have two keys."""


def _keyed(reason: str, default: Any) -> Any:
    """Declare a field that decides the plan's bytes, and so is part of the key."""
    return field(default=default, metadata={"keyed": True, "reason": reason})


@dataclass(frozen=True)
class PluginLibrary:
    """A shared library of TensorRT plugins.

    Attributes:
        path: Where it is; not part of the key.
        digest: BLAKE3 of its bytes, 64 hex characters.
    """

    path: Path
    digest: str


@dataclass(frozen=True)
class BuildOptions:
    """Settings of the builder config.

    Each field's metadata says whether it is part of the key, and why.

    Attributes:
        workspace_bytes: Limit of the workspace memory pool in bytes; None leaves TensorRT's own default, which is the
            device's whole memory. 1 GiB is usual.
        optimization_level: ``builder_optimization_level``, 0 (fastest build) to 5 (fastest engine).
            3 is TensorRT's default. Source: NVIDIA, IBuilderConfig, TensorRT 8.6 to 11.4.
        precision: Precisions besides FP32, in the order of :data:`PRECISIONS`, each once. How each is enabled depends
            on the release: see :mod:`enginecache.key.precision`.
        convert_io: Whether a conversion of the graph also converts its inputs and outputs.
        hardware_compatibility: ``hardware_compatibility_level`` in lower case.
        version_compatible: Builder flag ``VERSION_COMPATIBLE``.
        strip_plan: Builder flag ``STRIP_PLAN``: the plan has no weights, and must be refitted.
        builder_flags: Further builder flags by name, sorted; ``NAME=OFF`` clears one that is set by default.
        plugins: Libraries of plugins to load before the model is parsed, sorted by digest, each once.

    Raises:
        OptionError: A value is out of range.
    """

    workspace_bytes: int | None = _keyed("a smaller workspace excludes tactics, and so changes the plan", None)
    optimization_level: int = _keyed("decides how many tactics are tried", 3)
    precision: tuple[Precision, ...] = _keyed("decides the types that layers compute in", ())
    convert_io: bool = _keyed("decides the types of inputs and outputs", False)  # noqa: FBT003
    hardware_compatibility: HardwareCompatibility = _keyed("decides on which GPUs the plan runs", "none")
    version_compatible: bool = _keyed("puts a runtime into the plan", False)  # noqa: FBT003
    strip_plan: bool = _keyed("leaves the weights out of the plan", False)  # noqa: FBT003
    builder_flags: tuple[str, ...] = _keyed("each changes what the builder may do", ())
    plugins: tuple[PluginLibrary, ...] = _keyed("their code computes layers; by content, not by path", ())

    def __post_init__(self) -> None:
        # 3.0 and True are equal to integers and make other keys: one request must not have two.
        if self.workspace_bytes is not None:
            object.__setattr__(self, "workspace_bytes", _whole("workspace_bytes", self.workspace_bytes))
        object.__setattr__(self, "optimization_level", _whole("optimization_level", self.optimization_level))
        if self.workspace_bytes is not None and not 0 < self.workspace_bytes <= MAX_BYTES:
            message = f"a workspace of {shown(self.workspace_bytes)} bytes is out of range"
            raise OptionError(message, "Give a size from 1 byte to 4 EiB, such as --workspace 1GiB.")
        if not 0 <= self.optimization_level <= 5:
            message = f"optimization level {shown(self.optimization_level)} is out of range"
            raise OptionError(message, "Give --opt-level 0 (fastest build) to 5 (fastest engine); 3 is the default.")
        for name in ("convert_io", "version_compatible", "strip_plan"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {shown(getattr(self, name))}", "Give True or False.")
        require_choice("hardware_compatibility", self.hardware_compatibility, HARDWARE_COMPATIBILITIES)
        object.__setattr__(self, "precision", _precisions(self.precision))
        object.__setattr__(self, "builder_flags", _flags(self.builder_flags))
        by_digest = {plugin.digest: plugin for plugin in self.plugins}
        object.__setattr__(self, "plugins", tuple(by_digest[digest] for digest in sorted(by_digest)))

    def keyed(self) -> dict[str, Any]:
        """Return the fields of the key as plain JSON values by name, with defaults written out."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["keyed"]}
        values["plugins"] = [plugin.digest for plugin in self.plugins]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def warnings(self) -> tuple[str, ...]:
        """Return warnings about these values, to show before a build."""
        if self.workspace_bytes is not None and self.workspace_bytes < _SMALL_WORKSPACE_BYTES:
            text = (
                f"a workspace of {format_size(self.workspace_bytes)} is very small: TensorRT may find no tactic, or a "
                "slow one; 1GiB is usual"
            )
            return (text,)
        return ()


def _precisions(names: Sequence[str]) -> tuple[str, ...]:
    names = [name.lower() if isinstance(name, str) else name for name in _texts("precision", names)]
    for name in names:
        require_choice("precision", name, PRECISIONS)
    return tuple(name for name in PRECISIONS if name in names)


def _texts(name: str, values: Any) -> tuple[Any, ...]:
    """Materialize a sequence of names: an iterator can be read only once."""
    if isinstance(values, str):
        raise OptionError(f"{name} is {shown(values)}, a string", "Give a sequence of names.")
    try:
        return tuple(values)
    except TypeError as error:
        raise OptionError(f"{name} is {shown(values)}", "Give a sequence of names.") from error


def _flags(names: Sequence[str]) -> tuple[str, ...]:
    flags: dict[str, str] = {}
    for text in _texts("builder_flags", names):
        match = _FLAG.fullmatch(text.upper().replace("-", "_").strip()) if isinstance(text, str) else None
        if match is None:
            message = f"{shown(text)} is not the name of a builder flag"
            raise OptionError(message, "Write TensorRT's own name, such as SPARSE_WEIGHTS, or TF32=OFF to clear one.")
        if match["name"] in FLAGS_WITH_OPTION:
            instead = FLAGS_WITH_OPTION[match["name"]]
            use = f"Leave {instead} out; it is off then." if match["off"] else f"Use {instead}."
            raise OptionError(f"{match['name']} has its own option", use)
        if flags.setdefault(match["name"], match[0]) != match[0]:
            raise OptionError(f"the builder flag {match['name']} is both set and cleared", "Leave one of them out.")
    # TensorRT sets TF32 by default: to ask for it is to ask for nothing.
    return tuple(sorted(text for text in flags.values() if text != "TF32"))


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise OptionError(f"{name} is {shown(value)}, which is not a whole number", "Give an integer.")
    return operator.index(value)
