"""Identity of a model: digests of structure, weights and ``value_info``, its inputs, and the files it was read from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import blake3

from enginecache.errors import ModelError
from enginecache.files.fingerprint import Fingerprint

Dimension = int | str | None
"""A static size, the name of a dynamic dimension, or None for a dynamic dimension without a name."""


@dataclass(frozen=True)
class ModelSource:
    """Source of a model: a path, or bytes with the folder of their external data.

    Attributes:
        path: Path of the ONNX file; None for bytes.
        data: A serialized ``ModelProto``; None for a path.
        base_dir: Folder of the external data of ``data``; None where there is none.
        follows_links: Whether external data may be reached through links that leave the model's folder.
    """

    path: Path | None = None
    data: bytes | None = None
    base_dir: Path | None = None
    follows_links: bool = False

    @classmethod
    def of(cls, model: str | os.PathLike[str] | bytes, base_dir: str | os.PathLike[str] | None = None) -> ModelSource:
        """Make a source from a path or from bytes.

        Raises:
            ModelError: ``base_dir`` is given for a path: external data belongs next to a model file.
        """
        if isinstance(model, bytes | bytearray | memoryview):
            folder = None if base_dir is None else Path(base_dir).absolute()
            return cls(data=bytes(model), base_dir=folder)
        if base_dir is not None:
            message = "base_dir is for model bytes; the external data of a model file lies next to the file"
            raise ModelError(message, "Leave base_dir out, or pass the model's bytes.")
        try:
            return cls(path=Path(model).absolute())
        except FileNotFoundError as error:
            raise ModelError(
                f"{model} is relative, and the current folder was deleted", "Give an absolute path."
            ) from error
        except TypeError as error:
            kind = type(model).__name__
            fix = f"Pass {'model.SerializeToString()' if kind == 'ModelProto' else 'a path, or the serialized bytes'}."
            raise ModelError(f"the model must be a path or bytes, not {kind}", fix) from error

    @property
    def name(self) -> str:
        """Return the file's name, or ``<bytes>``; for display, never part of the key."""
        return self.path.name if self.path is not None else "<bytes>"

    @property
    def external_dir(self) -> Path | None:
        """Return the folder that external data locations are relative to."""
        return self.path.parent if self.path is not None else self.base_dir

    def path_of(self, location: str) -> Path | None:
        """Return the path of the ONNX file (for an empty location) or of an external data file; None for bytes."""
        if not location:
            return self.path
        return None if self.external_dir is None else self.external_dir / location


@dataclass(frozen=True)
class ModelInput:
    """One input of the graph that is not an initializer.

    Attributes:
        name: Name in the graph.
        dtype: ONNX name of the element type: ``FLOAT``, ``INT64``, ...
        dims: One entry a dimension.
    """

    name: str
    dtype: str
    dims: tuple[Dimension, ...]

    @property
    def is_static(self) -> bool:
        """Return whether every dimension has a size."""
        return all(isinstance(dim, int) for dim in self.dims)

    @property
    def can_be_shape_tensor(self) -> bool:
        """Return whether TensorRT may read its *values* while building: integers, rank 0 or 1, of a static size.

        Source: NVIDIA, "Working with Dynamic Shapes", execution tensors and shape tensors.
        """
        return self.dtype in {"INT32", "INT64"} and len(self.dims) <= 1 and self.is_static

    def __str__(self) -> str:
        return f"{self.name}: [{', '.join('?' if dim is None else str(dim) for dim in self.dims)}]"


@dataclass(frozen=True)
class ModelFile:
    """One file that the model's bytes came from.

    Attributes:
        location: Empty for the ONNX file itself, else the external data location as the model writes it.
        fingerprint: Its fingerprint while it was read.
    """

    location: str
    fingerprint: Fingerprint


@dataclass(frozen=True)
class ModelIdentity:
    """Identity of a model, as the key uses it.

    Attributes:
        structure: Digest (64 hex characters, BLAKE3) of the graph with every tensor as name, type and dimensions.
        weights: Digest (64 hex characters, BLAKE3) of the content of every tensor, in the graph's order.
        value_info: Digest (64 hex characters, BLAKE3) of the types and shapes that an exporter noted inside the graph;
            empty where there are none.
        inputs: In the graph's order, without initializers.
        files: The ONNX file first (not for bytes), then each external data file once, in order of first use.
        is_settled: Whether every file was old enough, and unchanged before and after, for its fingerprint to stand
            for its bytes.
        quantization: The types that its Q/DQ nodes quantize to, sorted: ``int8``, ``fp8``, ... Not part of the key:
            the structure digest covers it.
        has_misread: Whether TensorRT would misread a tensor in the form that the file stores, so that the builder must
            receive another form. Not part of the key: the weights digest covers it.
        has_links_out: Whether external data was reached through a link that leaves the model's folder.
    """

    structure: str
    weights: str
    value_info: str
    inputs: tuple[ModelInput, ...]
    files: tuple[ModelFile, ...]
    is_settled: bool = False
    quantization: tuple[str, ...] = ()
    has_misread: bool = False
    has_links_out: bool = False

    @property
    def digest(self) -> str:
        """Return one digest (64 hex characters, BLAKE3) of structure, weights and ``value_info`` together."""
        text = f"enginecache/model/v2\n{self.structure}\n{self.weights}\n{self.value_info}\n"
        return blake3.blake3(text.encode()).hexdigest()


def has_changed(source: ModelSource, identity: ModelIdentity) -> bool:
    """Return whether any file of the model is missing, or has another fingerprint than in ``identity``.

    Cheap: one ``stat`` a file. Model bytes themselves cannot change; their external data can.
    """
    for file in identity.files:
        path = source.path_of(file.location)
        try:
            if path is None or Fingerprint.of_path(path) != file.fingerprint:
                return True
        except OSError:
            return True
    return False
