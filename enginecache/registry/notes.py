"""What was found out once, in SQL."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import blake3
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from enginecache.errors import RegistryError
from enginecache.fingerprint import Fingerprint
from enginecache.key import canonical_json
from enginecache.registry.records import AnswerRecord, LoadRecord, MemoKind, utc_now
from enginecache.registry.session import Session
from enginecache.registry.tables import answers, entries, file_memo, loads

_MAX_INTEGER = 2**63 - 1
"""SQLite's largest; a time in nanoseconds passes it in the year 2262, and a file can be given such a time."""
_RECALL = """
    SELECT found FROM file_memo
    WHERE host = :host AND kind = :kind AND device = :device AND inode = :inode
      AND size_bytes = :size_bytes AND mtime_ns = :mtime_ns AND ctime_ns = :ctime_ns
"""
MAX_ANSWERS = 1000
"""Of command lines; the newest are kept."""


class SqlNotes(Session):
    """Memos of files, answers to command lines, and what came of loading."""

    def recall(self, kind: MemoKind, fingerprint: Fingerprint) -> dict[str, Any] | None:
        """What this host found in a file of this fingerprint, or None."""
        if max(fingerprint.mtime_ns, fingerprint.ctime_ns) > _MAX_INTEGER:
            return None
        row = self._memo_row(kind, fingerprint)
        with self._looking() as connection:
            found = connection.execute(_RECALL, row).fetchone()
        return None if found is None else _unsealed(found[0], row)

    def remember(self, kind: MemoKind, fingerprint: Fingerprint, found: dict[str, Any]) -> None:
        """Keep what was found in a file; a registry that is busy or read-only just forgets."""
        if max(fingerprint.mtime_ns, fingerprint.ctime_ns) > _MAX_INTEGER:
            return
        row = {
            **self._memo_row(kind, fingerprint),
            "found": json.dumps({**found, _SEAL: _seal(found, self._memo_row(kind, fingerprint))}),
        }
        place = ["host", "kind", "device", "inode"]
        try:
            with self._hasty.writing() as connection:
                connection.execute(insert(file_memo).values(row).on_conflict_do_update(index_elements=place, set_=row))
        except RegistryError:
            return

    def _memo_row(self, kind: MemoKind, fingerprint: Fingerprint) -> dict[str, Any]:
        # Device and inode are unsigned 64-bit numbers; SQLite's integers are signed.
        return {
            "host": self._host,
            "kind": kind,
            "device": str(fingerprint.device),
            "inode": str(fingerprint.inode),
            "size_bytes": fingerprint.size_bytes,
            "mtime_ns": fingerprint.mtime_ns,
            "ctime_ns": fingerprint.ctime_ns,
        }

    def remember_answer(self, answer: AnswerRecord) -> None:
        """Keep an answer, in place of the one to the same command line; a registry that is busy just forgets."""
        row = {**vars(answer), "at": utc_now()}
        gone = answers.c.key.not_in(sa.select(entries.c.key))
        newest = sa.select(answers.c.command).order_by(answers.c.at.desc()).limit(MAX_ANSWERS)
        with contextlib.suppress(RegistryError), self._hasty.writing() as connection:
            connection.execute(insert(answers).values(row).on_conflict_do_update(index_elements=["command"], set_=row))
            connection.execute(sa.delete(answers).where(sa.or_(gone, answers.c.command.not_in(newest))))

    def record_load(self, load: LoadRecord) -> None:
        """Keep what came of loading a blob, in place of what is known of the same four. Does not wait for writers."""
        row = {column.name: getattr(load, column.name) for column in loads.c}
        place = ["digest", "device", "toolchain", "driver"]
        with self._hasty.writing() as connection:
            connection.execute(insert(loads).values(row).on_conflict_do_update(index_elements=place, set_=row))

    def find_load(self, digest: str, device: str, toolchain: str, driver: str) -> LoadRecord | None:
        """What came of the last loading of the blob by this toolchain, on this class of GPU, under this driver."""
        asked = {"digest": digest, "device": device, "toolchain": toolchain, "driver": driver}
        chosen = sa.select(loads).where(*(loads.c[name] == value for name, value in asked.items()))
        with self._reading() as connection:
            row = connection.execute(chosen).one_or_none()
        return None if row is None else LoadRecord(**row._mapping)  # noqa: SLF001  the public way to names

    def loads(self, digest: str) -> list[LoadRecord]:
        """What is known of loading a blob, latest first."""
        chosen = sa.select(loads).where(loads.c.digest == digest).order_by(loads.c.at.desc(), loads.c.device)
        with self._reading() as connection:
            return [LoadRecord(**row._mapping) for row in connection.execute(chosen)]  # noqa: SLF001


_SEAL = "blake3"


def _seal(found: dict[str, Any], place: dict[str, Any]) -> str:
    """Digest of a memo with what it is about: a flipped bit in a model's digest would make another key of it."""
    # On one thread: starting others costs a hit a millisecond.
    return blake3.blake3(canonical_json({"found": found, "place": place}).encode("ascii")).hexdigest()


def _unsealed(text: str | None, place: dict[str, Any]) -> dict[str, Any] | None:
    """What a memo's text says; None where it is not what was written."""
    try:
        found = json.loads(text or "null")
        seal = found.pop(_SEAL)
        return dict(found) if seal == _seal(found, place) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
