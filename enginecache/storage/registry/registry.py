"""The registry: rows of stored engines, of what happened, and of what was found in files."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence

import sqlalchemy as sa

from enginecache.files.units import utc_now
from enginecache.storage.registry.entries import Entries
from enginecache.storage.registry.rows import BuildRecord, InflationStep, LoadRecord, MissRecord
from enginecache.storage.registry.tables import builds, entries, inflation, loads, misses, models, set_asides, upsert

_GONE = {"state": "abandoned", "reason": "its process ended before the build did"}


class Registry(Entries):
    """The rows of one cache. Here: attempts to build, loads, misses and evictions.

    Transactional; safe across threads, forks and processes. Every method may raise ``RegistryError``.
    """

    def start_build(self, build: BuildRecord) -> None:
        """Record an attempt; others of its key that still say ``running`` are abandoned: the caller has its lock."""
        row = {column.name: getattr(build, column.name) for column in builds.c}
        with self._writing() as connection:
            still = sa.and_(builds.c.key == build.key, builds.c.state == "running")
            connection.execute(sa.update(builds).where(still).values(_GONE))
            connection.execute(sa.insert(builds).values(row))

    def fail_build(self, build_id: str, seconds: float, reason: str, *, is_lasting: bool = False) -> None:
        """Record that the attempt failed, and why; an attempt whose entry is committed has succeeded."""
        failed = {"state": "failed", "build_seconds": seconds, "reason": reason, "is_lasting": is_lasting}
        with self._writing() as connection:
            running = sa.and_(builds.c.id == build_id, builds.c.state == "running")
            connection.execute(sa.update(builds).where(running).values(failed))

    def attempts_since_success(self, key: str) -> list[BuildRecord]:
        """Return the attempts at the key since the last that succeeded, newest first."""
        # By the rows' numbers, which are in the order of writing: a clock may have been wrong meanwhile.
        later = builds.alias("later")
        is_later = sa.literal_column("later.rowid") >= sa.literal_column("builds.rowid")
        success = sa.exists().where(later.c.key == key, later.c.state == "succeeded", is_later)
        chosen = sa.select(builds).where(builds.c.key == key, builds.c.state != "succeeded", ~success)
        with self._reading() as connection:
            rows = connection.execute(chosen.order_by(sa.literal_column("builds.rowid").desc()))
            return [BuildRecord(**row._mapping) for row in rows]  # noqa: SLF001

    def builds(self, key: str | None = None, limit: int = 100) -> list[BuildRecord]:
        """Return the attempts, newest first."""
        chosen = sa.select(builds).order_by(builds.c.started_at.desc(), builds.c.id).limit(limit)
        if key is not None:
            chosen = chosen.where(builds.c.key == key)
        with self._reading() as connection:
            return [BuildRecord(**row._mapping) for row in connection.execute(chosen)]  # noqa: SLF001  the public way to names

    def unfinished_builds(self) -> list[BuildRecord]:
        """Return the attempts that say ``running``, oldest first."""
        chosen = sa.select(builds).where(builds.c.state == "running").order_by(builds.c.started_at, builds.c.id)
        with self._reading() as connection:
            return [BuildRecord(**row._mapping) for row in connection.execute(chosen)]  # noqa: SLF001

    def abandon_build(self, build_id: str) -> None:
        """Record that the attempt's process died first. Nothing if it no longer runs. The caller has the key's lock."""
        running = sa.and_(builds.c.id == build_id, builds.c.state == "running")
        with self._writing() as connection:
            connection.execute(sa.update(builds).where(running).values(_GONE))

    def lasting_failures(self) -> int:
        """Return how many keys there are whose latest attempt failed, and would fail again."""
        later = builds.alias("later")
        is_later = sa.literal_column("later.rowid") > sa.literal_column("builds.rowid")
        is_latest = ~sa.exists().where(later.c.key == builds.c.key, is_later)
        chosen = sa.select(sa.func.count(builds.c.key.distinct())).where(
            builds.c.state == "failed", builds.c.is_lasting, is_latest
        )
        with self._reading() as connection:
            return connection.scalar(chosen) or 0

    def has_build(self, build_id: str) -> bool:
        """Return whether there is a row for the attempt."""
        with self._reading() as connection:
            return connection.execute(sa.select(builds.c.id).where(builds.c.id == build_id)).first() is not None

    def record_load(self, load: LoadRecord) -> None:
        """Keep the outcome of loading a blob, in place of the last one of the same four. Waits for no writer."""
        row = {column.name: getattr(load, column.name) for column in loads.c}
        with self._writing(waits=False) as connection:
            connection.execute(upsert(loads, row))

    def find_load(self, digest: str, device: str, toolchain: str, driver: str) -> LoadRecord | None:
        """Return the outcome of the last load of the blob by this toolchain on this class of GPU and driver."""
        asked = {"digest": digest, "device": device, "toolchain": toolchain, "driver": driver}
        chosen = sa.select(loads).where(*(loads.c[name] == value for name, value in asked.items()))
        with self._reading() as connection:
            row = connection.execute(chosen).one_or_none()
        return None if row is None else LoadRecord(**row._mapping)  # noqa: SLF001  the public way to names

    def record_miss(self, key: str, reason: str, nearest_key: str | None, differing: Sequence[str]) -> None:
        """Count a miss of this key."""
        what = {"reason": reason, "nearest_key": nearest_key, "differing": json.dumps(differing), "last_at": utc_now()}
        counted = {**what, "count": misses.c.count + 1}
        with self._writing() as connection:
            connection.execute(upsert(misses, {"key": key, "count": 1, **what}, counted))

    def misses(self, limit: int = 100) -> list[MissRecord]:
        """Return the misses, latest first."""
        named = sa.select(entries.c.key, models.c.name).join(models, models.c.digest == entries.c.model_digest)
        asked, nearest = named.subquery("asked"), named.subquery("nearest")
        lost = set_asides.c.model_name
        chosen = (
            sa.select(misses, sa.func.coalesce(asked.c.name, lost), nearest.c.name)
            .outerjoin_from(misses, asked, asked.c.key == misses.c.key)
            .outerjoin(set_asides, set_asides.c.key == misses.c.key)
            .outerjoin(nearest, nearest.c.key == misses.c.nearest_key)
            .order_by(misses.c.last_at.desc(), misses.c.key)
            .limit(limit)
        )
        with self._reading() as connection:
            return [
                MissRecord(key, reason, nearest_key, tuple(json.loads(differing)), count, last_at, *names)
                for key, reason, nearest_key, differing, count, last_at, *names in connection.execute(chosen)
            ]

    def inflation(self) -> list[InflationStep]:
        """Return the steps of eviction's inflation that are kept, oldest first."""
        chosen = sa.select(inflation.c.at, inflation.c.value).order_by(inflation.c.at)
        with self._reading() as connection:
            return [InflationStep(at, value) for at, value in connection.execute(chosen)]

    def record_inflation(self, step: InflationStep, oldest_use: dt.datetime) -> None:
        """Keep a step, and delete those that ended before ``oldest_use``: no entry was used while they were in force.

        Inflation never falls: a lower value than the latest is raised to that. Steps later than this one come from a
        wrong clock, and move to its time.
        """
        in_force = sa.select(sa.func.max(inflation.c.at)).where(inflation.c.at <= min(oldest_use, step.at))
        with self._writing() as connection:
            highest = connection.scalar(sa.select(sa.func.max(inflation.c.value)))
            value = step.value if highest is None else max(highest, step.value)
            connection.execute(sa.delete(inflation).where(inflation.c.at >= step.at))
            connection.execute(sa.delete(inflation).where(inflation.c.at < in_force.scalar_subquery()))
            connection.execute(sa.insert(inflation).values(at=step.at, value=value))
