"""Works on a cache until its file system goes away, and says what is done at each step. A child is forked for each run.

Reads one JSON object a line: the cache's folder, the model, from which number on, and whether files are synchronized.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import alembic.command  # noqa: F401  # loaded here once, and not by each child
from fakes import FakeBuilder, fake_cache

from enginecache.errors import EngineCacheError

PLAN_BYTES = 40_000


def serve() -> None:
    """Until the input ends."""
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            try:
                work(**json.loads(line))
            except (EngineCacheError, OSError) as error:
                say("error", what=str(error))  # the file system was removed; the fake builder's errors are the system's
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        say("end")


def say(what: str, **values: Any) -> None:
    """One line, in one write: it is the acknowledgement."""
    os.write(1, (json.dumps({"said": what, **values}) + "\n").encode())


def work(folder: str, model: str, first: int, *, is_synchronized: bool) -> None:
    """Publish, pin, rebuild and remove, forever."""
    if not is_synchronized:
        os.fsync = lambda _: None
    cache = fake_cache(Path(folder), FakeBuilder(size_bytes=PLAN_BYTES))
    larger = fake_cache(Path(folder), FakeBuilder(size_bytes=PLAN_BYTES + 1))
    cache.make()
    say("opened")
    removable = []
    for number in range(first, first + 10_000):
        dims = {"batch": (1, 1, number)}
        entry = cache.get(model, dims=dims)
        say("published", number=number, digest=entry.digest)
        if number % 4 == 1:
            cache.pin(entry.record)
            say("pinned", number=number)
        elif number % 4 == 2:
            say("rebuilding", number=number)
            say("published", number=number, digest=larger.get(model, dims=dims, rebuild=True).digest)
        elif number % 4 == 3:
            removable.append((number, entry.record))
        if len(removable) == 2:
            oldest, record = removable.pop(0)
            say("removing", number=oldest)
            cache.remove(record)
            say("removed", number=oldest)


if __name__ == "__main__":
    serve()
