"""The conversion of an ONNX graph to another precision, in the builder's child process.

``fp16`` by onnxconverter-common, ``bf16`` by NVIDIA ModelOpt. The same model, converter and onnx give the same bytes.
Needs memory for the whole model, and for a few times its largest tensor: 5.6 GB where 2.4 GB of weights are three
tensors (onnxconverter-common 1.16, 2026-11); ModelOpt copies the model.
"""

from __future__ import annotations

import os
import re
import shutil
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from enginecache.errors import BuildError, ModelChangedError, ToolchainError
from enginecache.key.precision import Conversion
from enginecache.model import ModelSource
from enginecache.model.external import Extent
from enginecache.model.tensors import ELEMENT_TYPES, store_raw
from enginecache.trt.build.codec import CONVERTED_NAME, CONVERTED_WEIGHTS_NAME
from enginecache.trt.build.logs import BuildLog
from enginecache.trt.build.request import BuildRequest
from enginecache.trt.convert import graph_fixes
from enginecache.trt.convert.graph_fixes import nodes_inside

MIN_FP16 = 1e-7
"""Smaller weights that are not zero become this, the converter's default: FP16's smallest is 6e-8."""

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
"""Stay in FP32: scales are small numbers, and before opset 19 ONNX has them in FP32 alone.

TensorRT-RTX 1.7.1 builds graphs of int8 and fp8 with scales of either type, with equally large weights, 2026-11.
"""

RAW_FOLDER = "raw"
EXTERNAL_FROM_BYTES = 1 << 16
SMALL_BYTES = 1 << 16
"""Tensors up to this size may hold shapes, and take part in shape inference; larger ones are weights."""

_CLAMPED = re.compile(r"the float32 number (?P<value>\S+) will be truncated to (?P<limit>\S+)")
_NOT_IN_ONNX = re.compile(r"No Op registered for|No opset import for domain")
_OTHER_WAY = "or convert the model yourself and give that"

_Converter = Callable[[Any, ModelSource, Conversion, Collection[str]], Any]


def without_misread(request: BuildRequest, log: BuildLog) -> BuildRequest:
    """Store as raw data what TensorRT would misread, in a copy of the model in the build's folder.

    Args:
        request: With the pinned model as its source.
        log: Gets a line with the number of tensors.

    Returns:
        The request with the copy as its source; as it was where TensorRT reads every tensor right.
    """
    if not request.identity.has_misread:
        return request
    import onnx

    source = request.source
    model = onnx.ModelProto.FromString(source.data if source.path is None else source.path.read_bytes())
    count = store_raw(model)
    log.write("I", f"{count} tensors of {source.name} are given to TensorRT as raw data: it would misread them")
    data = model.SerializeToString()
    if source.path is None:
        return replace(request, source=replace(source, data=data))
    folder = request.work_dir / RAW_FOLDER
    for file in request.identity.files:
        link = folder / (file.location or source.path.name)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(source.path_of(file.location) or source.path)
    path = folder / source.path.name
    if os.fsencode(source.path.name) in data:  # perhaps as the location of external data in the ONNX file itself
        path = folder / f"raw {source.path.name}"
    else:
        path.unlink()
    path.write_bytes(data)
    return replace(request, source=ModelSource(path=path))


def convert(request: BuildRequest, log: BuildLog, stays: Collection[str] = ()) -> BuildRequest:
    """Do the request's conversion, into files of the build's folder.

    Where the converter cannot do with the graphs inside nodes (If, Loop, Scan), those nodes stay in FP32 as a whole.

    Args:
        request: With the pinned model as its source.
        log: Gets what the converter says; a warning where weights were clamped.
        stays: Names of further nodes that stay in FP32.

    Returns:
        The request with the converted model as its source; as it was where it asks for no conversion.

    Raises:
        BuildError: The converter failed, or what it made is no ONNX model.
        ToolchainError: Converter or onnx have other versions than the key says.
        ModelChangedError: External data is shorter than it was.
    """
    if request.conversion is None:
        return request
    try:
        return _convert(request, request.conversion, log, stays)
    except BuildError:
        outer = {node.name: node.op_type for node in _read(request.source).graph.node if any(nodes_inside(node))}
        if request.conversion.precision != "fp16" or outer.keys() <= set(stays):
            raise
    shutil.rmtree(request.work_dir / CONVERTED_NAME, ignore_errors=True)
    converted = _convert(request, request.conversion, log, {*stays, *outer})
    listed = ", ".join(f"{name} ({operator})" for name, operator in outer.items())
    log.write("W", f"these nodes have graphs inside that could not be converted, and stay in FP32: {listed}")
    return converted


def _convert(request: BuildRequest, conversion: Conversion, log: BuildLog, stays: Collection[str]) -> BuildRequest:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _require_versions(conversion)
            original = _read(request.source)
            before = _types_of(original.graph)
            model = _CONVERTERS[conversion.precision](original, request.source, conversion, stays)
            if conversion.keeps_io and _types_of(model.graph) != before:
                raise ValueError("inputs or outputs got another type")  # noqa: TRY301  # reported as every failure is
            path = _write(model, request)
            _check(path, request.source, log)
        except (MemoryError, OSError, ImportError, ToolchainError, ModelChangedError):
            raise  # says nothing of the model
        except Exception as error:
            raise _refused(request.source.name, conversion, error) from error
    by = f"{conversion.converter} {conversion.version}"
    log.write("I", f"{request.source.name} was converted to {conversion.precision} by {by}")
    _summarize(conversion, caught, log)
    return replace(request, source=ModelSource(path=path))


def nodes_in(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the operators of the nodes of a converted model, by their names; and of those that have graphs inside."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    outer = {node.name: node.op_type for node in graph.node if any(nodes_inside(node))}
    return {node.name: node.op_type for node in graph_fixes.nodes_of(graph)}, outer


def _types_of(graph: Any) -> list[tuple[str, int]]:
    """Return the names and types of inputs and outputs."""
    values = {value.name: value.type.tensor_type.elem_type for value in graph.output}
    return [*((value.name, value.type.tensor_type.elem_type) for value in graph.input), *values.items()]


def _require_versions(conversion: Conversion) -> None:
    """Compare what is loaded with what the key names: packages may have been replaced since, or lie elsewhere too."""
    try:
        import onnx

        if conversion.converter == "nvidia-modelopt":
            import modelopt as converter
        else:
            import onnxconverter_common as converter
    except (MemoryError, OSError):
        raise
    except Exception as error:  # a broken module on the search path, such as a numpy.py
        message = f"{conversion.converter} {conversion.version}, which is to convert the graph, cannot be imported"
        reason = f"{type(error).__name__}: {error}"
        raise ToolchainError(f"{message}: {reason}", "Install it again, with what it requires.") from error
    for name, loaded, wanted in (
        (conversion.converter, getattr(converter, "__version__", "another module"), conversion.version),
        ("onnx", getattr(onnx, "__version__", "another module"), conversion.onnx_version),
    ):
        if loaded != wanted:
            message = f"{name} {wanted} was expected to convert the graph, and {loaded} was loaded"
            raise ToolchainError(message, f"Nothing was built. Install it once: pip install {name}=={wanted}")


def _read(source: ModelSource) -> Any:
    """Return the model without its external data, with functions inlined and weights taken from the inputs."""
    import onnx
    from onnx.inliner import inline_local_functions

    data = source.data if source.path is None else source.path.read_bytes()
    model = onnx.ModelProto.FromString(data)
    if model.functions:
        # The converters do not look into them.
        model = inline_local_functions(model)
    graph_fixes.import_domains(model)
    graph_fixes.take_weights_from_inputs(model)
    graph_fixes.name_nodes(model.graph)
    return model


def _load_external(model: Any, source: ModelSource, at_most_bytes: int | None = None) -> None:
    """Bring external data into the model: what stays outside would get another type and keep its bytes.

    Not ``onnx.load_external_data_for_model``, which refuses the links of a pinned model.
    """
    for tensor in graph_fixes.tensors_of(model.graph):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        label = f"tensor {tensor.name!r}"
        size_bytes = ELEMENT_TYPES[tensor.data_type].size_bytes(tensor.dims, label)
        if at_most_bytes is None or size_bytes <= at_most_bytes:
            tensor.raw_data = _read_extent(source, Extent.of_entries(tensor.external_data, label), size_bytes)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")


def _read_extent(source: ModelSource, extent: Extent, size_bytes: int) -> bytes:
    with Path(source.path_of(extent.location) or "").open("rb") as file:
        file.seek(extent.offset_bytes)
        data = file.read(size_bytes)
    if len(data) < size_bytes:
        message = f"the external data {extent.location!r} became shorter while it was being converted"
        raise ModelChangedError(message, "Nothing was published. Run it again when nothing writes to them.")
    return data


def _to_fp16(model: Any, source: ModelSource, conversion: Conversion, stays: Collection[str]) -> Any:
    from onnxconverter_common import float16

    own = {node.name for node in graph_fixes.nodes_of(model.graph)}
    outputs = graph_fixes.set_outputs_aside(model.graph)
    if conversion.keeps_io:
        graph_fixes.separate_outputs(model.graph)
    graph_fixes.separate_inner_graphs(model.graph)
    graph_fixes.sort_nodes(model.graph)
    operators = {*float16.DEFAULT_OP_BLOCK_LIST, *QUANTIZERS}
    _load_external(model, source, SMALL_BYTES)
    model = _infer_shapes(model)
    _load_external(model, source)
    kept = graph_fixes.kept_nodes(model.graph, operators) | set(stays)
    kept |= {inner.name for node in model.graph.node if node.name in stays for inner in graph_fixes.nodes_inside(node)}
    kept |= graph_fixes.separate_kept_graphs(model.graph, stays, graph_fixes.floats_of(model.graph))

    def is_kept(node: Any) -> bool:
        return node.op_type in operators or node.name in kept

    graph_fixes.separate_weights(model.graph, is_kept)
    graph_fixes.name_captures(model.graph, is_kept)
    graph_fixes.sort_nodes(model.graph)
    unused = graph_fixes.name_unused_outputs(model.graph)
    names = {node.name for node in graph_fixes.nodes_of(model.graph)}
    model = float16.convert_float_to_float16(
        model,
        min_positive_val=MIN_FP16,
        max_finite_val=graph_fixes.MAX_FP16,  # the converter's own is 10000, and halves a weight of 20000
        keep_io_types=conversion.keeps_io,
        disable_shape_infer=True,
        op_block_list=sorted(operators),
        node_block_list=sorted(kept),
        check_fp16_ready=False,  # what is FP16 already stays so
    )
    graph_fixes.straighten_casts(model.graph, names)
    graph_fixes.join_outputs(model.graph, own, stays)
    graph_fixes.unname(model.graph, unused)
    graph_fixes.restore_outputs(model.graph, outputs)
    graph_fixes.sort_nodes(model.graph)
    return model


def _infer_shapes(model: Any) -> Any:
    """Return the model with the types of its tensors, which the converter goes by.

    Weights are kept out: inference copies the model, and takes none above 2 GiB.
    """
    import onnx

    aside = {}
    for index, tensor in enumerate(model.graph.initializer):
        data = tensor.raw_data  # a copy each time
        if len(data) > SMALL_BYTES:
            aside[index] = data
            tensor.ClearField("raw_data")
    model = onnx.shape_inference.infer_shapes(model)
    _infer_inner_shapes(model)
    for index in list(aside):
        model.graph.initializer[index].raw_data = aside.pop(index)
    return model


def _infer_inner_shapes(model: Any) -> None:
    """Add the types of tensors inside Loop and Scan: onnx infers them, and keeps those of If alone."""
    import onnx

    around: dict[str, Any] = {}
    for graph in graph_fixes.graphs_of(model.graph):
        values = [*graph.input, *graph.value_info, *graph.output]
        values += [onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in graph.initializer]
        known = {value.name for value in values}
        if graph is not model.graph and any(name not in known for node in graph.node for name in node.output if name):
            alone = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
            alone.graph.CopyFrom(graph)
            read = {name for node in graph_fixes.nodes_of(graph) for name in node.input}
            alone.graph.input.extend(around[name] for name in sorted(read & around.keys() - known))
            found = onnx.shape_inference.infer_shapes(alone).graph.value_info
            graph.value_info.extend(value for value in found if value.name not in known)
        around.update((value.name, value) for value in (*values, *graph.value_info))


def _to_bf16(model: Any, source: ModelSource, conversion: Conversion, _stays: Collection[str]) -> Any:
    """Convert by ModelOpt's AutoCast, with every node in BF16 that can be.

    ``convert_to_f16`` and not ``convert_to_mixed_precision``, which runs the model on random numbers to decide which
    nodes to leave in FP32: one model would have many conversions.

    Source: modelopt.onnx.autocast, nvidia-modelopt 0.47. Tried by hand, with an empty module in place of PyTorch, which
    AutoCast loads and does not use: all nine light models build with TensorRT-RTX 1.7.1. light_densenet121 was
    converted in 107 s, the others in 0.1 to 18 s, 2026-11.
    """
    from modelopt.onnx.autocast import convert_to_f16

    _load_external(model, source)
    return convert_to_f16(model, low_precision_type="bf16", keep_io_types=conversion.keeps_io)


_CONVERTERS: Mapping[str, _Converter] = {"fp16": _to_fp16, "bf16": _to_bf16}


def _write(model: Any, request: BuildRequest) -> Path:
    """Write the model, with its weights in a file next to it: they may be more than a protobuf message can hold."""
    import onnx

    folder = request.work_dir / CONVERTED_NAME
    folder.mkdir()
    name = request.source.name
    is_usable = name.isprintable() and name.isascii() and name != CONVERTED_WEIGHTS_NAME
    path = folder / (name if is_usable else "model.onnx")
    onnx.save_model(
        model,
        str(path),
        format="protobuf",  # else by the ending of the name, which may be any
        save_as_external_data=True,
        location=CONVERTED_WEIGHTS_NAME,
        size_threshold=EXTERNAL_FROM_BYTES,
    )
    return path


def _check(path: Path, source: ModelSource, log: BuildLog) -> None:
    """Refuse a converted model that is not an ONNX model, where the original was one.

    Operators that ONNX does not have are left to TensorRT; so is a graph that the checker refused before it was
    converted. It is stricter than TensorRT, with the names of graphs and with metadata, which are not in the key.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        if not _NOT_IN_ONNX.search(str(error)) and _is_valid(_read(source)):
            raise
        log.write("I", f"onnx.checker cannot judge the converted graph: {_first_line(error)}")


def _is_valid(model: Any) -> bool:
    """Return whether the checker takes a model as it was before its conversion. External data is not looked for."""
    import onnx

    for tensor in graph_fixes.tensors_of(model.graph):
        if tensor.data_location == tensor.EXTERNAL:
            tensor.dims[:] = [0]  # of which nothing need be there
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError:
        return False
    return True


def _refused(name: str, conversion: Conversion, error: Exception) -> BuildError:
    precision = conversion.precision
    by = f"{conversion.converter} {conversion.version}"
    reason = _first_line(error)
    if not reason:  # an assertion: its line in the converter is all that there is
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{place.line} (in {place.name})"
    message = f"{name} could not be converted to {precision} by {by}: {type(error).__name__}: {reason}"
    return BuildError(message, f"Leave --{precision} out, {_OTHER_WAY}.")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:600]


def _summarize(conversion: Conversion, caught: Sequence[warnings.WarningMessage], log: BuildLog) -> None:
    """Log one warning for all weights that were clamped to the largest number."""
    beyond = []
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        match = _CLAMPED.search(text)
        if match and abs(float(match["limit"])) == graph_fixes.MAX_FP16:
            beyond.append(float(match["value"]))
        log.write("I", text)
    if beyond:
        most, limit = max(beyond, key=abs), f"{graph_fixes.MAX_FP16:.0f}"
        log.write("W", f"weights beyond {conversion.precision}'s range, up to {most:g}, became {limit} or -{limit}")
