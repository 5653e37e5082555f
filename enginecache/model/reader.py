"""Read a model safely, and compute its identity."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from enginecache.errors import ModelError, OutOfMemoryError
from enginecache.files.digest import StreamDigest
from enginecache.model.external import ExternalData
from enginecache.model.files import ModelFiles, advice_for, unreadable
from enginecache.model.graph import StructureWriter
from enginecache.model.identity import Dimension, ModelIdentity, ModelInput, ModelSource
from enginecache.model.narrowing import WideParameterFinder, refuse_wide_attributes, refuse_wide_dims
from enginecache.model.quantization import QuantizationFinder
from enginecache.model.tensors import ELEMENT_TYPES, WEIGHTS_DOMAIN, WeightsWriter

_MAX_PROTOBUF_BYTES = (1 << 31) - 1
"""Largest serialized message. Source: protobuf, "Encoding", Message size: it is below 2 GiB."""

MEMORY_FACTOR = 150
"""Bytes of memory for each byte of a hostile ONNX file, at most.

An empty message takes two bytes in the file and is a separate object in protobuf and in Python. Measured 2026-11
with onnx 1.23 and protobuf 7.36 over 18 sorts of repeated field: 132 for metadata, 120 for attributes, 86 and less for
the rest; 0.6 s for each MB.
"""

_ATTEMPTS = 3
"""Readings of a model whose files change meanwhile."""

_EXPORT_AGAIN = "Export or download the model again."


def identify(source: ModelSource) -> ModelIdentity:
    """Read a model and all its external data, and return its identity.

    Writes nothing. Safe from threads and processes. If the files change meanwhile, they are read again, a few times.

    The model may be hostile. Time grows with the bytes of the ONNX file and with what its tensors take from external
    data, which is bounded (:class:`.external.ReadLimit`). Memory is bounded by the ONNX file: about twice its size
    where weights fill it, at most :data:`MEMORY_FACTOR` times where it is made of empty messages. External data goes
    through a few MiB.

    Args:
        source: The model.

    Returns:
        Its identity, with the fingerprints of the files that were read.

    Raises:
        ModelError: There is no such file, it is not an ONNX model, it must not be read, or its files keep changing.
    """
    for _ in range(_ATTEMPTS):
        files = ModelFiles(source)
        try:
            identity = _identify_once(source, files)
        except ModelError:
            if not files.have_changed():
                raise
        else:
            if not files.have_changed():
                return identity
    message = f"{source.name} is being written: its files changed during each of {_ATTEMPTS} readings"
    raise ModelError(message, "Wait until it is written, then try again.")


def _identify_once(source: ModelSource, files: ModelFiles) -> ModelIdentity:
    started_ns = time.time_ns()
    try:
        model = _parse(source, files)
        _check(model, source.name)
        inputs = tuple(_inputs(model.graph, source.name))
        digests = _walk(model, source, files)
    except RecursionError as error:
        raise ModelError(f"{source.name} is nested too deeply to be read", _EXPORT_AGAIN) from error
    except MemoryError as error:
        message = f"out of memory: {source.name} needs more to be read than this process may have"
        raise OutOfMemoryError(
            message, "Give the process more, or save the model with its weights as external data."
        ) from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{source.name} has text that is not UTF-8", _EXPORT_AGAIN) from error
    return ModelIdentity(
        **digests,
        inputs=inputs,
        files=files.as_tuple(),
        is_settled=files.are_settled(started_ns),
        has_links_out=files.has_links_out,
    )


def _parse(source: ModelSource, files: ModelFiles) -> Any:
    """Return the ``ModelProto``; the file's bytes are freed as soon as they are parsed."""
    from google.protobuf.message import DecodeError
    from onnx import ModelProto

    data = source.data if source.path is None else _file_bytes(source.path, files)
    if not data:
        raise ModelError(f"{source.name} is empty", _EXPORT_AGAIN)
    _require_size(source.name, len(data))
    try:
        return ModelProto.FromString(data)
    except DecodeError as error:
        if "MaxDepth" in str(error):  # upb's words, protobuf 7.36; other implementations take it for damage
            raise ModelError(f"{source.name} is nested too deeply to be read", _EXPORT_AGAIN) from error
        kind = "it is text" if _is_text(data[:512]) else "it is cut off, or something else"
        message = f"{source.name} is not an ONNX model: protobuf cannot parse its {len(data)} bytes ({kind})"
        raise ModelError(message, advice_for(data[:64], _EXPORT_AGAIN)) from error


def _is_text(head: bytes) -> bool:
    return head.isascii() and head.translate(None, b"\t\r\n").decode("ascii").isprintable()


def _file_bytes(path: Path, files: ModelFiles) -> bytes:
    with files.open(path) as file:
        try:
            size_bytes = file.seek(0, io.SEEK_END)
            _require_size(path.name, size_bytes)
            file.seek(0)
            return _read(file, size_bytes)
        except OSError as error:
            raise unreadable(path, error) from error


def _read(file: io.FileIO, size_bytes: int) -> bytes:
    # Not until end-of-file: a file that is being written may never end. Buffered: one raw read returns less than 2 GiB.
    buffered = io.BufferedReader(file)
    try:
        return buffered.read(size_bytes)
    finally:
        buffered.detach()


def _require_size(name: str, size_bytes: int) -> None:
    if size_bytes > _MAX_PROTOBUF_BYTES:
        message = f"{name} has {size_bytes} bytes, and a protobuf message has less than 2 GiB"
        raise ModelError(message, "Save the model with its weights as external data.")


def _check(model: Any, name: str) -> None:
    """Refuse data that parses but is not a model, and models that a newer onnx package wrote."""
    import onnx

    if model.ir_version > onnx.IR_VERSION:
        message = (
            f"{name} has ONNX IR version {model.ir_version}; onnx {onnx.__version__} reads up to {onnx.IR_VERSION}"
        )
        raise ModelError(message, "Upgrade the onnx package: pip install --upgrade onnx")
    missing = [
        part
        for part, is_there in {
            "IR version": model.ir_version > 0,
            "graph": model.HasField("graph"),
            "opset import": bool(model.opset_import),
            "graph output": bool(model.graph.output),
        }.items()
        if not is_there
    ]
    if missing:
        message = f"{name} is not an ONNX model, or was cut off: it has no {', no '.join(missing)}"
        raise ModelError(message, _EXPORT_AGAIN)


def _walk(model: Any, source: ModelSource, files: ModelFiles) -> dict[str, Any]:
    """Return the fields of :class:`ModelIdentity` that come from the graph; clears the model's tensors."""
    quantization = QuantizationFinder()
    parameters = WideParameterFinder()
    with (
        closing(StreamDigest(WEIGHTS_DOMAIN)) as weights,
        closing(ExternalData(source.external_dir, files)) as external,
    ):
        writer = WeightsWriter(weights, external)

        def on_tensor(tensor: Any, content: Mapping[str, Any]) -> None:
            quantization.see_tensor(tensor)
            writer.write(tensor, content)
            parameters.see_tensor(tensor, content)

        def on_node(node: Any) -> None:
            quantization.see_node(node)
            parameters.see_node(node)

        model.graph.ClearField("name")  # those of the graphs inside it count
        structure = StructureWriter(on_tensor, on_node, refuse_wide_attributes)
        structure.write(model)
    if structure.has_unknown_fields:
        raise _unknown_fields(source.name)
    parameters.refuse()
    return {
        "structure": structure.hexdigest(),
        "weights": weights.hexdigest(),
        "value_info": structure.value_info_hexdigest(),
        "quantization": quantization.types(),
        "has_misread": writer.has_misread,
    }


def _unknown_fields(name: str) -> ModelError:
    """Return the error for fields that this onnx package does not know: they are in no digest, and could hide data."""
    import onnx

    message = f"{name} has fields or enum values that onnx {onnx.__version__} does not know"
    return ModelError(message, "Upgrade the onnx package, or export the model with a release that it knows.")


def _inputs(graph: Any, name: str) -> Iterator[ModelInput]:
    # IR version 3 lists initializers among the inputs; TensorRT takes them for weights in every version.
    weights = {tensor.name for tensor in graph.initializer}
    weights.update(tensor.values.name for tensor in graph.sparse_initializer)
    for value in graph.input:
        if value.name not in weights:
            yield _input(value, name)


def _input(value: Any, name: str) -> ModelInput:
    label = f"input {value.name!r} of {name}"
    kind = value.type.WhichOneof("value")
    tensor = value.type.tensor_type
    if kind != "tensor_type" or not tensor.HasField("shape"):
        found = "a tensor without a shape" if kind == "tensor_type" else f"not a tensor ({kind})"
        message = f"{label} is {found}; TensorRT takes tensors of a known rank"
        raise ModelError(message, "Export the model with tensor inputs whose shapes are declared.")
    if tensor.elem_type not in ELEMENT_TYPES:
        message = f"{label} has the element type {tensor.elem_type}, which is not known here"
        raise ModelError(message, "Export the model again, or upgrade enginecache.")
    dims = tuple(_dimension(dim) for dim in tensor.shape.dim)
    if not all(isinstance(text, str | int | None) for text in (value.name, *dims)):
        # Protobuf returns bytes if a string is not UTF-8.
        raise ModelError(f"{label} has a name, or a dimension's name, that is not UTF-8", _EXPORT_AGAIN)
    refuse_wide_dims(label, dims)
    return ModelInput(value.name, ELEMENT_TYPES[tensor.elem_type].name, dims)


def _dimension(dim: Any) -> Dimension:
    """Return a dimension as TensorRT reads it: dynamic without a size or with a negative one; 0 is a size.

    An empty ``dim_param`` is a size of 0 too. Source: networks that TensorRT-RTX 1.7.1 parsed, 2026-11.
    """
    name: str = dim.dim_param
    if name:
        return name
    return None if dim.WhichOneof("value") is None or dim.dim_value < 0 else int(dim.dim_value)
