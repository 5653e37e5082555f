"""The model's files, held open, so that TensorRT reads the very ones that the key names.

A path can lead elsewhere while TensorRT parses and back again before it is looked at: a release link that is moved and
rolled back. No file changes then, so no fingerprint shows it. TensorRT is therefore given links to open descriptors.

TensorRT-RTX maps external data while it parses and reads it while it builds, so the files are compared once more when
the plan is there, and whenever there is none: a file that changed may be why.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace

from enginecache.errors import ModelChangedError, ModelError
from enginecache.files.fingerprint import Fingerprint
from enginecache.model import ModelFile, ModelSource
from enginecache.trt.build.request import BuildRequest
from enginecache.trt.plugin_libraries import check_registered

IN_MODIFY, IN_CLOSE_WRITE, IN_Q_OVERFLOW = 0x2, 0x8, 0x4000
"""Source: Linux, include/uapi/linux/inotify.h."""

EVENT_BYTES = 16
"""Size of a ``struct inotify_event`` of a watched file, which has no name. The mask is its second word."""


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
        self._writes = _Writes()
        source = request.source
        path = None if source.path is None else self._folder / source.path.name
        base_dir = None if path is not None else self._folder
        # Its links lead to the open files, wherever those are.
        self.request = replace(request, source=ModelSource(path, source.data, base_dir, follows_links=True))

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
            self._writes.watch(descriptor)
            link = self._folder / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(f"/proc/self/fd/{descriptor}")
        self.compare()

    def compare(self) -> None:
        """Compare fingerprints: cheap, and enough to give up early when TensorRT has parsed.

        A link, a rename or a new mode moves ctime alone. So does a rewrite whose author sets the old times again: the
        kernel's notice of each write tells the two apart, and where there are no notices both count as a change.

        Raises:
            ModelChangedError: A file was written to, or its fingerprint is another.
        """
        seen = self._writes.seen()
        if seen is not None and seen & (IN_MODIFY | IN_Q_OVERFLOW):
            raise self._changed()
        for descriptor, file in self._files:
            found = Fingerprint.of_descriptor(descriptor)
            is_mere_ctime = seen == 0 and found._replace(ctime_ns=file.fingerprint.ctime_ns) == file.fingerprint
            if found != file.fingerprint and not is_mere_ctime:
                raise self._changed()

    def check(self) -> None:
        """Compare the files, and the libraries of plugins, with the key, when TensorRT no longer reads them.

        Fingerprints suffice where they were conclusive when the identity was taken (``is_settled``, see
        ``Fingerprint.is_conclusive``), and no process can write without moving them, which one that keeps a page mapped
        and dirty can. Else the bytes are digested again. Not seen is what such a mapping changed and changed back.

        Raises:
            ModelChangedError: They may not be what the key names.
        """
        check_registered()
        self.compare()
        if not self._is_conclusive():
            from enginecache.model import identify

            try:
                digest = identify(self.request.source).digest
            except ModelError as error:
                raise self._changed() from error
            if digest != self._original.identity.digest:
                raise self._changed()
            self.compare()

    def _is_conclusive(self) -> bool:
        return (
            self._original.identity.is_settled
            and not self._writes.seen()
            and all(
                Fingerprint.of_descriptor(descriptor) == file.fingerprint and not _is_open_for_writing(descriptor)
                for descriptor, file in self._files
            )
        )

    def _changed(self) -> ModelChangedError:
        name = self._original.source.name
        message = f"{name} or its external data changed while its engine was being built"
        return ModelChangedError(message, "Nothing was published. Run it again when nothing writes to them.")

    def close(self) -> None:
        """Close the files. Idempotent."""
        self._writes.close()
        while self._files:
            os.close(self._files.pop()[0])


class _Writes:
    """The kernel's notices of writes to open files. Best effort: there is a limit to them, and some kernels have none.

    Source: Linux, inotify(7). A write through a mapping gives no notice; the end of a mapping for writing does.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._is_whole = self._descriptor >= 0
        self._seen = 0

    def watch(self, descriptor: int) -> None:
        """Take notice of writes to an open file from now on."""
        path = f"/proc/self/fd/{descriptor}".encode()
        if self._is_whole:
            added = self._libc.inotify_add_watch(self._descriptor, path, IN_MODIFY | IN_CLOSE_WRITE)
            self._is_whole = added >= 0

    def seen(self) -> int | None:
        """Return the kinds of all notices so far; None where there may have been others."""
        with contextlib.suppress(BlockingIOError):
            while self._is_whole:
                data = os.read(self._descriptor, 256 * EVENT_BYTES)
                for offset in range(0, len(data), EVENT_BYTES):
                    self._seen |= int.from_bytes(data[offset + 4 : offset + 8], sys.byteorder)
        return self._seen if self._is_whole else None

    def close(self) -> None:
        """Stop watching. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._is_whole = -1, False


def _is_open_for_writing(descriptor: int) -> bool:
    """Tell whether any process has the file open or mapped for writing, as far as this user may know.

    The kernel grants a lease only on a file that nobody can write to. It is given back at once; a process that opens
    the file in between waits for that, and this process gets a signal, which would end it.

    Source: Linux, fcntl(2), F_SETLEASE.
    """
    handler = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    finally:
        signal.signal(signal.SIGIO, handler)
    return False


@contextlib.contextmanager
def pinned(request: BuildRequest) -> Iterator[PinnedModel]:
    """Hold the model's files open while TensorRT reads them, and check them at the end.

    Raises:
        ModelChangedError: They are not the files of the request's identity, or no longer; other errors meanwhile may
            be due to that.
    """
    # Some exporters write a file for each tensor; the usual soft limit is 1024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    model = PinnedModel(request)
    try:
        model.open()
        try:
            yield model
        except Exception as error:
            try:
                model.check()
            except ModelChangedError as changed:
                raise changed from error
            raise
        model.check()
    finally:
        model.close()
