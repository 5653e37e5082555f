"""Remember failed builds that would fail again, so that not every process tries them.

Only the rows of attempts are written; whether a failure is in force follows from them and the time.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from enginecache.errors import BuilderKilledError, BuildError
from enginecache.files.units import DAY_S, WRONG_CLOCK_S, format_duration, utc_now
from enginecache.key.key import EngineKey
from enginecache.key.matching import Reason
from enginecache.storage.registry.rows import BuildRecord
from enginecache.storage.storage import Storage

LONGEST_S = DAY_S
"""A new driver, more memory or another GPU may help, and is not in the key: so it is tried once a day."""


@dataclass(frozen=True)
class KnownFailure:
    """A failed build that is not tried again yet.

    Attributes:
        build: The attempt, the latest of those in a row.
        count: How many in a row.
        age_s: Seconds since it failed.
        remaining_s: Seconds until it is tried again.
    """

    build: BuildRecord
    count: int
    age_s: float
    remaining_s: float

    @property
    def text(self) -> str:
        """Say when it failed, and for how long it is not tried again."""
        what = "the last attempt failed" if self.count == 1 else f"the last {self.count} attempts failed, the latest"
        age, remaining = format_duration(self.age_s), format_duration(self.remaining_s)
        return f"{what} {age} ago, and the build is not repeated for another {remaining}"

    def as_reason(self) -> Reason:
        """Return the failure as a reason of a miss."""
        return Reason("failed", f"{self.text} (--rebuild overrides this): {self.build.reason}")

    def error(self, log: Path) -> BuildError:
        """Return the error that every process reports meanwhile.

        Args:
            log: Where the attempt's log was written.
        """
        has_log = log.is_file()
        deleted = "" if has_log else " The log of that attempt has been deleted."
        fix = f"Fix the model or the options, or try again now with --rebuild.{deleted}"
        return BuildError(f"{self.build.reason} (remembered: {self.text})", fix, str(log) if has_log else "")


class FailureMemory:
    """Failed builds that are not tried again yet.

    Args:
        storage: Where the attempts are recorded, and their logs.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def find(self, key: EngineKey, ttl_s: float) -> KnownFailure | None:
        """Return the failure that forbids a new attempt now, or None.

        Args:
            key: What is to be built.
            ttl_s: How long a first failure counts, in seconds.
        """
        return failure_in_force(self._storage.registry.attempts_since_success(key.digest), utc_now(), ttl_s)

    def require_none(self, key: EngineKey, ttl_s: float, outdated: Collection[str] = ()) -> None:
        """Refuse to build what failed a short while ago.

        Args:
            key: What is to be built.
            ttl_s: As for :meth:`find`.
            outdated: Attempts that do not count.

        Raises:
            BuildError: If such a failure is in force.
        """
        failure = self.find(key, ttl_s)
        if failure is not None and failure.build.id not in outdated:
            raise failure.error(self._storage.root.log_path(failure.build.id))


def is_lasting(error: BaseException) -> bool:
    """Return whether the same build would fail again: TensorRT refused it, or crashed on it by itself.

    Not if the builder was killed, ran out of memory, ended with a status or could not be started, nor if the disk, the
    registry, the user or the installation is to blame. Bad input is found again as fast as it is remembered.
    """
    is_refusal = isinstance(error, BuildError) and not isinstance(error, BuilderKilledError)
    return is_refusal and not isinstance(error.__cause__, OSError)


def failure_in_force(attempts: Sequence[BuildRecord], now: dt.datetime, ttl_s: float) -> KnownFailure | None:
    """Return the failure that forbids a new attempt now, or None. Pure.

    The first counts for ``ttl_s``, and each that follows in a row twice as long as the one before, up to
    :data:`LONGEST_S`. A row ends at a success, and at an attempt that runs or was ended from outside: somebody wants it
    tried.

    Args:
        attempts: Those at one key since its last success, newest first.
        now: The time.
        ttl_s: How long the first counts, in seconds; 0 for no time.
    """
    latest_s = now.timestamp() + WRONG_CLOCK_S
    row = list(takewhile(lambda build: build.is_lasting, (a for a in attempts if _failed_at_s(a) <= latest_s)))
    if not row or ttl_s <= 0:
        return None
    age_s = max(now.timestamp() - _failed_at_s(row[0]), 0.0)
    remaining_s = _duration_s(len(row), ttl_s) - age_s
    return KnownFailure(row[0], len(row), age_s, remaining_s) if remaining_s > 0 else None


def _failed_at_s(build: BuildRecord) -> float:
    return build.started_at.timestamp() + (build.build_seconds or 0.0)


def _duration_s(count: int, ttl_s: float) -> float:
    # Not 2.0 ** count, which overflows after a thousand.
    return min(ttl_s * 2.0 ** min(count - 1, 32), max(LONGEST_S, ttl_s))
