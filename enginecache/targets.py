"""Compute capabilities, and what a plan must run on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from enginecache.errors import OptionError

_PATTERNS = (
    re.compile(r"(?:sm|compute)_?(?P<both>\d{2,3})[af]?", re.IGNORECASE),
    re.compile(r"(?P<major>\d{1,2})\.(?P<minor>\d)"),
    re.compile(r"(?P<both>\d{2,3})"),
)


class ComputeCapability(NamedTuple):
    """A GPU architecture as CUDA numbers it, shown as ``8.9``."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @classmethod
    def parse(cls, text: str) -> ComputeCapability:
        """Read ``sm_89``, ``8.9`` or ``89``.

        Raises:
            OptionError: The text is none of these.
        """
        for pattern in _PATTERNS:
            match = pattern.fullmatch(text.strip())
            if match is None:
                continue
            groups = match.groupdict()
            if groups.get("both"):
                return cls(int(groups["both"][:-1]), int(groups["both"][-1]))
            return cls(int(groups["major"]), int(groups["minor"]))
        message = f"{text!r} is not a compute capability"
        raise OptionError(message, "Write it as sm_89, 8.9 or 89, or use --target portable.")


@dataclass(frozen=True)
class DeviceModel:
    """The kind of GPU that a plan was tuned for: two equal cards have one device model.

    Attributes:
        name: The driver's product name, such as ``NVIDIA H100 80GB HBM3``.
        sm_count: Number of streaming multiprocessors.
    """

    name: str
    sm_count: int


@dataclass(frozen=True)
class Target:
    """What a plan must run on.

    Attributes:
        compute_capabilities: Sorted, without duplicates; empty for the portable default of TensorRT-RTX.
        device_model: Set where the plan is tuned for one device model (TensorRT without a compatibility level).
    """

    compute_capabilities: tuple[ComputeCapability, ...]
    device_model: DeviceModel | None = None

    def __post_init__(self) -> None:
        ordered = tuple(sorted(set(self.compute_capabilities)))
        object.__setattr__(self, "compute_capabilities", ordered)

    @property
    def is_portable(self) -> bool:
        """Whether TensorRT-RTX chooses the compute capabilities."""
        return not self.compute_capabilities

    def __str__(self) -> str:
        if self.is_portable:
            return "portable"
        names = ", ".join(f"sm_{c.major}{c.minor}" for c in self.compute_capabilities)
        return f"{names} ({self.device_model.name})" if self.device_model else names

    @classmethod
    def parse(cls, texts: tuple[str, ...]) -> Target:
        """Read the values of ``--target``.

        Raises:
            OptionError: A value is not a compute capability, or ``portable`` stands beside others.
        """
        if "portable" in texts:
            if set(texts) != {"portable"}:
                message = "--target portable cannot be combined with other targets"
                raise OptionError(message, "Name the compute capabilities, or portable alone.")
            return cls(())
        return cls(tuple(ComputeCapability.parse(text) for text in texts))
