"""Blobs: immutable bytes named by their digest. What every store does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from enginecache.files.fingerprint import Fingerprint


@dataclass(frozen=True)
class StagedBlob:
    """Bytes that are durable but have no name yet.

    Attributes:
        digest: BLAKE3 of the bytes, 64 hex characters.
        size_bytes: How many.
        path: The temporary file.
    """

    digest: str
    size_bytes: int
    path: Path


@dataclass(frozen=True)
class ReadBlob:
    """What reading a whole blob found.

    Attributes:
        digest: BLAKE3 of the bytes that are there.
        fingerprint: The file's, the same before and after reading.
        is_settled: Whether the fingerprint may stand for the bytes from now on.
    """

    digest: str
    fingerprint: Fingerprint
    is_settled: bool


class BlobStore(Protocol):
    """Immutable blobs. Safe across threads and processes; failures of the medium are ``StoreError``."""

    def stage(self, source: Path) -> StagedBlob:
        """Copy ``source`` to a durable temporary file while hashing it; the source is left alone."""
        ...

    def adopt(self, plan: Path) -> StagedBlob:
        """Make a plan durable and hash it where its builder left it, without a copy; its builder has ended."""
        ...

    def publish(self, staged: StagedBlob) -> Path:
        """Give staged bytes their name, durably and atomically. Idempotent for equal bytes."""
        ...

    def discard(self, staged: StagedBlob) -> None:
        """Drop staged bytes that will not be published."""
        ...

    def path(self, digest: str) -> Path:
        """Where the blob is, whether it is there or not."""
        ...

    def fingerprint(self, digest: str) -> Fingerprint | None:
        """What the file system says of the blob; None where there is none."""
        ...

    def read(self, digest: str) -> ReadBlob | None:
        """Hash the whole blob; None where there is none."""
        ...

    def quarantine(self, digest: str) -> Path | None:
        """Move the blob out of the way, keeping its bytes; where it is now, or None if it was gone."""
        ...

    def retire(self, digest: str) -> None:
        """Make a blob that lost its row young again, so that it stays for the grace time: its path may be in use."""
        ...

    def delete(self, digest: str) -> int:
        """Delete the blob; the bytes freed, 0 if it was gone."""
        ...

    def digests(self) -> Iterator[str]:
        """Digests of all blobs, in no order."""
        ...
