"""Replay requests against ways to choose what an engine cache evicts; print the seconds of building again.

Two traces, each of a fixed seed. Both are models, not recordings:

``fleet``: 500 deployments, of Zipf popularity (exponent 0.9), with four versions each over 90 days. 95 of 100 requests
want the newest version, the others the one before. Sizes are log-normal, from 5 MB to 5 GB, build times from 20 s to
3 h, with a correlation of 0.3 between their logarithms; versions of one deployment differ by about a tenth.

``recency``: what was asked for lately is asked for again, whatever it is, and a build takes 1 s for each MB, give or
take a third: knowing costs is worth next to nothing there, and least recently used is right.

A first build is nobody's fault: only builds of what had been built before are counted. ``gds`` is the planner that
enginecache itself uses, with all its rules; the others are written here, and may evict what was used a second ago. The
clairvoyant one knows every later request, and evicts what saves least for the room and the time that it takes. That is
a heuristic: no bound.

Usage: python benchmarks/eviction.py [--requests N] [--keys N] [--json]
"""
# ruff: noqa: D102, INP001, S311, T201  a script that prints; chance needs no secret; Policy says what its methods do

from __future__ import annotations

import argparse
import datetime as dt
import heapq
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

from enginecache.config import Config
from enginecache.maintenance.eviction import inflation_after, plan_prune
from enginecache.storage.registry.rows import InflationStep, Standing

CAPACITIES = (0.05, 0.15, 0.40)
"""Of the bytes of all engines together."""
PERIOD_S = 90 * 86400.0
SEED = 20261101
VERSIONS = 4
_START = dt.datetime(2026, 11, 1, tzinfo=dt.timezone.utc)


@dataclass(frozen=True)
class Engine:
    """Engine of a trace: its size in bytes, and the duration of its build."""

    size_bytes: int
    build_seconds: float


@dataclass(frozen=True)
class Trace:
    """Requests, in order.

    Attributes:
        name: Of the model.
        engines: What is asked for, by number.
        requests: Seconds since the start, and the number of an engine.
    """

    name: str
    engines: tuple[Engine, ...]
    requests: tuple[tuple[float, int], ...]

    @property
    def size_bytes(self) -> int:
        """Of all engines."""
        return sum(engine.size_bytes for engine in self.engines)


def fleet(keys: int, requests: int) -> Trace:
    """Deployments whose versions replace each other."""
    chance = random.Random(SEED)
    engines: list[Engine] = []
    releases: list[list[float]] = []
    for _ in range(keys // VERSIONS):
        size, common = chance.gauss(0, 1), chance.gauss(0, 1)
        seconds = 0.3 * size + (1 - 0.3**2) ** 0.5 * common
        for _ in range(VERSIONS):
            size_bytes = round(_log_normal(size, chance.gauss(0, 0.1), 5e6, 5e9))
            engines.append(Engine(size_bytes, _log_normal(seconds, chance.gauss(0, 0.1), 20, 10800)))
        releases.append([0.0, *sorted(chance.uniform(0, PERIOD_S) for _ in range(VERSIONS - 1))])
    popularity = list(accumulate((rank + 1) ** -0.9 for rank in range(len(releases))))
    asked, at = [], 0.0
    for _ in range(requests):
        at += chance.expovariate(requests / PERIOD_S)
        (deployment,) = chance.choices(range(len(releases)), cum_weights=popularity)
        newest = sum(release <= at for release in releases[deployment]) - 1
        version = newest if chance.random() < 0.95 else max(newest - 1, 0)
        asked.append((at, deployment * VERSIONS + version))
    return Trace("fleet", tuple(engines), tuple(asked))


def recency(keys: int, requests: int) -> Trace:
    """Draw requests with recency: the depth in the order of last requests is geometric."""
    chance = random.Random(SEED)
    sizes = [round(_log_normal(chance.gauss(0, 1), 0.0, 5e6, 5e9)) for _ in range(keys)]
    engines = tuple(Engine(size, size / 1e6 * chance.lognormvariate(0, 0.3)) for size in sizes)
    latest = list(range(keys))
    asked, at = [], 0.0
    for _ in range(requests):
        at += chance.expovariate(requests / PERIOD_S)
        depth = int(chance.expovariate(4 / keys))
        latest.append(latest.pop(-1 - depth % keys))
        asked.append((at, latest[-1]))
    return Trace("recency", engines, tuple(asked))


def _log_normal(deviation: float, more: float, low: float, high: float) -> float:
    """The geometric mean of the ends at deviation 0, the ends at 2.5, and nothing beyond them."""
    middle: float = (low * high) ** 0.5
    wanted: float = middle * (high / low) ** (deviation / 5) * (1 + more)
    return min(max(wanted, low), high)


class Policy(Protocol):
    """Policy that decides what stays in a cache of a given capacity."""

    def has(self, engine: int) -> bool:
        """Return whether the engine is stored."""
        ...

    def hit(self, engine: int, at: float) -> None:
        """It was asked for and is stored."""
        ...

    def built(self, engine: int, at: float) -> None:
        """It was asked for and has been built; the cache fits its capacity afterwards."""
        ...


@dataclass
class Ranked:
    """Evicts what ranks lowest; an engine is ranked when it is asked for."""

    trace: Trace
    capacity_bytes: int
    rank: Callable[[Engine, int, float, float], float]
    stored: dict[int, tuple[float, int]] = field(default_factory=dict)
    queue: list[tuple[float, float, int]] = field(default_factory=list)
    size_bytes: int = 0
    inflation: float = 0.0

    def has(self, engine: int) -> bool:
        return engine in self.stored

    def hit(self, engine: int, at: float) -> None:
        count = self.stored.get(engine, (0.0, 0))[1] + 1
        rank = self.rank(self.trace.engines[engine], count, at, self.inflation)
        self.stored[engine] = (at, count)
        heapq.heappush(self.queue, (rank, at, engine))

    def built(self, engine: int, at: float) -> None:
        self.size_bytes += self.trace.engines[engine].size_bytes
        while self.size_bytes > self.capacity_bytes and self.queue:
            rank, ranked_at, lowest = heapq.heappop(self.queue)
            if self.stored.get(lowest, (0.0, 0))[0] == ranked_at:
                del self.stored[lowest]
                self.size_bytes -= self.trace.engines[lowest].size_bytes
                self.inflation = rank
        self.hit(engine, at)


RANKS: dict[str, Callable[[Engine, int, float, float], float]] = {
    # From the engine, how often it was used since it was built, the time, and the rank of what went last.
    "lru": lambda _engine, _count, at, _inflation: at,
    "lfu": lambda _engine, count, _at, _inflation: count,
    "gdsf": lambda engine, count, _at, inflation: inflation + count * 1e9 / engine.size_bytes,
    "gdsf, cost": lambda engine, count, _at, inflation: (
        inflation + count * engine.build_seconds * 1e9 / engine.size_bytes
    ),
}


class Planned:
    """Policy of enginecache: its own planner, after each build. Registry and files are a dictionary here."""

    def __init__(self, trace: Trace, capacity_bytes: int) -> None:
        self._trace = trace
        self._capacity_bytes = capacity_bytes
        self._size_bytes = 0
        self._stored: dict[int, Standing] = {}
        self._inflation: list[InflationStep] = []

    def has(self, engine: int) -> bool:
        return engine in self._stored

    def hit(self, engine: int, at: float) -> None:
        self._stored[engine] = self._stored[engine]._replace(last_used_at=_time(at))

    def built(self, engine: int, at: float) -> None:
        now = _time(at)
        self._stored[engine] = _standing(engine, self._trace.engines[engine], now)
        self._size_bytes += self._trace.engines[engine].size_bytes
        if self._size_bytes > self._capacity_bytes:
            self._enforce(now)

    def _enforce(self, now: dt.datetime) -> None:
        stored = list(self._stored.values())
        limit = self._capacity_bytes
        plan = plan_prune(stored, (), now, Config.keep_recent_s, max_size_bytes=limit, inflation=self._inflation)
        for going in plan.entries:
            del self._stored[int(going.standing.key, 16)]
        self._size_bytes = plan.kept_bytes
        value = inflation_after(plan.entries)
        if value is not None:
            # As the registry does: steps that ended before the oldest use are in force for nobody.
            oldest = min(used.last_used_at for used in self._stored.values())
            ended = sum(step.at <= oldest for step in self._inflation) - 1
            latest = self._inflation[-1].value if self._inflation else 0.0
            self._inflation = [*self._inflation[max(ended, 0) :], InflationStep(now, max(value, latest))]


def _time(at: float) -> dt.datetime:
    return _START + dt.timedelta(seconds=at)


def _standing(number: int, engine: Engine, now: dt.datetime) -> Standing:
    name = f"{number:064x}"
    return Standing(
        key=name,
        digest=name,
        model_name=f"{number}.onnx",
        size_bytes=engine.size_bytes,
        backend="tensorrt",
        tensorrt_version="10.13.3.9",
        compute_capabilities=("9.0",),
        build_id=name[:32],
        build_seconds=engine.build_seconds,
        last_used_at=now,
        is_pinned=False,
    )


class Clairvoyant:
    """Evicts what is wanted latest, weighed with what it takes up and saves; perhaps the engine just built."""

    def __init__(self, trace: Trace, capacity_bytes: int) -> None:
        self._trace = trace
        self._capacity_bytes = capacity_bytes
        self._size_bytes = 0
        self._next: dict[int, float] = {}
        self._wanted: dict[int, list[float]] = {}
        for at, engine in reversed(trace.requests):
            self._wanted.setdefault(engine, []).append(at)

    def has(self, engine: int) -> bool:
        return engine in self._next

    def hit(self, engine: int, at: float) -> None:
        wanted = self._wanted[engine]
        while wanted and wanted[-1] <= at:
            wanted.pop()
        self._next[engine] = wanted[-1] if wanted else float("inf")

    def built(self, engine: int, at: float) -> None:
        self.hit(engine, at)
        self._size_bytes += self._trace.engines[engine].size_bytes
        while self._size_bytes > self._capacity_bytes:
            worst = max(self._next, key=lambda number: self._waste(number, at))
            del self._next[worst]
            self._size_bytes -= self._trace.engines[worst].size_bytes

    def _waste(self, number: int, at: float) -> float:
        engine = self._trace.engines[number]
        return (self._next[number] - at) * engine.size_bytes / engine.build_seconds


POLICIES: dict[str, Callable[[Trace, int], Policy]] = {
    **{name: partial(Ranked, rank=rank) for name, rank in RANKS.items()},
    "gds (enginecache)": Planned,
    "clairvoyant": Clairvoyant,
}


def rebuild_seconds(trace: Trace, policy: Policy) -> tuple[float, int]:
    """Seconds of building what had been built before, and how many such builds there were."""
    built: set[int] = set()
    seconds, rebuilds = 0.0, 0
    for at, engine in trace.requests:
        if policy.has(engine):
            policy.hit(engine, at)
            continue
        if engine in built:
            seconds += trace.engines[engine].build_seconds
            rebuilds += 1
        built.add(engine)
        policy.built(engine, at)
    return seconds, rebuilds


def compare(trace: Trace) -> Iterable[dict[str, Any]]:
    """One row for each capacity and policy."""
    for capacity in CAPACITIES:
        least_recent = 0.0
        for name, make in POLICIES.items():
            started = time.perf_counter()
            seconds, rebuilds = rebuild_seconds(trace, make(trace, round(trace.size_bytes * capacity)))
            least_recent = seconds if name == "lru" else least_recent
            yield {
                "trace": trace.name,
                "capacity": capacity,
                "policy": name,
                "rebuild_seconds": round(seconds),
                "rebuilds": rebuilds,
                "to_lru": round(seconds / least_recent, 3) if least_recent else None,
                "elapsed_seconds": round(time.perf_counter() - started, 2),
            }


def print_table(trace: Trace, rows: Iterable[dict[str, Any]]) -> None:
    """A line for each row, as it is found."""
    first = {engine for _, engine in trace.requests}
    hours = sum(trace.engines[engine].build_seconds for engine in first) / 3600
    print(f"\n{trace.name}: {len(trace.requests)} requests, {len(first)} engines, {trace.size_bytes / 1e9:.0f} GB")
    print(f"first builds take {hours:.0f} h whatever is evicted; beyond that:")
    print(f"{'capacity':>8}  {'policy':<18} {'rebuild h':>9} {'rebuilds':>8} {'to LRU':>7}")
    for row in rows:
        ratio = "-" if row["to_lru"] is None else f"{row['to_lru']:.2f}"
        line = f"{row['capacity']:>8.0%}  {row['policy']:<18} {row['rebuild_seconds'] / 3600:>9.1f}"
        print(f"{line} {row['rebuilds']:>8} {ratio:>7}", flush=True)


def main(arguments: Sequence[str]) -> None:
    """Replay both traces, and print a table or one JSON value."""
    parser = argparse.ArgumentParser(description="Replay requests against ways to evict engines.")
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--keys", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    traces = [make(asked.keys, asked.requests) for make in (fleet, recency)]
    if asked.json:
        print(json.dumps([row for trace in traces for row in compare(trace)]))
        return
    for trace in traces:
        print_table(trace, compare(trace))


if __name__ == "__main__":
    main(sys.argv[1:])
