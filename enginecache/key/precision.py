"""Precisions, and the mechanism for each: a builder flag, a conversion of the graph, or the graph's Q/DQ nodes.

TensorRT up to 10 takes precisions as builder flags. TensorRT 11 and TensorRT-RTX build strongly typed networks only:
the precision is that of the ONNX graph, so the graph must be converted first. A table says which releases are strongly
typed, because the key needs to know before TensorRT is loaded; the builder's process checks the loaded release.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from enginecache.errors import OptionError, ToolchainError, UnsupportedOptionError
from enginecache.host.toolchain import Flavour, Toolchain
from enginecache.key.options import BuildOptions
from enginecache.model import ModelIdentity

_STRONGLY_TYPED_FROM: Mapping[Flavour, int] = {"tensorrt": 11, "tensorrt-rtx": 0}
"""The first major version of each flavour that has no builder flags for precisions.

Source: the names in ``BuilderFlag`` of TensorRT 8.6, 10.0, 10.16, 11.4 and TensorRT-RTX 1.7, 2026-11.
"""

CONVERTERS: Mapping[str, tuple[str, str]] = {
    "fp16": ("onnxconverter-common", "pip install onnxconverter-common"),
    "bf16": ("nvidia-modelopt", "pip install 'nvidia-modelopt[onnx]'"),
}
"""The converter for each precision: its distribution, and the command that installs it."""

QUANTIZED = ("int8", "fp8")
"""Precisions that need scales, which only Q/DQ nodes have here: there is no calibration."""


@dataclass(frozen=True)
class Conversion:
    """Conversion of the ONNX graph before the build. Part of the key.

    Attributes:
        precision: ``fp16`` or ``bf16``.
        converter: Distribution name of the library that converts.
        version: Its version.
        onnx_version: Version of ``onnx``, whose shape inference the conversion uses.
        keeps_io: Whether inputs and outputs keep their types.
    """

    precision: str
    converter: str
    version: str
    onnx_version: str
    keeps_io: bool

    def fields(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dict(vars(self))


def plan_conversion(options: BuildOptions, toolchain: Toolchain, identity: ModelIdentity) -> Conversion | None:
    """Return the conversion that the asked precision needs; None if builder flags or the graph itself provide it.

    Reads the metadata of installed packages, and imports none of them.

    Raises:
        OptionError: The precisions contradict each other, or the model lacks the Q/DQ nodes that one needs.
        UnsupportedOptionError: Neither this TensorRT nor an installed converter has the precision.
    """
    for precision in QUANTIZED:
        if precision in options.precision and precision not in identity.quantization:
            raise _not_quantized(precision, identity)
    if not is_strongly_typed(toolchain):
        if options.convert_io:
            raise _nothing_to_convert(toolchain)
        return None
    converted = [precision for precision in options.precision if precision in CONVERTERS]
    if len(converted) > 1:
        message = f"--fp16 and --bf16 together: {_name(toolchain)} computes in the types of the graph, which has one"
        raise OptionError(message, "Give one of them. Builder flags of TensorRT 10 take both.")
    if converted:
        return _conversion(converted[0], toolchain, keeps_io=not options.convert_io)
    if options.convert_io:
        message = "--convert-io without a conversion: the graph is converted for --fp16 and --bf16 alone"
        raise OptionError(message, "Add --fp16 or --bf16, or leave --convert-io out.")
    return None


def is_strongly_typed(toolchain: Toolchain) -> bool:
    """Return whether the release takes precisions from the graph alone."""
    match = re.match(r"\d+", toolchain.version)
    return match is None or int(match[0]) >= _STRONGLY_TYPED_FROM[toolchain.flavour]


def check_typing(trt: Any, toolchain: Toolchain) -> None:
    """Compare the loaded TensorRT with what :func:`is_strongly_typed` says of it.

    Args:
        trt: The imported bindings.
        toolchain: What the key says.

    Raises:
        ToolchainError: They disagree, so that the key says another conversion than this TensorRT needs.
    """
    is_typed = not hasattr(trt.BuilderFlag, "FP16")
    if is_typed != is_strongly_typed(toolchain):
        has, wanted = ("no", "with") if is_typed else ("a", "without")
        message = f"{_name(toolchain)} has {has} builder flag FP16, and was taken for a release {wanted} one"
        fix = "Nothing was built. Upgrade enginecache; until then, leave out --fp16 and the other precisions."
        raise ToolchainError(message, fix)


def _conversion(precision: str, toolchain: Toolchain, *, keeps_io: bool) -> Conversion:
    converter, _ = CONVERTERS[precision]
    version, onnx_version = _installed(converter), _installed("onnx")
    if version is None or onnx_version is None:
        raise _no_converter(precision, toolchain)
    return Conversion(precision, converter, version, onnx_version, keeps_io)


def _installed(distribution: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _no_converter(precision: str, toolchain: Toolchain) -> UnsupportedOptionError:
    converter, install = CONVERTERS[precision]
    message = (
        f"{_name(toolchain)} has no builder flag for {precision}: it computes in the types of the graph, and "
        f"{converter}, which would convert the graph to {precision}, is not installed"
    )
    others = [f"--{other}" for other, (name, _) in CONVERTERS.items() if other != precision and _installed(name)]
    alternative = f", use {' or '.join(others)}, whose converter is installed" if others else ""
    return UnsupportedOptionError(message, f"Install it ({install}){alternative}, or convert the model yourself.")


def _not_quantized(precision: str, identity: ModelIdentity) -> OptionError:
    found = f"; its Q/DQ nodes are of {', '.join(identity.quantization)}" if identity.quantization else ""
    message = (
        f"--{precision} needs a scale for each quantized tensor, and the model has no QuantizeLinear and "
        f"DequantizeLinear nodes of {precision}{found}; there is no calibration here"
    )
    tools = "NVIDIA ModelOpt (python -m modelopt.onnx.quantization --onnx_path MODEL --quantize_mode " + precision + ")"
    if precision == "int8":
        tools += " or ONNX Runtime (quantize_static with quant_format=QuantFormat.QDQ and signed int8)"
    return OptionError(message, f"Quantize the model with {tools}, and give that; or take --fp16.")


def _nothing_to_convert(toolchain: Toolchain) -> OptionError:
    message = (
        f"--convert-io has nothing to work on: {_name(toolchain)} takes precisions as builder flags, so that the graph "
        "is not converted, and its inputs and outputs keep their types"
    )
    return OptionError(message, "Leave it out, or change the types of the model's inputs and outputs yourself.")


def _name(toolchain: Toolchain) -> str:
    return f"{toolchain.flavour} {toolchain.version}"
