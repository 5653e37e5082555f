"""Decides which command lines are remembered, and on what their answers rest, for :mod:`enginecache.cli.fast_path`.

A hit alone is remembered, and only while everything that decided it can be watched from outside: files of file systems
whose ctime tells of every change, old enough that a change moves it; the folders that modules are found in; the GPUs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from enginecache.cache import EngineCache
from enginecache.files.fingerprint import Fingerprint
from enginecache.host.evidence import command_of, folder_of, seal_of, watch
from enginecache.host.surroundings import are_telling, surroundings
from enginecache.pipeline.publish import Resolved
from enginecache.pipeline.request import Ask, Request
from enginecache.pipeline.results import Entry
from enginecache.storage.registry.rows import AnswerRecord


def remember(
    cache: EngineCache, model: Path, ask: Ask, entry: Entry, said: bytes, printed: bytes, arguments: Sequence[str]
) -> bool:
    """Let the same command line be answered the same way, as long as nothing that decided the answer changes.

    Everything is looked at before the request is resolved once more, and after that: what changed meanwhile, or may
    have, is not remembered.

    Args:
        cache: Where the entry is.
        model: The model, as it was named.
        ask: What was asked of its engine.
        entry: The answer.
        said: What standard error got, with :data:`~enginecache.host.evidence.ELAPSED` for the seconds.
        printed: What standard output got, likewise.
        arguments: The command line, without the program.

    Returns:
        Whether it may be answered so; best effort, as a busy registry forgets it.

    Raises:
        EngineCacheError: The request has another answer by now.
    """
    is_plain = entry.is_plain_hit and not ask.get("verify_model")
    if not is_plain or folder_of(arguments, os.environ) != str(cache.root.path):
        return False
    since_ns = time.time_ns()
    things = [*surroundings(cache.root.path), *(("variable", name) for name in cache.config.pass_environment)]
    if not are_telling(things, since_ns=since_ns):
        return False  # nor will they be below; to know it here saves the rest
    before = watch(things)
    resolved = cache.resolve(Request.of(model, ask))
    files = _files(resolved, entry, model)
    paths = [path for path, _ in files]
    watched = watch([*things, *(("stat", path) for path in paths)])
    is_same = (
        resolved.key.digest == entry.requested_key
        and cache.is_intact(entry.record)
        and watched.startswith(before + b"\0")
        and all(_is_of(path, fingerprint) for path, fingerprint in files)
    )
    if not is_same or not are_telling(things, paths, since_ns=since_ns):
        return False
    command = command_of(arguments, os.environ)
    seal = seal_of(command, entry.key, watched, said, printed)
    cache.remember_answer(
        AnswerRecord(command, entry.key, entry.record.build_id, watched, said, printed, seal, entry.siblings),
    )
    return True


def _files(resolved: Resolved, entry: Entry, model: Path) -> list[tuple[str, Fingerprint | None]]:
    """The model's files, the plugins and the blob, each with the fingerprint that its digest was taken of, if known."""
    external = [(str(resolved.source.path_of(file.location)), file.fingerprint) for file in resolved.identity.files[1:]]
    plugins = [(str(plugin.path), None) for plugin in entry.plugins]
    return [(str(model), resolved.identity.files[0].fingerprint), *external, *plugins, (str(entry.path), None)]


def _is_of(path: str, fingerprint: Fingerprint | None) -> bool:
    return fingerprint is None or Fingerprint.of_path(path) == fingerprint
