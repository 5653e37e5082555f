"""Memoize digests of models and plugin libraries by the stat fingerprints of their files."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from enginecache.errors import OptionError
from enginecache.files.digest import StreamDigest
from enginecache.files.fingerprint import Fingerprint, has_kernel_times
from enginecache.files.os_errors import describe_os_error
from enginecache.files.plain import from_plain, to_plain
from enginecache.key.key import KEY_VERSION
from enginecache.key.options import PluginLibrary
from enginecache.model import ModelIdentity, ModelSource, has_changed, identify
from enginecache.storage.registry.memos import Memos


class FileMemo:
    """Identities of models and digests of plugin libraries, by the stat fingerprints of their files."""

    def __init__(self, memos: Memos) -> None:
        self._memos = memos

    def identify(self, source: ModelSource, *, force: bool = False) -> ModelIdentity:
        """Return the model's identity, from the memo if none of its files has changed.

        Args:
            source: The model.
            force: Read its files in any case.

        Raises:
            ModelError: The model cannot be read, or must not be.
        """
        return (None if force else self._recalled_identity(source)) or self._fresh_identity(source)

    def _recalled_identity(self, source: ModelSource) -> ModelIdentity | None:
        if source.path is None:
            return None
        try:
            fingerprint = Fingerprint.of_path(source.path)
        except (OSError, ValueError):  # ValueError: a NUL in the path
            return None  # identify says why
        found = self._memos.recall("model", fingerprint) if has_kernel_times(fingerprint) else None
        if found is None or found.get("key_version") != KEY_VERSION:
            return None
        identity = from_plain(ModelIdentity, found["identity"])
        if not all(has_kernel_times(file.fingerprint) for file in identity.files[1:]):
            return None
        if identity.has_links_out and not source.follows_links:
            return None  # identify says which
        return None if has_changed(source, identity) else identity

    def _fresh_identity(self, source: ModelSource) -> ModelIdentity:
        identity = identify(source)
        self.keep(source, identity)
        return identity

    def keep(self, source: ModelSource, identity: ModelIdentity) -> None:
        """Remember an identity that was just computed, if a later change to its files would be detected."""
        if identity.is_settled and source.path is not None:
            found = {"key_version": KEY_VERSION, "identity": to_plain(identity)}
            self._memos.remember("model", identity.files[0].fingerprint, found)

    def plugin(self, path: Path) -> PluginLibrary:
        """Return a plugin library with the digest of its bytes, from the memo if the file has not changed.

        Raises:
            OptionError: It cannot be read.
        """
        now_ns = time.time_ns()
        try:
            with path.open("rb", buffering=0) as file:
                before = Fingerprint.of_descriptor(file.fileno())
                found = self._memos.recall("plugin", before) if has_kernel_times(before) else None
                if found is not None:
                    return PluginLibrary(path, found["digest"])
                with contextlib.closing(StreamDigest()) as stream:
                    stream.read_from(file, before.size_bytes)
                    digest = stream.hexdigest()
                after = Fingerprint.of_descriptor(file.fileno())
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise OptionError(
                *describe_os_error(
                    error,
                    f"the plugin library {path} cannot be read",
                    path,
                    otherwise="Name the library's file with --plugin.",
                )
            ) from error
        if before == after and after.is_conclusive(now_ns):
            self._memos.remember("plugin", after, {"digest": digest})
        return PluginLibrary(path, digest)
