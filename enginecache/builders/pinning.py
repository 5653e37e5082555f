"""The model's files, held open, so that TensorRT reads the very ones that the key names.

A path can lead elsewhere while TensorRT parses and back again before it is looked at: a release link that is moved and
rolled back. No file changes then, so no fingerprint tells. TensorRT is therefore given links to open descriptors.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from dataclasses import replace

from enginecache.builders.base import BuildRequest
from enginecache.errors import ModelChangedError
from enginecache.fingerprint import Fingerprint
from enginecache.model import ModelFile, ModelSource


class PinnedModel:
    """The request with a source that cannot be led elsewhere, and a check that its files stayed as they were.

    Attributes:
        request: As given, with links to the open files as its source.
    """

    def __init__(self, request: BuildRequest) -> None:
        self._folder = request.work_dir / "model"
        self._folder.mkdir()
        self._original = request
        self._files: list[tuple[int, ModelFile]] = []
        source = request.source
        path = None if source.path is None else self._folder / source.path.name
        base_dir = None if path is not None else self._folder
        self.request = replace(request, source=ModelSource(path, source.data, base_dir))

    def open(self) -> None:
        """Open every file and link to it.

        Raises:
            ModelChangedError: One is not the file of the identity.
        """
        source = self._original.source
        for file in self._original.identity.files:
            if not file.location and source.path is None:
                continue  # bytes: nothing can lead elsewhere
            name = file.location or (source.path.name if source.path is not None else "")
            try:
                descriptor = os.open(source.path_of(file.location) or "", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError as error:
                raise self._changed() from error
            self._files.append((descriptor, file))
            link = self._folder / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(f"/proc/self/fd/{descriptor}")
        self._compare()

    def check(self) -> None:
        """Call when TensorRT has parsed: whether it read what the key names.

        Fingerprints suffice where they were settled when the identity was taken. A younger file can have been
        rewritten within one tick of its time stamps, so then the bytes are digested again.

        Raises:
            ModelChangedError: It may not have.
        """
        self._compare()
        if not self._original.identity.is_settled:
            from enginecache.model import identify

            if identify(self.request.source).digest != self._original.identity.digest:
                raise self._changed()

    def _compare(self) -> None:
        for descriptor, file in self._files:
            if Fingerprint.of_stat(os.fstat(descriptor)) != file.fingerprint:
                raise self._changed()

    def _changed(self) -> ModelChangedError:
        name = self._original.source.name
        message = f"{name} or its external data changed while its engine was being built"
        return ModelChangedError(message, "Nothing was published. Run it again when the files are at rest.")

    def close(self) -> None:
        """Let the files go. Idempotent."""
        while self._files:
            os.close(self._files.pop()[0])


@contextlib.contextmanager
def pinned(request: BuildRequest) -> Iterator[PinnedModel]:
    """Hold the model's files open while TensorRT reads them.

    Raises:
        ModelChangedError: They are not the files of the request's identity.
    """
    # Some exporters write a file for each tensor; the usual soft limit is 1024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    model = PinnedModel(request)
    try:
        model.open()
        yield model
    finally:
        model.close()
