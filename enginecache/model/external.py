"""External data: bytes of tensors that are stored in files next to the model.

Source: ONNX, docs/ExternalData.md; onnx-tensorrt 10.1, WeightsContext.cpp, for what TensorRT accepts.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enginecache.errors import ModelError
from enginecache.files.digest import StreamDigest
from enginecache.model.files import LFS_POINTER, ModelFiles, advice_for, changed, unreadable

_KNOWN_KEYS = frozenset({"location", "offset", "length", "checksum", "basepath"})
"""Keys of an external data entry. No reader locates a file by ``checksum`` or ``basepath``.

Any other key is refused, as TensorRT does: it could redirect to other bytes, or declare a compression.
"""

MAX_BYTES = (1 << 63) - 1

MAX_READ_BYTES = 1 << 40
"""Bytes that all tensors of a model together may read from files: more than the memory of any GPU host.

A sparse file may claim any size, and costs its author nothing.
"""

_MAX_OVERLAP = 16
"""Times that the tensors may read the bytes of a file on average. Tied weights read some twice.

Without a limit a small model could have one large file read a million times.
"""

_FREE_BYTES = 1 << 30
"""Bytes that may be read from any file, however small: many small tensors may share one."""


@dataclass(frozen=True)
class Extent:
    """A range of bytes in an external data file.

    Attributes:
        location: Path of the file, relative to the model's folder.
        offset_bytes: Where the range begins.
        length_bytes: How long it is; None where the model does not say.
    """

    location: str
    offset_bytes: int
    length_bytes: int | None

    @classmethod
    def of_entries(cls, entries: Iterable[Any], label: str) -> Extent:
        """Parse ``TensorProto.external_data``.

        Args:
            entries: Messages with ``key`` and ``value``.
            label: Names the tensor in errors.

        Raises:
            ModelError: A key is unknown or there twice, a number cannot be read, or the location must not be followed.
        """
        values: dict[str, str] = {}
        for entry in entries:
            # Protobuf hands out bytes where a string is not UTF-8.
            if entry.key not in _KNOWN_KEYS or entry.key in values or not isinstance(entry.value, str):
                message = f"{label} has an external data entry that cannot be read: key {entry.key!r}"
                raise ModelError(message, "Save the model again with a current onnx package.")
            values[entry.key] = entry.value
        length = values.get("length")
        return cls(
            location=_safe_location(values.get("location", ""), label),
            offset_bytes=_number(values.get("offset", "0"), "offset", label),
            length_bytes=None if length is None else _number(length, "length", label),
        )


class ReadLimit:
    """Limit on the bytes that one reading of a model takes from its external data files."""

    def __init__(self) -> None:
        self._taken: dict[Path, int] = {}

    def take(self, path: Path, size_bytes: int, file_bytes: int, label: str) -> None:
        """Count bytes that are about to be read.

        Args:
            path: The file.
            size_bytes: How many.
            file_bytes: The file's size.
            label: Names the tensor in errors.

        Raises:
            ModelError: They are too many for this file, or for any model.
        """
        taken = self._taken[path] = self._taken.get(path, 0) + size_bytes
        if taken > max(_MAX_OVERLAP * file_bytes, _FREE_BYTES):
            message = f"{path} has {file_bytes} bytes, and the tensors up to {label} take {taken} from it"
            raise ModelError(message, "Save the model and its external data again: its tensors overlap too much.")
        if sum(self._taken.values()) > MAX_READ_BYTES:
            message = f"the tensors up to {label} take more than {MAX_READ_BYTES} bytes of external data"
            raise ModelError(message, "No GPU holds so much: check where the model comes from.")


class ExternalData:
    """Reader of extents in bounded memory; keeps one file open at a time."""

    def __init__(self, folder: Path | None, files: ModelFiles) -> None:
        self._folder = folder
        self._files = files
        self._limit = ReadLimit()
        self._path: Path | None = None
        self._file: io.FileIO | None = None

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._file is not None:
            self._file.close()

    def write_to(self, digest: StreamDigest, extent: Extent, size_bytes: int, label: str) -> None:
        """Hash ``size_bytes`` from where the extent begins.

        Args:
            digest: Takes the bytes.
            extent: Where they are.
            size_bytes: How many the tensor's shape and type ask for.
            label: Names the tensor in errors.

        Raises:
            ModelError: There is no folder to look in, or the file is missing, not regular or too short, or the
                extent has another length than the tensor.
        """
        if extent.length_bytes not in {None, size_bytes}:
            # Readers differ: onnx takes the extent, TensorRT takes 0 for the whole file and refuses what does not fit.
            message = f"{label} takes {size_bytes} bytes, but its external data has {extent.length_bytes}"
            raise ModelError(message, "Save the model and its external data again.")
        path, file = self._open(extent.location, label)
        try:
            file_bytes = self._require_range(path, file, extent.offset_bytes + size_bytes, label)
            self._limit.take(path, size_bytes, file_bytes, label)
            file.seek(extent.offset_bytes)
            count = digest.read_from(file, size_bytes)
        except OSError as error:
            raise unreadable(path, error) from error
        if count < size_bytes:
            raise changed(path)  # its size was enough a moment ago

    def _open(self, location: str, label: str) -> tuple[Path, io.FileIO]:
        if self._folder is None:
            message = f"{label} is in the external data file {location!r}, and bytes have no folder to look in"
            raise ModelError(message, "Pass base_dir, the folder that the external data lies in.")
        path = self._folder / location
        if self._file is None or path != self._path:
            if self._file is not None:
                self._file.close()
            self._file, self._path = self._files.open(path, location), path
        return path, self._file

    @staticmethod
    def _require_range(path: Path, file: io.FileIO, end: int, label: str) -> int:
        """Return the file's size, after a check that the range fits."""
        size_bytes = file.seek(0, io.SEEK_END)
        if end > size_bytes:
            file.seek(0)
            head = file.read(len(LFS_POINTER)) or b""
            message = f"{path} is too short: {label} ends at byte {end}, the file at {size_bytes}"
            raise ModelError(message, advice_for(head, "Fetch the file again, or save the model and its data again."))
        return size_bytes


def _safe_location(location: str, label: str) -> str:
    """Return ``location`` if its text cannot leave the model's folder; links are checked when the file is opened."""
    parts = re.split(r"[/\\]", location)
    if not location or not parts[0] or ".." in parts or "\0" in location or re.match("[A-Za-z]:", location):
        message = f"{label} names the external data file {location!r}, which is not a path inside the model's folder"
        raise ModelError(message, "Put the data next to the model, and save the model with relative locations.")
    return location


def _number(text: str, what: str, label: str) -> int:
    number = int(text) if re.fullmatch("[0-9]{1,19}", text) else -1
    if not 0 <= number <= MAX_BYTES:
        message = f"{label} has an external data {what} that is not a number of bytes: {text[:40]!r}"
        raise ModelError(message, "Save the model and its external data again.")
    return number
