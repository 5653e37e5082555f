"""Which TensorRT is installed here, found without importing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Flavour = Literal["tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True)
class Toolchain:
    """One TensorRT as far as it decides a plan.

    Attributes:
        flavour: ``tensorrt`` or ``tensorrt-rtx``.
        version: Full version with its build number, such as ``10.16.1.11``.
        cuda_major: Major version of the CUDA it was made for.
        os: ``linux`` or ``windows``.
        cpu: ``x86_64`` or ``aarch64``.
    """

    flavour: Flavour
    version: str
    cuda_major: int
    os: str
    cpu: str
