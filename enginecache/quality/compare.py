"""Compare outputs with those of the reference, and decide how near they must be."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from enginecache.quality.result import OutputNumbers

TOLERANCES: Mapping[str, float] = {"fp32": 1e-2, "fp16": 5e-2, "bf16": 2e-1, "int8": 1e-1, "fp8": 1e-1}
"""The largest error that passes, of the largest value of the reference, by the lowest precision in the engine.

TensorRT computes FP32 with TF32 where it may, which rounds products like FP16: 2^-11 = 4.9e-4; BF16 rounds to 2^-8 =
3.9e-3, eight times as far. Measured in FP16, every value rounded, on sixteen models with trained weights: 7e-4 to
2.7e-2 (2026-12, docs/checks.md).
"""

WITHOUT_TF32 = 1e-3
"""The same for FP32 where TF32 is cleared. Measured on an H200 with TensorRT 8.6.0: 2.7e-7, 2026-11."""


def tolerance_for(precision: Collection[str], builder_flags: Collection[str] = ()) -> float:
    """Return the tolerance for an engine.

    Args:
        precision: The precisions that were asked for; none is FP32.
        builder_flags: Names of builder flags.
    """
    if not precision:
        return WITHOUT_TF32 if "TF32=OFF" in builder_flags else TOLERANCES["fp32"]
    return max(TOLERANCES[name] for name in precision)


def compare(name: str, expected: Any, found: Any, at_least: float = 0.0) -> OutputNumbers:
    """Compare one output with the reference.

    Args:
        name: The output's name.
        expected: The reference's array.
        found: The array to judge.
        at_least: What a smaller largest value of the reference counts as; 1 for probabilities.
    """
    if expected.shape != found.shape:
        return OutputNumbers(name, problem=f"its shape is {_shape(found)}, and the reference's {_shape(expected)}")
    if not expected.size:
        return OutputNumbers(name)
    if expected.dtype.kind in "biu" and found.dtype.kind in "biu":
        return _compare_exact(name, expected, found)
    if {expected.dtype.kind, found.dtype.kind} - set("biuf"):
        return OutputNumbers(name, problem=f"its elements are of type {found.dtype}, which cannot be compared")
    return _compare_floats(name, expected, found, at_least)


def _shape(array: Any) -> str:
    return "x".join(map(str, array.shape)) or "that of a scalar"


def _compare_exact(name: str, expected: Any, found: Any) -> OutputNumbers:
    import numpy as np

    differs = expected != found
    # As floats: the difference of two integers of 64 bits may not fit one.
    gap = np.abs(expected[differs].astype(np.float64) - found[differs].astype(np.float64))
    return OutputNumbers(
        name,
        error=float(differs.mean()),
        max_abs_error=float(gap.max(initial=0.0)),
        max_rel_error=_relative(gap, expected[differs].astype(np.float64)),
    )


def _compare_floats(name: str, expected: Any, found: Any, at_least: float) -> OutputNumbers:
    import numpy as np

    expected, found = expected.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    is_finite = np.isfinite(expected) & np.isfinite(found)
    is_alike = is_finite | (np.isnan(expected) & np.isnan(found)) | (expected == found)
    strange = found[~is_alike]
    expected, found = expected[is_finite], found[is_finite]
    with np.errstate(over="ignore"):
        gap = np.minimum(np.abs(expected - found), np.finfo(np.float64).max)
    most, scale = float(gap.max(initial=0.0)), float(np.abs(expected).max(initial=at_least))
    return OutputNumbers(
        name,
        error=min(most / scale, float(np.finfo(np.float64).max)) if scale else most,
        max_abs_error=most,
        max_rel_error=_relative(gap, expected),
        cosine=_cosine(expected, found),
        nan=int(np.isnan(strange).sum()),
        inf=int(np.isinf(strange).sum()),
        unlike=int(strange.size),
    )


def _relative(gap: Any, expected: Any) -> float | None:
    import numpy as np

    is_some = expected != 0
    if not is_some.any():
        return None
    with np.errstate(over="ignore"):
        found = float((gap[is_some] / np.abs(expected[is_some])).max())
    return found if np.isfinite(found) else None


def _cosine(expected: Any, found: Any) -> float | None:
    import numpy as np

    largest = np.abs(expected).max(initial=0.0), np.abs(found).max(initial=0.0)
    if not all(largest):
        return None
    expected, found = expected / largest[0], found / largest[1]  # so that no square leaves the range
    return float(expected @ found / (np.linalg.norm(expected) * np.linalg.norm(found)))
