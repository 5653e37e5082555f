"""The headers of plans, read without TensorRT.

NVIDIA documents neither. What is read here was observed: on TensorRT-RTX 1.4.0.76, 1.5.0.114, 1.6.1.120 and 1.7.1.116,
each for CUDA 12 and 13, and on TensorRT 8.6.0.12 (docs/exchange.md has the table). So a header can refuse a plan and
explain it, and never accept one: damage further inside shows only in a digest.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Protocol

from enginecache.host.targets import ComputeCapability, Reach
from enginecache.host.toolchain import Flavour

RTX_MAGIC, TRT_MAGIC, OLD_MAGIC = b"vtrt", b"ftrt", b"ptrt"
"""Beginnings of plans: TensorRT-RTX; TensorRT 8.6 and later; TensorRT before, and the timing caches of all."""

HEAD_BYTES = 4096
"""A plan's first bytes, all that is looked at."""

_RTX_BYTES = 64
_RTX_HEADER_VERSION = 2
_RTX_TARGETS = tuple(map(ComputeCapability.parse, ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")))
_RTX_LATER = 1 << len(_RTX_TARGETS)
_RTX_SM120_IS_LAST = (1, 4)
"""In this release bit 5 stands for later GPUs: there is no 12.1. Source: the members of its ``ComputeCapability``."""

_TRT_BYTES = 28
_TRT_TAGS_AT = 80
_OLD_VERSIONS = {205: "8.2", 213: "8.4", 232: "8.5"}
"""Serialization versions of plans before 8.6. Source: NVIDIA/TensorRT issues 2195 and 3073."""

_TAG_SIZES = {0x02: 1, 0x0A: 1, 0x07: 4, 0x08: 8, 0x09: 8}
_DEVICE_TAG = 0x10
_MAX_TAGS = 64
_TIMING_BYTES = 20

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class Bytes(Protocol):
    """Anything that is sliced like bytes: bytes, a memory map, a view."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes: ...


@dataclass(frozen=True)
class BuildDevice:
    """The GPU that a TensorRT plan was built on, as the plan has it. Its name is not there.

    Attributes:
        compute_capability: Its architecture.
        sm_count: Streaming multiprocessors.
        memory_bytes: Whole memory, as CUDA counts it.
        l2_bytes: Size of the L2 cache.
        clock_khz: Highest clock of the multiprocessors.
    """

    compute_capability: ComputeCapability
    sm_count: int
    memory_bytes: int
    l2_bytes: int
    clock_khz: int

    def __str__(self) -> str:
        memory = f"{self.memory_bytes / (1 << 30):.1f} GiB of memory"
        return f"compute capability {self.compute_capability}, {self.sm_count} SMs, {memory}"


@dataclass(frozen=True)
class PlanHeader:
    """Content of a plan's header.

    Attributes:
        flavour: TensorRT or TensorRT-RTX.
        tensorrt_version: The release that built it, with its build number; None where it is not said.
        declared_size_bytes: Size of the whole plan; None where it is not said.
        reach: GPUs that it runs on; None where the header does not say. Of TensorRT that is never: a plan with hardware
            compatibility has been seen by nobody here.
        built_on: The GPU that it was built on (TensorRT 8.6).
        cuda_version: CUDA of the build, such as ``12.9`` (TensorRT-RTX up to 1.6).
        weights_bytes: Size of the weights in it (TensorRT-RTX).
        doubt: Why the header is not of a known layout; empty where it is.
    """

    flavour: Flavour
    tensorrt_version: str | None = None
    declared_size_bytes: int | None = None
    reach: Reach | None = None
    built_on: BuildDevice | None = None
    cuda_version: str | None = None
    weights_bytes: int | None = None
    doubt: str = ""

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """Return the GPUs that the plan runs on; if only the GPU of the build is known, that one's."""
        if self.reach is not None:
            return self.reach.to_texts()
        return () if self.built_on is None else (str(self.built_on.compute_capability),)


def read_plan_header(data: Bytes) -> PlanHeader | None:
    """Read the header of the plan that ``data`` begins with; None where it begins with none. Never raises.

    Args:
        data: The plan, or its first :data:`HEAD_BYTES`; also a cut one, down to the first byte of the magic number.
    """
    head = bytes(data[0:HEAD_BYTES])
    magic = head[:4]
    if not magic:
        return None
    if RTX_MAGIC.startswith(magic):
        return _rtx_header(head)
    if TRT_MAGIC.startswith(magic):
        return _trt_header(head)
    if magic == OLD_MAGIC and len(head) >= 12 and _U32.unpack_from(head, 8)[0] in _OLD_VERSIONS:
        release = _OLD_VERSIONS[_U32.unpack_from(head, 8)[0]]
        return PlanHeader("tensorrt", release, doubt="of the header of a plan before TensorRT 8.6 only this is known")
    return None


def is_timing_cache(head: bytes, size_bytes: int) -> bool:
    """Return whether a file is a timing cache, complete or not: as plans before 8.6, but a tag follows the size.

    Observed on TensorRT-RTX 1.4 to 1.7.

    Args:
        head: Its first bytes.
        size_bytes: Its size.
    """
    if len(head) < _TIMING_BYTES + 4 or head[:4] != OLD_MAGIC:
        return False
    return head[_TIMING_BYTES : _TIMING_BYTES + 4] == b"\x13\x80\x01\x00" and size_bytes >= _TIMING_BYTES


def timing_cache_size(head: bytes) -> int:
    """Return the size in bytes that a timing cache's header declares."""
    return int(_U64.unpack_from(head, 8)[0]) + _TIMING_BYTES


def _rtx_header(head: bytes) -> PlanHeader:
    if len(head) < _RTX_BYTES:
        return PlanHeader("tensorrt-rtx", doubt=f"a header has {_RTX_BYTES} bytes, and there are {len(head)}")
    layout = _U64.unpack_from(head, 8)[0]
    if layout != _RTX_HEADER_VERSION or head[28:32] != RTX_MAGIC:
        return PlanHeader("tensorrt-rtx", doubt=_unknown("TensorRT-RTX"))
    version = tuple(head[24:28])
    reach = _rtx_reach(_U64.unpack_from(head, 32)[0], version)
    cuda = _U32.unpack_from(head, 48)[0]
    return PlanHeader(
        "tensorrt-rtx",
        _version_text(version),
        _U64.unpack_from(head, 16)[0],
        reach,
        cuda_version=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
        weights_bytes=_U64.unpack_from(head, 56)[0],
        doubt="" if reach is not None else "its set of compute capabilities is not of a known form",
    )


def _rtx_reach(mask: int, version: tuple[int, ...]) -> Reach | None:
    targets, later = _RTX_TARGETS, _RTX_LATER
    if version[:2] <= _RTX_SM120_IS_LAST:
        targets, later = targets[:-1], later >> 1
    found = tuple(capability for bit, capability in enumerate(targets) if mask >> bit & 1)
    # "Later" than the last that can be named: without that one it would say something else.
    if mask >= later << 1 or not found or (mask & later and found[-1] != targets[-1]):
        return None
    return Reach(found, and_later=bool(mask & later))


def _trt_header(head: bytes) -> PlanHeader:
    if len(head) < _TRT_BYTES:
        return PlanHeader("tensorrt", doubt=f"a header has at least {_TRT_BYTES} bytes, and there are {len(head)}")
    if _U32.unpack_from(head, 4)[0] != 0:
        return PlanHeader("tensorrt", doubt=_unknown("TensorRT"))
    version = tuple(head[24:28])
    return PlanHeader(
        "tensorrt", _version_text(version), _U64.unpack_from(head, 16)[0], built_on=_build_device(head, version)
    )


def _build_device(head: bytes, version: tuple[int, ...]) -> BuildDevice | None:
    """Return the GPU in the tagged values of TensorRT 8.6; None where anything is not as it was there."""
    if head[32:36] != b"NGNE" or head[56:60] != OLD_MAGIC:
        return None
    values: list[tuple[int, int]] = []
    at, device_at = _TRT_TAGS_AT, None
    for _ in range(_MAX_TAGS):
        if at + 4 > len(head):
            break
        tag = _U32.unpack_from(head, at)[0]
        size = _TAG_SIZES.get(tag & 0xFF, 0)
        if tag >> 8 != 0x000180 or at + 4 + size > len(head):
            break
        if tag & 0xFF == _DEVICE_TAG and device_at is None:
            device_at = len(values)
        if size:
            values.append((size, int.from_bytes(head[at + 4 : at + 4 + size], "little")))
        at += 4 + size
    if device_at is None or tuple(value for _, value in values[:4]) != version:
        return None
    return _device_of(values[device_at : device_at + len(_DEVICE_SIZES)])


_DEVICE_SIZES = (4, 4, 4, 4, 4, 8, 8, 4, 4, 4, 4, 1, 4, 4, 4, 4, 8)
"""Sizes of the values: compute capability, clock, memory clock, bus, L2, persisting L2, shared memory per block and per
SM, texture alignment, SM count, integrated, threads per block, grid x, y, z, memory. Each compared with what CUDA says
of the H200 that built three plans, 2026-11."""


def _device_of(values: list[tuple[int, int]]) -> BuildDevice | None:
    if tuple(size for size, _ in values) != _DEVICE_SIZES:
        return None
    numbers = [value for _, value in values]
    major, minor, clock_khz, l2_bytes, sm_count, memory_bytes = (numbers[at] for at in (0, 1, 2, 5, 10, 16))
    if not (1 <= major < 100 and minor < 10 and 1 <= sm_count < 10_000):
        return None
    return BuildDevice(ComputeCapability(major, minor), sm_count, memory_bytes, l2_bytes, clock_khz)


def _version_text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _unknown(product: str) -> str:
    return f"its header is not of a layout that is known: a newer {product} may have written it, or it is damaged"
