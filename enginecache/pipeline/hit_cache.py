"""Cache of hits in a process: a repeated request is answered after a few calls of ``stat``, without making a key.

A request is named before it is resolved, by a copy of its values that nobody else can change, and exactly those values
are resolved. So a hit cannot be stored under the name of another request, whatever other threads change meanwhile.

Everything that an answer depends on is looked at again: the model's files and the plan each time; installed packages,
the search path of modules, settings and GPUs once a second; the registry's row once a second, and whenever the
registry's file has changed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from enginecache import environment
from enginecache.errors import RegistryError
from enginecache.files import fingerprint as files
from enginecache.files.fingerprint import Fingerprint
from enginecache.files.mounts import status_of
from enginecache.host.evidence import watch
from enginecache.host.surroundings import Things, are_telling, surroundings
from enginecache.pipeline.request import Ask, GetAsk, Model, Request
from enginecache.pipeline.resolve import Resolved
from enginecache.pipeline.results import Entry
from enginecache.storage.storage import Storage

LOOK_EVERY_S = 1.0
"""So long a new TensorRT, GPU or setting may go unnoticed in a running process. A use is noted as often: a
``keep_recent`` of less than a second does not protect a path that was just handed out.
"""

TICK_NS = 100_000_000
"""Longer than a tick of any clock that gives times with a fraction of a second.

Linux takes the times of files from the timer's last tick, which is 10 ms ago at most (CONFIG_HZ=100); ext3, and ext4
with small inodes, keep whole seconds. Source: Linux, ``current_time`` in fs/inode.c.
"""

MAX_HITS = 4096
State = tuple[int, int, int, int]
"""Inode, size, mtime and ctime of the registry's file."""

_WITHOUT_EFFECT = frozenset({"offline", "timeout_s", "timing_cache", "progress", "waiting", "made"})
"""Keywords that a hit does not depend on."""

_PLAIN = (str, int, float, bool, type(None))


class Name(NamedTuple):
    """A request, as a value that equals another only if both ask the same.

    Attributes:
        path: The model's, absolute.
        asked: What was asked of its engine, frozen.
        variables: Environment variables that decide which engine that is.
    """

    path: str
    asked: tuple[tuple[str, Any], ...]
    variables: tuple[tuple[str, str], ...]

    def ask(self) -> dict[str, Any]:
        """Return the request by keyword, in new containers."""
        return {name: _thawed(value) for name, value in self.asked}


def request_of(name: Name | None, model: Model, ask: GetAsk) -> Request:
    """Return the request, read from the values in its name if it has one."""
    return Request.of(model, ask) if name is None else Request.of(name.path, cast("Ask", name.ask()))


class Situation(NamedTuple):
    """Everything that decides where modules, files and settings are looked for.

    Attributes:
        path: Where modules are looked for.
        folder: The current folder, which a relative entry of that is relative to.
        settings: Environment variables that say where the settings are, and what they are.
    """

    path: tuple[str, ...]
    folder: str
    settings: tuple[tuple[str, str], ...]

    @classmethod
    def now(cls) -> Situation:
        """Take the snapshot of this process at one moment.

        Raises:
            OSError: The current folder was deleted.
        """
        settings = [(name, value) for name, value in environment.snapshot().items() if _is_setting(name)]
        return cls(tuple(sys.path), os.getcwd(), tuple(sorted(settings)))  # noqa: PTH109


def _is_setting(name: str) -> bool:
    return name.startswith("ENGINECACHE_") or name in {"HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"}


class _Hit:
    """An entry with the state it was validated against.

    ``looked_at_s`` and ``checked`` are updated without a lock; losing an update only causes another check.
    """

    __slots__ = ("checked", "entry", "files", "looked_at_s", "seen", "situation", "things")

    def __init__(
        self,
        entry: Entry,
        files: tuple[tuple[str, Fingerprint], ...],
        situation: Situation,
        things: Things,
        seen: bytes,
    ) -> None:
        self.entry = entry
        self.files = files
        self.situation = situation
        self.things = things
        self.seen = seen
        self.looked_at_s = -LOOK_EVERY_S
        self.checked: State | None = None


class RecentHits:
    """A process's recent hits. Safe across threads, and carried across a fork.

    Args:
        storage: Where the rows must still be, and uses are noted.
        also: Names of further variables that are part of a key.
    """

    def __init__(self, storage: Storage, also: frozenset[str] = frozenset()) -> None:
        self._also = also
        self._root = storage.root.path
        self._path = str(storage.root.registry_path)
        self._reader = storage.reader
        self._uses = storage.last_used
        self._hits: dict[Name, _Hit] = {}

    def name(self, model: object, ask: Mapping[str, Any]) -> Name | None:
        """Return the name of a request; None if it cannot be remembered."""
        if ask.get("rebuild") or ask.get("verify_model") or not isinstance(model, str | os.PathLike):
            return None
        path = os.fspath(model)
        if not isinstance(path, str):
            return None
        try:
            if not os.path.isabs(path):  # noqa: PTH117  # this is counted in microseconds
                path = os.path.join(os.getcwd(), path)  # noqa: PTH109, PTH118
            asked = tuple((name, _frozen(ask[name])) for name in ask if name not in _WITHOUT_EFFECT)
        except (TypeError, FileNotFoundError):  # the long way says which, and what that means
            return None
        return Name(path, asked, environment.deciding(self._also))

    def situation(self, name: Name | None) -> Situation | None:
        """Look at what :meth:`keep` compares; call it before the request is resolved.

        None where it cannot be seen, or where there is no name to keep a hit under.
        """
        if name is not None:
            with contextlib.suppress(OSError):
                return Situation.now()
        return None

    def recall(self, name: Name | None) -> Entry | None:
        """Return the entry that answered the same request before, if nothing that decided it has changed."""
        hit = None if name is None else self._hits.get(name)
        if name is None or hit is None:
            return None
        with contextlib.suppress(
            OSError, ValueError
        ):  # a file is missing: the long way says which, and what that means
            if self._stands(hit):
                return hit.entry
        self._hits.pop(name, None)
        return None

    def keep(self, name: Name | None, before: Situation | None, resolved: Resolved, entry: Entry) -> Entry:
        """Remember a hit, if every change of what it rests on will be seen; return it.

        Args:
            name: The request's; None for a hit that is not remembered.
            before: The situation before it was resolved. If it has changed since, the answer may be of either.
            resolved: The request, with everything looked up.
            entry: The answer.
        """
        if name is not None and before is not None and entry.is_plain_hit and not entry.plugins:
            hit = self._with_evidence(name, before, resolved, entry)
            if hit is not None:
                if len(self._hits) >= MAX_HITS:
                    self._hits.clear()
                self._hits[name] = hit
        return entry

    def _with_evidence(self, name: Name, before: Situation, resolved: Resolved, entry: Entry) -> _Hit | None:
        """Return a hit with what it rests on; None if that has changed meanwhile, or a change would not be seen."""
        if not resolved.identity.is_settled or self.situation(name) != before:
            return None
        now = environment.deciding(self._also)
        if not name.variables == now == environment.deciding_among(resolved.environment, self._also):
            return None
        since_ns = time.time_ns() - int(entry.elapsed_seconds * 1e9)
        plan = str(entry.path)
        try:
            paths = [*(path for path, _ in entry.files), plan]
            fingerprints = [*(fingerprint for _, fingerprint in entry.files), Fingerprint.of_path(plan)]
            things = surroundings(self._root)
            seen = watch(things)
        except (OSError, ValueError):
            return None
        # The plan may have been exchanged, with its file system, since it was checked.
        is_checked = self._reader.recall("blob", fingerprints[-1]) == {"digest": entry.digest}
        if not is_checked or not are_telling(things, paths, since_ns=since_ns):
            return None
        return _Hit(entry, tuple(zip(paths, fingerprints, strict=True)), before, things, seen)

    def watch_for(self, key: str) -> Callable[[], bool]:
        """Return a function that says whether the key has an entry; it asks the registry only after a change."""
        seen: State | None = None

        def is_there() -> bool:
            nonlocal seen
            with contextlib.suppress(OSError, RegistryError):  # then go on waiting
                now = self._state()
                if now != seen:
                    seen = now if _are_settled(now) else None
                    return self._reader.has_entry(key)
            return False

        return is_there

    def _state(self) -> State:
        """Return what ``stat`` says of the registry's file: any change of a row changes it."""
        found = os.stat(self._path)
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _stands(self, hit: _Hit) -> bool:
        now_s = time.monotonic()
        if now_s - hit.looked_at_s >= LOOK_EVERY_S:
            self._uses.touch(hit.entry.key)  # before the row is read, as on the long way
            if Situation.now() != hit.situation or watch(hit.things) != hit.seen:
                return False
            hit.looked_at_s = now_s
            hit.checked = None
        for path, fingerprint in hit.files:
            if status_of(path)[:6] != fingerprint:
                return False
        return self._has_row(hit)

    def _has_row(self, hit: _Hit) -> bool:
        """Return whether the entry's row is there; ask again if the registry may have changed since the last time."""
        state = self._state()
        if state == hit.checked:
            return True
        hit.checked = None
        record = hit.entry.record
        is_settled = _are_settled(state)
        if not self._reader.is_current(record):
            return False
        siblings = hit.entry.siblings
        if siblings is not None and self._reader.siblings(record.model_digest) != siblings:
            return False  # one of exactly the asked key, or of a narrower reach, may be among them now
        if is_settled:
            hit.checked = state
        return True


def _are_settled(state: State) -> bool:
    """Return whether a further change would show in the times.

    The registry changes with every build and every first sight of a model, so 2 s of asking would be a long time.
    """
    now_ns = time.time_ns()
    # Every change moves ctime to the clock's time; an mtime that is ahead is a date that somebody gave it.
    *_, mtime_ns, ctime_ns = state
    changed_ns = ctime_ns if mtime_ns > now_ns else max(mtime_ns, ctime_ns)
    is_coarse = changed_ns % 1_000_000_000 == 0
    settle_ns = files.SETTLE_NS if is_coarse else min(TICK_NS, files.SETTLE_NS)
    # Ahead of a clock that was set back: a change now has another time.
    return changed_ns + settle_ns <= now_ns or (not is_coarse and changed_ns >= now_ns + settle_ns)


def _frozen(value: Any) -> Any:
    """Return a plain value with its types: 1, 1.0 and True are equal, and not the same request.

    Raises:
        TypeError: It is not made of plain values, and may change, or give its items only once.
    """
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if kind is tuple or kind is list:
        return kind, tuple(map(_frozen, tuple(value)))
    if kind is dict:
        # A copy, which is made at one moment: another thread may put something into it meanwhile.
        return kind, tuple((_frozen(key), _frozen(item)) for key, item in value.copy().items())
    if isinstance(value, os.PathLike):
        return kind, os.fspath(value)
    raise TypeError(kind)


def _thawed(frozen: tuple[type, Any]) -> Any:
    """Invert :func:`_frozen`; a path becomes a string."""
    kind, value = frozen
    if kind is tuple or kind is list:
        return kind(map(_thawed, value))
    if kind is dict:
        return {_thawed(key): _thawed(item) for key, item in value}
    return value
