"""One damage at a time, anywhere in the cache folder: never wrong bytes, never a traceback, and a repair fixes it.

Damage that moves no fingerprint, the medium's own, comes last: a hit by fingerprint does not see it, and what reads the
bytes does.
"""

from __future__ import annotations

import collections
import random
import sqlite3
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import blake3
import pytest
from fakes import FakeBuilder, fake_place
from models import linear, save

from enginecache.cache import EngineCache
from enginecache.config import Config
from enginecache.errors import BuildError, NotCachedError, RegistryError, StoreError
from enginecache.files.fingerprint import SETTLE_NS, Fingerprint
from enginecache.maintenance.inspect import StoredEngines
from enginecache.pipeline.results import Entry

FORESEEN = (RegistryError, StoreError, NotCachedError)
"""Errors that a ``get`` may raise on damage. Not an ``InvalidInputError``: the request is as good as before."""

TARGETS = {"registry.sqlite": 50, "engine": 12, "json": 12, "artefact": 4, "log": 3, "use": 3, "lock": 4, "sql": 12}
"""Kinds of damage, with their share in percent. ``sql`` flips one character of one value, in a file that is whole."""


class SharingBuilder(FakeBuilder):
    """Like its base; both plans of ``shared.onnx`` have the same bytes."""

    def build(self, request, progress=None):
        if request.source.name == "bad.onnx":
            raise BuildError("TensorRT refused it", "")
        built = super().build(request, progress)
        if request.source.name == "shared.onnx":
            built.plan_path.write_bytes(b"vtrt shared" * 100)
        return built


@dataclass
class Folder:
    """A cache folder that can be damaged and put back as it was."""

    config: Config
    asks: list[tuple[Path, int]]
    saved: dict[Path, tuple[bytes, int]]
    seen: dict[Path, Fingerprint]
    expected: dict[tuple[Path, int], tuple[str, bytes]]

    def open(self) -> EngineCache:
        return EngineCache(self.config, builder=SharingBuilder(), place=fake_place)

    def restore(self) -> None:
        """Rewrite only what changed: other files keep the fingerprints that the memo knows."""
        for path in self.config.dir.rglob("*"):
            if path not in self.saved and path.is_file():
                path.unlink()
        for path, (content, mode) in self.saved.items():
            if self.seen.get(path) != _fingerprint(path):
                if path.exists():
                    path.unlink()
                path.write_bytes(content)
                path.chmod(mode)
                self.seen[path] = _fingerprint(path)

    def files(self, target: str) -> list[Path]:
        folders = {"artefact": ("timing-caches", "runtime-caches"), "log": ("logs",), "use": ("uses",)}
        folders |= {"lock": ("locks",), "sql": ()}
        if target in folders:
            return sorted(path for path in self.saved if path.parent.name in folders[target])
        return sorted(path for path in self.saved if path.name.endswith(target))


def _fingerprint(path: Path) -> Fingerprint | None:
    return Fingerprint.of_path(path) if path.exists() else None


def get(cache: EngineCache, ask: tuple[Path, int]) -> Entry:
    return cache.get(ask[0], dims={"batch": (1, 1, ask[1])})


def content_of(entry: Entry) -> tuple[str, bytes]:
    return entry.key, entry.path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Three models, five entries, a pin, a failure, a miss, a shared blob, artefacts; old enough to be in the memo."""
    path = tmp_path_factory.mktemp("corruption")
    names = ("first", "second", "shared")
    models = [save(linear(seed=seed), path / f"{name}.onnx") for seed, name in enumerate(names)]
    bad = save(linear(seed=9), path / "bad.onnx")
    asks = [(models[0], 2), (models[0], 4), (models[1], 2), (models[2], 2), (models[2], 4)]
    found = Folder(Config(dir=path / "cache", failure_ttl_s=3600.0), asks, {}, {}, {})
    cache = found.open()
    for ask in asks:
        cache.pin(get(cache, ask).record)
    for used in cache.entries()[1:]:
        cache.unpin(used.record)
    with pytest.raises(BuildError):
        get(cache, (bad, 2))
    with pytest.raises(NotCachedError):
        cache.get(models[0], dims={"batch": 7}, offline=True)
    for kind in ("timing-caches", "runtime-caches"):
        artefacts = found.config.dir / kind
        cache._publication._timing_caches._artefacts.replace("0" * 64, b"timings" * 50)
        for written in (found.config.dir / "timing-caches").iterdir():
            if kind == "runtime-caches":
                data = written.read_bytes().replace(b"timing-caches", b"runtime-caches")
                (artefacts / written.name).write_bytes(data)
    time.sleep(SETTLE_NS / 1e9 + 0.1)
    for ask in asks:
        found.expected[ask] = content_of(get(cache, ask))
    assert cache.verify().findings == ()
    for file in sorted(found.config.dir.rglob("*")):
        if file.is_file() and file.name != "reserve":
            found.saved[file] = file.read_bytes(), stat.S_IMODE(file.stat().st_mode)
            found.seen[file] = _fingerprint(file)
    return found


# Damages. Each says what it did, so that a failure can be made again.


def flip(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    if not content:
        return truncate_or_grow(path, chance)
    place, bit = chance.randrange(len(content)), chance.randrange(8)
    content[place] ^= 1 << bit
    _write(path, content)
    return f"bit {bit} of byte {place} of {path.name}"


def truncate_or_grow(path: Path, chance: random.Random) -> str:
    content = path.read_bytes()
    size = chance.randrange(len(content)) if content else 100
    _write(path, (content + chance.randbytes(100))[:size])
    return f"{path.name} cut to {size} bytes"


def overwrite(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    place, size = chance.randrange(len(content) + 1), chance.choice([1, 16, 512, 4096])
    block = chance.choice([bytes(size), chance.randbytes(size)])
    content[place : place + size] = block[: max(len(content) - place, 1)]
    _write(path, content)
    return f"{size} bytes at {place} of {path.name}"


def _write(path: Path, content: bytes) -> None:
    """Write in place, as enginecache never does."""
    path.chmod(0o600)
    mode = path.stat().st_mode
    with path.open("r+b") as file:
        file.write(content)
        file.truncate(len(content))
    path.chmod(0o400 if path.suffix == ".engine" else mode)


def change_a_value(path: Path, chance: random.Random) -> str:
    """One bit of one value of one row, with its indexes kept in step: SQLite finds nothing wrong."""
    connection = sqlite3.connect(path)
    tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    table = chance.choice([name for name in tables if connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0]])
    rows = connection.execute(f"SELECT rowid, * FROM {table}").fetchall()
    names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    row = chance.choice(rows)
    column = chance.randrange(len(names))
    value = row[column + 1]
    if isinstance(value, str) and value:
        place = chance.randrange(len(value))
        value = value[:place] + chr(ord(value[place]) ^ 1 << chance.randrange(7)) + value[place + 1 :]
    elif isinstance(value, int):
        value ^= 1 << chance.randrange(40)
    elif isinstance(value, float):
        value *= chance.choice([-1.0, 1e300, 0.5])
    try:
        connection.execute(f"UPDATE {table} SET {names[column]} = ? WHERE rowid = ?", (value, row[0]))
        connection.commit()
    except sqlite3.IntegrityError:
        connection.rollback()
    connection.close()
    return f"{table}.{names[column]} of row {row[0]} became {value!r:.80}"


def damage(folder: Folder, chance: random.Random) -> str:
    (target,) = chance.choices(list(TARGETS), list(TARGETS.values()))
    if target == "sql":
        return change_a_value(folder.config.dir / "registry.sqlite", chance)
    path = chance.choice(folder.files(target))
    return chance.choices([flip, truncate_or_grow, overwrite], [6, 1, 2])[0](path, chance)


def serve(folder: Folder, asks: list[tuple[Path, int]], what: str, said: collections.Counter[str]) -> None:
    """A get gives the right bytes for the key, or an error that is foreseen."""
    try:
        cache = folder.open()
        for ask in asks:
            entry = get(cache, ask)
            said[entry.outcome] += 1
            assert content_of(entry) == folder.expected[ask], what
            assert blake3.blake3(entry.path.read_bytes()).hexdigest() == entry.digest, what
    except FORESEEN as error:  # any other fails the test
        said[type(error).__name__ if error.fix else "an error that does not help"] += 1


def repair(folder: Folder, asks: list[tuple[Path, int]], what: str, said: collections.Counter[str]) -> None:
    """A repair leaves nothing to find, and a cache that serves."""
    repaired = StoredEngines.verify_folder(folder.config, deep=True, repair=True)
    assert repaired.is_clean, (what, repaired)
    said.update(f"finding {finding.kind}" for finding in repaired.findings)
    again = StoredEngines.verify_folder(folder.config)
    assert again.findings == (), (what, repaired, again)
    cache = folder.open()
    for ask in asks:
        assert content_of(get(cache, ask)) == folder.expected[ask], what
    said["repaired"] += 1


def run(folder: Folder, seeds: range, repaired: float) -> collections.Counter[str]:
    """Damage and serve, once a seed; repair the share ``repaired`` of them too, some without a get before."""
    said: collections.Counter[str] = collections.Counter()
    for seed in seeds:
        chance = random.Random(seed)
        folder.restore()
        what = f"seed {seed}: {damage(folder, chance)}"
        asks = chance.sample(folder.asks, chance.choice([1, 2]))
        is_repaired = chance.random() < repaired
        try:
            if not is_repaired or chance.random() < 0.7:
                serve(folder, asks, what, said)
            if is_repaired:
                repair(folder, asks, what, said)
        except Exception as error:
            raise AssertionError(what) from error
    assert "an error that does not help" not in said
    return said


@pytest.fixture(autouse=True)
def _whole_again(folder: Folder) -> Iterator[None]:
    yield
    folder.restore()
    assert folder.open().verify(deep=True).is_clean


def test_no_damage_is_served_and_every_damage_is_repaired(folder):
    said = run(folder, range(120), 0.15)
    assert said["hit"] > 0
    assert said["repaired"] > 0


@pytest.mark.reliability
@pytest.mark.parametrize("part", range(15))
def test_no_damage_of_many_is_served_and_every_damage_is_repaired(folder, part, capsys):
    said = run(folder, range(10_000 + part * 1200, 10_000 + (part + 1) * 1200), 0.25)
    with capsys.disabled():
        print(f"\n1200 damages, part {part}: {dict(sorted(said.items()))}")
