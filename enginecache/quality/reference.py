"""The reference: a model computed by ONNX Runtime on the CPU, in a child process.

``python -m enginecache.quality.reference`` takes one request and reports one result; see :mod:`enginecache.trt.child`
for its pipes. A model that crashes ONNX Runtime, or takes all memory, ends this process and not its parent.

Arrays go through ``.npz`` files in the check's folder, named by the position of the input or output, which any name of
a tensor fits. Nothing is pickled.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from enginecache.errors import CheckUnavailableError, EngineCacheError
from enginecache.model.external import Extent
from enginecache.model.tensors import ELEMENT_TYPES
from enginecache.quality.compare import compare
from enginecache.quality.inputs import SAME_VALUES, Point, Ranges, arrays_of, index_ranges, other_arrays
from enginecache.quality.memory import give_way
from enginecache.quality.rounding import BFLOAT16, FLOAT16, round_every_value, round_to
from enginecache.trt.child import Reports, end_process, receive_request

RANDOM_OPERATORS = {
    *("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
}

BOUNDED_OPERATORS = {"Sigmoid", "Softmax", "HardSigmoid"}

_MAPPED = {
    "FLOAT": "<f4",
    "DOUBLE": "<f8",
    "FLOAT16": "<f2",
    "BOOL": "?",
    "INT8": "i1",
    "UINT8": "u1",
    "INT16": "<i2",
    "UINT16": "<u2",
    "INT32": "<i4",
    "UINT32": "<u4",
    "INT64": "<i8",
    "UINT64": "<u8",
}
"""Element types of external data that are mapped and not read: numpy has them."""


def main() -> None:
    """Read the request, compute, report, and end the process."""
    record, reports = receive_request()
    give_way()
    run(record, reports)
    end_process(0)


def run(record: Mapping[str, Any], reports: Reports) -> None:
    """Compute what the request says, and send exactly one result."""
    try:
        found = compute_graph(record) if record["graph"] is not None else compute_reference(record)
    except EngineCacheError as error:
        reports.send({"event": "failed", "what": error.what})
    except MemoryError:
        reports.send({"event": "failed", "what": "out of memory"})
    except Exception as error:  # noqa: BLE001  # ONNX Runtime and onnx raise many kinds
        traceback.print_exc()
        text = " ".join(str(error).split())[:600]
        reports.send({"event": "failed", "what": text or type(error).__name__})
    else:
        reports.send({"event": "done", **found})


def compute_reference(record: Mapping[str, Any]) -> dict[str, Any]:
    """Make the inputs, compute the model's outputs at every point, and find out which of them the inputs change.

    Returns:
        The outputs' names, those of them that vary, the source of each input's values, and ONNX Runtime's version.
    """
    model = _load(record)
    folder, points = Path(record["folder"]), [Point.from_json(point) for point in record["points"]]
    given: Ranges = {name: (low, high) for name, (low, high) in record["ranges"].items()}
    found = index_ranges(model)
    ranges = {**found, **given}
    session = _Session(model, record)
    probabilities = _probabilities(model)
    for index, point in enumerate(points):
        arrays = arrays_of(point, index, record["seed"], ranges)
        save_arrays(folder / f"inputs-{index}.npz", arrays.values())
        save_arrays(folder / f"expected-{index}.npz", session.run(arrays))
    return {
        "outputs": session.outputs,
        "varies": _varying(session, points[0], record, ranges, probabilities),
        "probabilities": sorted(probabilities & set(session.outputs)),
        "inputs": _sources(points, ranges, found, given),
        "version": session.version,
        "random": sorted({node.op_type for node in model.graph.node} & RANDOM_OPERATORS),
    }


def _probabilities(model: Any) -> set[str]:
    """Return the values that are from 0 to 1 by their operator: however small they are, an error of 0.001 is too."""
    found: set[str] = set()
    for node in model.graph.node:
        if node.op_type in BOUNDED_OPERATORS or (node.op_type in SAME_VALUES and node.input[0] in found):
            found.update(node.output)
    return found


def _varying(
    session: _Session, point: Point, record: Mapping[str, Any], ranges: Ranges, probabilities: set[str]
) -> list[str]:
    """Return the outputs that other inputs of the same shapes change by more than the tolerance."""
    expected = load_arrays(Path(record["folder"]) / "expected-0.npz")
    if point.file:
        arrays = other_arrays(arrays_of(point, 0, record["seed"], ranges), point)
    else:
        arrays = arrays_of(point, 0, record["seed"] + 1, ranges)
    others = session.run(arrays)
    return [
        name
        for name, one, other in zip(session.outputs, expected, others, strict=True)
        if not compare(name, one, other, float(name in probabilities)).is_within(record["tolerance"])
    ]


def _sources(points: Sequence[Point], ranges: Ranges, found: Ranges, given: Ranges) -> list[list[str]]:
    sources = []
    for entry in points[0].inputs:
        low, high = ranges.get(entry.name, (0, 0))
        if points[0].file:
            source = "file"
        elif entry.values is not None:
            source = "profile"
        elif entry.name in given:
            source = f"range {low:g}:{high:g}"
        else:
            source = f"indices {low:g}:{high:g}" if entry.name in found else "seed"
        sources.append([entry.name, source])
    return sources


def compute_graph(record: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the outputs of the converted graph for the inputs that the reference was given, every value rounded."""
    import onnx

    _require_rounding()
    path = Path(record["graph"])
    model = onnx.load(str(path), load_external_data=False)
    narrow = {
        value.name: value.type.tensor_type.elem_type
        for value in model.graph.input
        if value.type.tensor_type.elem_type in {FLOAT16, BFLOAT16}
    }
    session = _Session(round_every_value(model), {"path": str(path), "base_dir": None})
    folder = Path(record["folder"])
    for index, fields in enumerate(record["points"]):
        names = [entry["name"] for entry in fields["inputs"]]
        arrays = dict(zip(names, load_arrays(folder / f"inputs-{index}.npz"), strict=True))
        arrays |= {name: round_to(arrays[name], kind) for name, kind in narrow.items() if name in arrays}
        save_arrays(folder / f"found-{index}.npz", session.run(arrays))
    return {"outputs": session.outputs, "version": session.version}


def _require_rounding() -> None:
    """Refuse an ONNX Runtime that leaves out the casts which round: it would call an overflow right."""
    import onnx

    for kind, number, wanted in ((FLOAT16, 1e5, float("inf")), (BFLOAT16, 257.0, 256.0)):
        nodes = [
            onnx.helper.make_node("Cast", ["x"], ["narrow"], to=kind),
            onnx.helper.make_node("Cast", ["narrow"], ["y"], to=1),
        ]
        value = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(nodes, "rounding", [value("x", 1, [1])], [value("y", 1, [1])])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
        import numpy as np

        (found,) = _Session(model, {"path": None, "base_dir": None}).run({"x": np.array([number], np.float32)})
        if found[0] != wanted:
            message = f"this ONNX Runtime does not round to {'FP16' if kind == FLOAT16 else 'BF16'}"
            raise CheckUnavailableError(message, "Install another release: pip install -U onnxruntime")


def _load(record: Mapping[str, Any]) -> Any:
    import onnx

    path = record["data"] if record["path"] is None else record["path"]
    return onnx.ModelProto.FromString(Path(path).read_bytes())


class _Session:
    """A model in ONNX Runtime, on the CPU. Its external data is mapped, wherever links lead: the key names its bytes.

    Attributes:
        outputs: Names, in the model's order.
        version: ``onnxruntime`` and its version.
    """

    def __init__(self, model: Any, record: Mapping[str, Any]) -> None:
        import onnxruntime

        folder = record["base_dir"] if record["path"] is None else str(Path(record["path"]).parent)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self._kept = _hand_over_external_data(model, folder, options)
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._types = {entry.name: entry.type for entry in self._session.get_inputs()}
        self.outputs = [entry.name for entry in self._session.get_outputs()]
        self.version = f"onnxruntime {onnxruntime.__version__}"

    def run(self, arrays: Mapping[str, Any]) -> list[Any]:
        """Compute the outputs, in the order of :attr:`outputs`."""
        import numpy as np

        feeds = {name: arrays[name] for name in self._types if name in arrays}
        for name, array in feeds.items():
            if self._types[name] == "tensor(bfloat16)":
                message = f"input {name!r} is of type BFLOAT16, which ONNX Runtime does not take from numpy"
                raise CheckUnavailableError(message, "Such a model cannot be checked.")
            feeds[name] = np.ascontiguousarray(array).reshape(array.shape)
        found = self._session.run(None, feeds)
        for name, array in zip(self.outputs, found, strict=True):
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
                raise CheckUnavailableError(f"output {name!r} is not a tensor of numbers", "It cannot be checked.")
        return list(found)


def _hand_over_external_data(model: Any, folder: str | None, options: Any) -> list[Any]:
    """Give ONNX Runtime the external data of a model, mapped where it can be.

    ONNX Runtime itself follows no links out of the model's folder, and model hubs store weights behind such links.

    Returns:
        What must live as long as the session.
    """
    import onnxruntime

    arrays: dict[str, Any] = {}
    for tensor in filter(_is_external, model.graph.initializer):
        array = _mapped(tensor, folder)
        if array is None:
            _bring_in(tensor, folder)
        else:
            arrays[tensor.name] = array
    for tensor in filter(_is_external, _inner_tensors(model.graph)):
        _bring_in(tensor, folder)
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
    if values:
        options.add_external_initializers(list(arrays), values)
    return [*arrays.values(), *values]


def _is_external(tensor: Any) -> bool:
    return bool(tensor.data_location == tensor.EXTERNAL)


def _inner_tensors(graph: Any) -> Iterator[Any]:
    """Yield the tensors that are not a graph's own weights: in its nodes, and in the graphs inside them."""
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from (*inner.initializer, *_inner_tensors(inner))


def _mapped(tensor: Any, folder: str | None) -> Any:
    """Return a tensor's external data as an array, or None where numpy does not have its type or it has no elements."""
    import numpy as np

    element = ELEMENT_TYPES[tensor.data_type]
    kind = _MAPPED.get(element.name)
    extent = Extent.of_entries(tensor.external_data, f"tensor {tensor.name!r}")
    if kind is None or not all(tensor.dims):
        return None
    shape = tuple(tensor.dims)
    mapped = np.memmap(_file(folder, extent), kind, "r", extent.offset_bytes, shape or (1,))
    return np.require(np.asarray(mapped).reshape(shape), requirements=["C", "A"])


def _bring_in(tensor: Any, folder: str | None) -> None:
    label = f"tensor {tensor.name!r}"
    extent = Extent.of_entries(tensor.external_data, label)
    with open(_file(folder, extent), "rb") as file:  # noqa: PTH123  # a string, and not a Path
        file.seek(extent.offset_bytes)
        tensor.raw_data = file.read(ELEMENT_TYPES[tensor.data_type].size_bytes(tensor.dims, label))
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def _file(folder: str | None, extent: Extent) -> str:
    if folder is None:
        message = f"the model's bytes have external data in {extent.location!r}, and no folder for it is known"
        raise CheckUnavailableError(message, "Give base_dir.")
    return os.path.join(folder, extent.location)  # noqa: PTH118


def save_arrays(path: Path, arrays: Iterable[Any]) -> None:
    """Write arrays to a new file, by their position."""
    import numpy as np

    np.savez(path, **{str(index): array for index, array in enumerate(arrays)})


def load_arrays(path: Path) -> list[Any]:
    """Return the arrays of a file in this folder, in order."""
    import numpy as np

    with np.load(path, allow_pickle=False) as stored:
        return [stored[str(index)] for index in range(len(stored.files))]


if __name__ == "__main__":
    main()
