"""The command line, called in this process on a cache with a fake builder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBuilder, fake_place

from enginecache.cache import EngineCache
from enginecache.cli.main import main
from enginecache.config import Config

# The models of other folders' tests.
sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("builders", "quality")]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def rows(self) -> list[list[str]]:
        return [line.split("\t") for line in self.out.splitlines()]


@pytest.fixture
def builder() -> FakeBuilder:
    return FakeBuilder()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache without engines, which the environment names."""
    monkeypatch.setenv("ENGINECACHE_DIR", str(tmp_path / "cache"))
    EngineCache(Config(dir=tmp_path / "cache")).make()
    return tmp_path / "cache"


@pytest.fixture
def cache(builder: FakeBuilder, folder: Path) -> EngineCache:
    return EngineCache(Config(dir=folder), builder=builder, place=fake_place)


@pytest.fixture
def cli(
    builder: FakeBuilder, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ran]]:
    """Runs one command line; ``terminal`` is its width where standard output is one. The cache must end clean."""

    def open_fake(config: Config | None = None, **arguments: Any) -> EngineCache:
        return EngineCache(config or Config.load(**arguments), builder=builder, place=fake_place)

    def run(*arguments: object, terminal: int = 0) -> Ran:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["enginecache", *map(str, arguments)])
        with monkeypatch.context() as patch:
            if terminal:
                patch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
                patch.setenv("COLUMNS", str(terminal))
                patch.setenv("TERM", "xterm")
            with pytest.raises(SystemExit) as ended:
                main()
        captured = capsys.readouterr()
        code = ended.value.code
        return Ran(code if isinstance(code, int) else int(code is not None), captured.out, captured.err)

    monkeypatch.setattr(EngineCache, "open", open_fake)
    yield run
    if folder.is_dir():
        found = open_fake().verify(deep=True)
        assert found.is_clean, found
