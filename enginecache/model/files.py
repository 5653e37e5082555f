"""Files of a model: opened without blocking, and checked for changes."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from enginecache.errors import ModelError
from enginecache.files.fingerprint import Fingerprint
from enginecache.files.os_errors import describe_os_error
from enginecache.model.identity import ModelFile, ModelSource

_FOLLOW_ADVICE = (
    "Put the file itself next to the model, or, if you trust the model, set ENGINECACHE_FOLLOW_LINKS=yes "
    "(follow_links in the configuration file)."
)

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of a Git LFS pointer. Source: the Git LFS specification, "The Pointer"."""


class ModelFiles:
    """The files of one reading of a model, each with its fingerprint when it was first opened.

    Args:
        source: The model; decides where links of its external data may lead.

    Attributes:
        has_links_out: Whether a link left the model's folder, and that was allowed.
    """

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._files: dict[Path, ModelFile] = {}
        self.has_links_out = False

    def open(self, path: Path, location: str = "") -> io.FileIO:
        """Open a file for reading and note its fingerprint.

        Never blocks: a FIFO, a device or a folder is refused before and after opening.

        Args:
            path: The file; symbolic links are followed.
            location: As the model writes it; empty for the ONNX file itself.

        Raises:
            ModelError: The file is missing, may not be read, is not a regular file, is not the one opened before, or is
                external data that a link reaches outside the model's folder.
        """
        try:
            _require_regular(path, os.stat(path))
            # O_NONBLOCK: a FIFO that took the file's place since.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
            file = io.FileIO(descriptor)
        except ModelError:
            raise
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from error
        try:
            if location:
                self._check_link(path, descriptor)
            self._note(path, location, descriptor)
        except BaseException:
            file.close()
            raise
        return file

    def _note(self, path: Path, location: str, descriptor: int) -> None:
        _require_regular(path, os.fstat(descriptor))
        found = ModelFile(location, Fingerprint.of_descriptor(descriptor))
        if self._files.setdefault(path, found).fingerprint != found.fingerprint:
            raise changed(path)

    def _check_link(self, path: Path, descriptor: int) -> None:
        """Refuse external data outside the model's folder, unless that is allowed.

        The location comes from the open descriptor, so a link that changes meanwhile makes no difference.
        """
        real = _real_path(descriptor, path)
        if real == path or _is_of_model(real, self._source):
            return
        self.has_links_out = True
        if not self._source.follows_links:
            message = f"{path} is reached through a link that leaves the model's folder: it is {real}"
            raise ModelError(message, _FOLLOW_ADVICE)

    def have_changed(self) -> bool:
        """Return whether any path now leads to other content than when it was first opened."""
        return any(_fingerprint(path) != file.fingerprint for path, file in self._files.items())

    def are_settled(self, read_ns: int) -> bool:
        """Return whether every file's fingerprint stands for its bytes, if its reading began at ``read_ns``."""
        return all(file.fingerprint.is_conclusive(read_ns) for file in self._files.values())

    def as_tuple(self) -> tuple[ModelFile, ...]:
        """Return the files in the order of first use."""
        return tuple(self._files.values())


def _is_of_model(real: Path, source: ModelSource) -> bool:
    """Return whether a file, given by its path without links, belongs to the model.

    It does if it is in the model's folder, in the folder of the ONNX file that a link leads to (the user named the
    link), or among the ``blobs`` of the repository whose ``snapshots`` contain the model's folder.

    Source: huggingface_hub, "Understand caching": ``snapshots/<revision>/<file>`` links to ``blobs/<hash>``. Kubernetes
    mounts a volume's files as links to ``..data/``, which is in the folder itself.
    """
    folders = [source.external_dir, None if source.path is None else Path(os.path.realpath(source.path)).parent]
    for folder in (Path(os.path.realpath(folder)) for folder in folders if folder is not None):
        if folder in real.parents:
            return True
        repositories = (inner.parent.parent for inner in (folder, *folder.parents) if inner.parent.name == "snapshots")
        if any(real.parent == repository / "blobs" for repository in repositories):
            return True
    return False


def _real_path(descriptor: int, path: Path) -> Path:
    try:
        return Path(f"/proc/self/fd/{descriptor}").readlink()
    except OSError:  # no /proc
        return Path(os.path.realpath(path))


def changed(path: Path) -> ModelError:
    """Return the error for a file that changed after it was opened."""
    return ModelError(f"{path} changed while it was being read", "Wait until it is written, then try again.")


def unreadable(path: Path, error: OSError | ValueError) -> ModelError:
    """Return the error for a file that cannot be opened or read; a ``ValueError`` is an impossible path."""
    if isinstance(error, ModelError):  # is a ValueError, and has said it all
        return error
    if isinstance(error, FileNotFoundError):
        return ModelError(
            f"there is no file {path}", "Check the path; external data belongs in the ONNX file's folder."
        )
    doing = f"{path} may not be read" if isinstance(error, PermissionError) else f"{path} cannot be read"
    return ModelError(*describe_os_error(error, doing, path, otherwise="Check the path and the file system."))


def advice_for(head: bytes, otherwise: str) -> str:
    """Return advice for a file with unexpected content that begins with ``head``."""
    if head.startswith(LFS_POINTER):
        return "It is a Git LFS pointer, not the file itself: run `git lfs pull`."
    return otherwise


def _require_regular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ModelError(f"{path} is a folder", "Name the file inside it.")
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{path} is not a regular file", "Copy its content into a file, and name that.")


def _fingerprint(path: Path) -> Fingerprint | None:
    try:
        return Fingerprint.of_path(path)
    except OSError:
        return None
