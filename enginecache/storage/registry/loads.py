"""What was found out once, in SQL."""

from __future__ import annotations

import contextlib

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from enginecache.errors import RegistryError
from enginecache.files.units import utc_now
from enginecache.storage.registry.connection import Session
from enginecache.storage.registry.rows import AnswerRecord, LoadRecord
from enginecache.storage.registry.tables import answers, entries, loads

MAX_ANSWERS = 1000
"""Of command lines; the newest are kept."""

MAX_OF_OTHER_BOOTS = 100
"""As of memos."""


class SqlNotes(Session):
    """Answers to command lines, and what came of loading."""

    def remember_answer(self, answer: AnswerRecord) -> None:
        """Keep an answer, in place of the one to the same command line; a registry that is busy just forgets."""
        row = {**vars(answer), "boot": self._boot, "at": utc_now()}
        # A command's digest has the boot in it, so those of other boots are of no use. The row's number tells which is
        # newest, whatever the clock says; so a row is replaced, not updated.
        number = sa.literal_column("rowid", sa.Integer)
        newest = sa.select(number).select_from(answers).order_by(number.desc())
        is_kept = number.in_(newest.limit(MAX_ANSWERS))
        is_outdated = sa.and_(answers.c.boot != self._boot, number.not_in(newest.limit(MAX_OF_OTHER_BOOTS)))
        gone = answers.c.key.not_in(sa.select(entries.c.key))
        with contextlib.suppress(RegistryError), self._hasty.writing() as connection:
            connection.execute(insert(answers).prefix_with("OR REPLACE").values(row))
            connection.execute(sa.delete(answers).where(sa.or_(gone, is_outdated, sa.not_(is_kept))))

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
