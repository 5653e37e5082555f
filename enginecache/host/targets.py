"""Compute capabilities, and the GPUs that a plan must run on or runs on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from enginecache.errors import OptionError

_FLAGS = re.ASCII | re.IGNORECASE
_JOINED = re.compile(r"(?:(?:sm|compute)_?)?(?P<major>[1-9]\d?)(?P<minor>\d)(?P<suffix>[af]?)", _FLAGS)
_NOISE = re.compile(r"nvidia|geforce|tesla|quadro|[\s_-]+", re.IGNORECASE)
_GPUS: tuple[tuple[str, str, str], ...] = (
    ("V100", r"(?:v100|volta).*", "7.0"),
    ("T4, RTX 20", r"(?:t4|rtx20\d\d|turing).*", "7.5"),
    ("A100, A30", r"(?:a100|a800|a30)(?!\d).*", "8.0"),
    ("A10, A16, A2, A40, RTX 30", r"(?:a10|a16|a2|a40|rtx30\d\d|(?:rtx)?a[1-6]\d00).*", "8.6"),
    ("Orin", r"(?:jetson)?(?:agx)?orin.*", "8.7"),
    ("L4, L40, L40S, RTX 40", r"(?:l2|l4|rtx40\d\d|rtx\d+ada|ada).*", "8.9"),
    ("H100, H200, GH200", r"(?:h100|h200|h20|h800|gh200|hopper).*", "9.0"),
    ("B200, GB200", r"g?b200.*", "10.0"),
    ("B300, GB300", r"g?b300.*", "10.3"),
    ("RTX 50, RTX PRO Blackwell", r"(?:rtx50\d\d|rtxpro\d+).*", "12.0"),
    ("GB10", r"(?:gb10|dgxspark).*", "12.1"),
)
"""GPUs, a pattern of their names without brand and blanks, and their compute capability. Only for messages.

The first whole match counts. Source: NVIDIA, "CUDA GPU Compute Capability", 2026-11.
"""
_DOTTED = re.compile(r"(?P<major>[1-9]\d?)\.(?P<minor>\d)(?P<suffix>[af]?)", _FLAGS)


class ComputeCapability(NamedTuple):
    """A GPU architecture as CUDA numbers it, shown as ``8.9``."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @property
    def sm(self) -> str:
        """Return the spelling of compilers and of ``--target``: ``sm_89``."""
        return f"sm_{self.major}{self.minor}"

    @classmethod
    def parse(cls, text: str) -> ComputeCapability:
        """Read ``sm_89``, ``8.9`` or ``89``.

        ``sm_90a`` and ``sm_100f`` are refused: they name code that runs on one architecture or family only. TensorRT
        has no such targets, and reading them as ``sm_90`` would promise what the caller did not ask for.

        Raises:
            OptionError: The text is none of these.
        """
        match = _JOINED.fullmatch(text.strip()) or _DOTTED.fullmatch(text.strip())
        if match is None:
            raise OptionError(f"{text!r} is not a compute capability", _advice_for(text))
        found = cls(int(match["major"]), int(match["minor"]))
        if match["suffix"]:
            raise OptionError(
                f"{text!r} names architecture-specific code, and TensorRT has no such targets",
                f"Write it without the suffix: {found.sm}.",
            )
        return found


def _advice_for(text: str) -> str:
    """Return advice in place of ``text``: the compute capability, if it is the name of a GPU."""
    name = _NOISE.sub("", text).lower()
    for _, pattern, number in _GPUS:
        if re.fullmatch(pattern, name, re.ASCII):
            sm = ComputeCapability.parse(number).sm
            return f"{text.strip()} is {sm} (compute capability {number}): --target {sm}."
    known = "; ".join(f"{names}: {number}" for names, _, number in _GPUS)
    how = "Write it as sm_89, 8.9 or 89 (repeat --target for several), or use --target portable."
    return f"{how}\nCompute capabilities: {known}."


@dataclass(frozen=True)
class DeviceModel:
    """Kind of GPU that a plan is tuned for: two equal cards have one device model.

    Attributes:
        name: The driver's product name, such as ``NVIDIA H100 80GB HBM3``.
        sm_count: Number of streaming multiprocessors.
    """

    name: str
    sm_count: int

    def __str__(self) -> str:
        return f"{self.name}, {self.sm_count} SMs"


AMPERE = ComputeCapability(8, 0)


@dataclass(frozen=True)
class Reach:
    """The GPUs that a plan runs on, by compute capability.

    Attributes:
        compute_capabilities: Sorted, without duplicates; at least one.
        and_later: Whether the plan also runs on every compute capability later than the last.
    """

    compute_capabilities: tuple[ComputeCapability, ...]
    and_later: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "compute_capabilities", tuple(sorted(set(self.compute_capabilities))))

    def covers(self, other: Reach) -> bool:
        """Return whether this reaches every GPU that ``other`` reaches."""
        if other.and_later and not (self.and_later and self.compute_capabilities[-1] <= other.compute_capabilities[-1]):
            return False
        return all(self.covers_one(capability) for capability in other.compute_capabilities)

    def covers_one(self, capability: ComputeCapability) -> bool:
        """Return whether this reaches a GPU of that compute capability."""
        is_later = self.and_later and capability >= self.compute_capabilities[-1]
        return is_later or capability in self.compute_capabilities

    def to_texts(self) -> tuple[str, ...]:
        """Return the form for rows and JSON: ``("8.6", "8.9")``, and ``("8.0+",)`` for 8.0 and later."""
        texts = [str(capability) for capability in self.compute_capabilities]
        return (*texts[:-1], texts[-1] + "+") if self.and_later else tuple(texts)

    @classmethod
    def from_texts(cls, texts: Sequence[str]) -> Reach:
        """Read the result of :meth:`to_texts`.

        Raises:
            OptionError: A text is not a compute capability.
        """
        and_later = bool(texts) and texts[-1].endswith("+")
        return cls(tuple(ComputeCapability.parse(text.removesuffix("+")) for text in texts), and_later)

    def __str__(self) -> str:
        return ", ".join(self.to_texts())


@dataclass(frozen=True)
class Target:
    """GPUs that a plan must run on.

    Attributes:
        compute_capabilities: Sorted, without duplicates; empty for the portable default of TensorRT-RTX.
        device_model: Set if the plan is tuned for one device model (TensorRT without a compatibility level).
        and_later: Whether it must also run on every later compute capability (TensorRT with ``ampere_plus``).
    """

    compute_capabilities: tuple[ComputeCapability, ...]
    device_model: DeviceModel | None = None
    and_later: bool = False

    def __post_init__(self) -> None:
        ordered = tuple(sorted(set(self.compute_capabilities)))
        object.__setattr__(self, "compute_capabilities", ordered)

    @property
    def is_portable(self) -> bool:
        """Return whether TensorRT-RTX chooses the compute capabilities."""
        return not self.compute_capabilities

    def __str__(self) -> str:
        if self.is_portable:
            return "portable"
        names = ", ".join(capability.sm for capability in self.compute_capabilities)
        if self.and_later:
            return f"{names} and later"
        return f"{names} ({self.device_model.name})" if self.device_model else names

    @classmethod
    def parse(cls, texts: tuple[str, ...]) -> Target:
        """Read the values of ``--target``, at least one.

        Raises:
            OptionError: There is none, one is not a compute capability, or ``portable`` is combined with others.
        """
        names = {text.strip().lower() for text in texts}
        if not names:
            # No --target means the device here; as an empty Target it would silently mean portable.
            raise OptionError("no target was named", "Name a compute capability such as sm_89, or portable.")
        if "portable" in names:
            if names != {"portable"}:
                raise OptionError(
                    "--target portable cannot be combined with other targets",
                    "Name the compute capabilities, or portable alone.",
                )
            return cls(())
        return cls(tuple(ComputeCapability.parse(text) for text in texts))
