"""Remember command lines for :mod:`enginecache.cli.fast_path`, with everything that their answers depend on.

Only a hit is remembered, and only if a change to anything that decided it would be detected: files whose ctime moves
with every change, and that are older than its resolution; the folders that modules are found in; the GPUs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from enginecache.cache import EngineCache
from enginecache.files.fingerprint import Fingerprint
from enginecache.host.evidence import command_of, folder_of, seal_of, watch
from enginecache.host.surroundings import Things, are_telling, surroundings
from enginecache.pipeline.results import Entry
from enginecache.storage.registry.rows import AnswerRecord
from enginecache.storage.storage import Storage


@dataclass(frozen=True)
class Before:
    """The environment of an answer, as it was before the request was resolved.

    Attributes:
        since_ns: When it was looked at, in nanoseconds since the epoch.
        things: What was looked at.
        watched: How it looked.
    """

    since_ns: int
    things: Things
    watched: bytes


def look(cache: EngineCache, arguments: Sequence[str]) -> Before | None:
    """Look at everything that the answer to a command line will depend on; None if it cannot be remembered.

    Args:
        cache: Where the engine is looked for.
        arguments: The command line, without the program.

    Raises:
        OSError: The current folder was deleted, or a folder cannot be read.
    """
    if folder_of(arguments, os.environ) != str(cache.root.path):
        return None
    since_ns = time.time_ns()
    things = [*surroundings(cache.root.path), *(("variable", name) for name in cache.config.pass_environment)]
    return Before(since_ns, things, watch(things)) if are_telling(things, since_ns=since_ns) else None


def remember(
    cache: EngineCache,
    before: Before,
    model: Path,
    entry: Entry,
    said: bytes,
    printed: bytes,
    arguments: Sequence[str],
) -> bool:
    """Let the same command line be answered the same way, as long as nothing that decided the answer changes.

    Everything that was looked at before the request was resolved is looked at again: an answer whose evidence changed
    meanwhile, or may have, is not remembered.

    Args:
        cache: Where the entry is.
        before: What :func:`look` saw.
        model: The model, as it was named.
        entry: The answer.
        said: What standard error got, with :data:`~enginecache.host.evidence.ELAPSED` for the seconds.
        printed: What standard output got, likewise.
        arguments: The command line, without the program.

    Returns:
        Whether it may be answered so; best effort, as a busy registry forgets it.
    """
    if not entry.is_plain_hit:
        return False
    files = _files(entry, model)
    paths = [path for path, _ in files]
    watched = watch([*before.things, *(("stat", path) for path in paths)])
    is_same = (
        cache.is_intact(entry.record)
        and watched.startswith(before.watched + b"\0")
        and all(_is_of(path, fingerprint) for path, fingerprint in files)
    )
    if not is_same or not are_telling(before.things, paths, since_ns=before.since_ns):
        return False
    command = command_of(arguments, os.environ)
    seal = seal_of(command, entry.key, watched, said, printed)
    Storage(cache.root).reader.remember_answer(
        AnswerRecord(command, entry.key, entry.record.build_id, watched, said, printed, seal, entry.siblings),
        entry.record.check_json,
    )
    return True


def _files(entry: Entry, model: Path) -> list[tuple[str, Fingerprint | None]]:
    """Return the model's files, plugins and blob, each with the fingerprint of its digest, if known."""
    (_, fingerprint), *external = entry.files
    plugins = [(str(plugin.path), None) for plugin in entry.plugins]
    return [(str(model), fingerprint), *external, *plugins, (str(entry.path), None)]


def _is_of(path: str, fingerprint: Fingerprint | None) -> bool:
    return fingerprint is None or Fingerprint.of_path(path) == fingerprint
