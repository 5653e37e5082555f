"""The cache against a model of it, a few dictionaries, over random histories with damage, deaths and wrong clocks.

The model says what each call must give, and never asks the cache for it. A plan is made from the bytes of the model's
file, so an engine of another model is seen whatever the cache takes for its key.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from blake3 import blake3
from fakes import FakeBuilder, fake_cache
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import linear

from enginecache.cache import EngineCache
from enginecache.errors import BuilderKilledError, BuildError, NotCachedError, OptionError, StoreError
from enginecache.maintenance import orphans, removal, verify
from enginecache.model import reader
from enginecache.pipeline import failures, model_memo
from enginecache.pipeline import publish as publication
from enginecache.storage import blobs
from enginecache.storage.last_used import UseLog
from enginecache.storage.registry import entries, memos
from enginecache.storage.registry import registry as registry_module

DIMS = {"batch": (1, 2, 4)}
MINUTE_S, HOUR_S, DAY_S = 60.0, 3600.0, 86400.0
REASON = "TensorRT refused node 7"
JUMPS_S = (37.0, 45 * MINUTE_S, 2.5 * HOUR_S, 1.2 * DAY_S, 33 * DAY_S, -37.0, -50 * MINUTE_S, -3 * DAY_S)
MODELS = [linear(seed=seed).SerializeToString() for seed in range(2)]
FILES = range(2)
LEVELS = range(1, 4)

FAILURES: dict[str, BaseException] = {
    "refused": BuildError(REASON),
    "killed": BuilderKilledError("the builder was killed"),
    "full": StoreError("the disk is full"),
    "interrupted": KeyboardInterrupt(),
}
SEEDS = st.integers(0, 2**32 - 1)
NUMBERS = st.integers(0, 5)
LIMITS: list[dict[str, float]] = [
    *({"max_size_bytes": size} for size in (0, 600, 2000)),
    *({"older_than_s": age_s} for age_s in (MINUTE_S, HOUR_S, 30 * DAY_S)),
]
WALK = 20
DEATHS = ("builder", "stage", "publish", "row", "end")
DAMAGES = ("flip", "cut", "longer", "gone", "link")


class Asked(NamedTuple):
    """A request: which weights the model's file has, and the optimization level."""

    weights: int
    level: int

    @property
    def plan(self) -> bytes:
        """Return the plan that TensorRT makes of it; an option may change nothing."""
        half = self.level // 2
        block = hashlib.sha256(MODELS[self.weights] + bytes([half])).digest()
        return b"vtrt" + block * (16 << half)


class ReadingBuilder(FakeBuilder):
    """Makes the plan from the file, as TensorRT does, and not from what the cache says of it."""

    def build(self, request, progress=None):
        built = super().build(request, progress)
        weights = MODELS.index(request.source.path.read_bytes())
        built.plan_path.write_bytes(Asked(weights, request.options.optimization_level).plan)
        return built


class Clock:
    """The time of the cache: this machine's, and so many seconds more."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def time(self) -> float:
        return time.time() + self.ahead_s

    def time_ns(self) -> int:
        return time.time_ns() + int(self.ahead_s * 1e9)

    def utc_now(self) -> dt.datetime:
        return dt.datetime.fromtimestamp(self.time(), dt.timezone.utc)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Everywhere a time of day decides something; files keep this machine's, but for last uses."""
        for module in (failures, verify, publication, removal, entries, memos, registry_module):
            patch.setattr(module, "utc_now", self.utc_now)
        timed: tuple[ModuleType, ...] = (orphans, model_memo, blobs, reader)
        for module in timed:
            patch.setattr(module, "time", self)
        touch = UseLog.touch

        def touch_now(log: UseLog, key: str) -> None:
            touch(log, key)
            os.utime(log._path(key), (self.time(), self.time()))

        patch.setattr(UseLog, "touch", touch_now)


class Attempt(NamedTuple):
    at: float
    is_success: bool
    is_lasting: bool = False


def new_root() -> Path:
    """A cache folder with an empty registry; the schema is made once."""
    if not _TEMPLATE:
        folder = tempfile.mkdtemp(prefix="enginecache-template-")
        fake_cache(Path(folder) / "cache")
        _TEMPLATE.append(Path(folder))
    folder = Path(tempfile.mkdtemp(prefix="enginecache-model-"))
    shutil.copytree(_TEMPLATE[0], folder, dirs_exist_ok=True)
    return folder


_TEMPLATE: list[Path] = []


@pytest.fixture(autouse=True, scope="module")
def _no_template_is_left():
    yield
    while _TEMPLATE:
        shutil.rmtree(_TEMPLATE.pop())


def settle(path: Path, change: Any) -> None:
    """Change a file, until its times have moved: two changes in one tick of the kernel's clock look like one."""
    before = path.lstat().st_ctime_ns if path.exists() else 0
    while True:
        change()
        if not path.exists() or path.lstat().st_ctime_ns != before:
            return


class CacheModel(RuleBasedStateMachine):
    """Requests are of one of two files, which change their weights, at one of three optimization levels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.clock = Clock()
        self.clock.install(self.patch)
        self.folder = new_root()
        self.builder = ReadingBuilder()
        self.cache = self.open()
        self.weights = dict.fromkeys(FILES, 0)
        self.keys: dict[Asked, str] = {}
        self.stored: set[Asked] = set()
        self.pinned: set[Asked] = set()
        self.damaged: set[bytes] = set()
        self.attempts: dict[Asked, list[Attempt]] = {}

    def open(self) -> EngineCache:
        return fake_cache(self.folder / "cache", self.builder)

    def teardown(self) -> None:
        try:
            assert self.cache.verify(deep=True, repair=True).is_clean
            assert self.cache.verify(deep=True).findings == ()
        finally:
            self.patch.undo()
            shutil.rmtree(self.folder)

    # What must be

    def asked(self, file: int, level: int) -> Asked:
        return Asked(self.weights[file], level)

    def is_served(self, asked: Asked) -> bool:
        return asked in self.stored and asked.plan not in self.damaged

    def failure_in_force(self, asked: Asked) -> int:
        """Return the number of refusals in a row that forbid an attempt now; 0 if it may be tried."""
        now, attempts = self.clock.time(), self.attempts.get(asked, [])
        # In the order in which they were made, whatever the clock said.
        last = max((place for place, attempt in enumerate(attempts) if attempt.is_success), default=-1)
        failed = [attempt for attempt in reversed(attempts[last + 1 :]) if attempt.at <= now + MINUTE_S]
        count = next((n for n, attempt in enumerate(failed) if not attempt.is_lasting), len(failed))
        if not count:
            return 0
        return count if now - failed[0].at < min(HOUR_S * 2 ** (count - 1), DAY_S) else 0

    def lose(self, plan: bytes) -> None:
        """All entries of a damaged blob are forgotten with it."""
        self.damaged.discard(plan)
        self.stored = {asked for asked in self.stored if asked.plan != plan}

    def set_aside(self, asked: Asked) -> None:
        """Apply what every look at the entry does to its blob, if that is damaged."""
        if asked in self.stored and asked.plan in self.damaged:
            self.lose(asked.plan)

    def publish(self, asked: Asked) -> None:
        self.stored.add(asked)
        self.damaged.discard(asked.plan)  # equal bytes heal the blob

    def drop_blob(self, plan: bytes) -> None:
        if not any(asked.plan == plan for asked in self.stored):
            self.damaged.discard(plan)

    # What is asked

    def model_path(self, file: int) -> Path:
        return self.folder / f"model{file}.onnx"

    def ask(self, level: int) -> dict[str, Any]:
        return {"dims": DIMS, "optimization_level": level}

    def record(self, asked: Asked):
        return self.cache.find(self.keys[asked])

    def blob(self, plan: bytes) -> Path:
        name = blake3(plan).hexdigest()
        return self.cache.root.engines / name[:2] / f"{name}.engine"

    @initialize(seed=SEEDS)
    def begin(self, seed: int) -> None:
        for file in FILES:
            self.change_model(file, file)
        self.walk(seed)

    @rule(file=st.sampled_from(FILES), weights=st.sampled_from(range(len(MODELS))))
    def change_model(self, file: int, weights: int) -> None:
        path = self.model_path(file)
        settle(path, lambda: path.write_bytes(MODELS[weights]))
        self.weights[file] = weights

    @rule(file=st.sampled_from(FILES), level=st.sampled_from(LEVELS))
    def get(self, file: int, level: int) -> None:
        self.try_to_get(file, level)

    @rule(file=st.sampled_from(FILES), level=st.sampled_from(LEVELS))
    def rebuild(self, file: int, level: int) -> None:
        self.try_to_get(file, level, rebuild=True)

    @rule(
        file=st.sampled_from(FILES),
        level=st.sampled_from(LEVELS),
        rebuild=st.booleans(),
        fails=st.sampled_from(("refused", *FAILURES)),
    )
    def get_and_fail(self, file: int, level: int, rebuild: bool, fails: str) -> None:
        self.try_to_get(file, level, rebuild=rebuild, fails=fails)

    def try_to_get(self, file: int, level: int, *, rebuild: bool = False, fails: str = "") -> None:
        asked = self.asked(file, level)
        is_hit = self.is_served(asked) and not rebuild
        self.set_aside(asked)
        in_force = 0 if rebuild else self.failure_in_force(asked)
        self.builder.before = self.failing(fails)
        built, now = self.builder.count, self.clock.time()
        if is_hit or (not in_force and not fails):
            entry = self.cache.get(self.model_path(file), rebuild=rebuild, **self.ask(level))
            assert entry.outcome == ("hit" if is_hit else "built")
            assert entry.path.read_bytes() == asked.plan
            assert self.keys.setdefault(asked, entry.key) == entry.key
            if not is_hit:
                self.attempts.setdefault(asked, []).append(Attempt(now, is_success=True))
                self.publish(asked)
        else:
            expected = BuildError if in_force else type(FAILURES[fails])
            with pytest.raises(expected) as caught:
                self.cache.get(self.model_path(file), rebuild=rebuild, **self.ask(level))
            assert ("(remembered: " in str(caught.value)) == bool(in_force)
            if in_force:
                self.check_told_failure(caught.value, in_force)
            else:
                failed = Attempt(now, is_success=False, is_lasting=fails == "refused")
                self.attempts.setdefault(asked, []).append(failed)
        assert self.builder.count - built == (not is_hit and not in_force)

    def failing(self, how: str):
        def fail(_request) -> None:
            raise FAILURES[how]

        return fail if how else None

    def check_told_failure(self, error: BuildError, count: int) -> None:
        assert error.what.startswith(REASON)
        assert (f"the last {count} attempts failed" in error.what) == (count > 1)
        assert bool(error.log_path) != ("Its log has been deleted" in error.fix)
        assert not error.log_path or Path(error.log_path).exists()

    @rule(file=st.sampled_from(FILES), level=st.sampled_from(LEVELS))
    def get_offline(self, file: int, level: int) -> None:
        asked = self.asked(file, level)
        if self.is_served(asked):
            entry = self.cache.get(self.model_path(file), offline=True, **self.ask(level))
            assert (entry.outcome, entry.path.read_bytes()) == ("hit", asked.plan)
            return
        self.set_aside(asked)
        in_force = self.failure_in_force(asked)
        with pytest.raises(NotCachedError) as caught:
            self.cache.get(self.model_path(file), offline=True, **self.ask(level))
        assert (REASON in caught.value.fix) == bool(in_force)

    @rule(file=st.sampled_from(FILES), level=st.sampled_from(LEVELS))
    def explain(self, file: int, level: int) -> None:
        asked = self.asked(file, level)
        is_hit = self.is_served(asked)
        self.set_aside(asked)
        explained = self.cache.explain(self.model_path(file), **self.ask(level))
        assert explained.verdict == ("hit" if is_hit else "miss")
        assert self.keys.setdefault(asked, explained.key) == explained.key
        is_told = "failed" in [reason.code for reason in explained.reasons]
        assert is_told == (not is_hit and bool(self.failure_in_force(asked)))

    @rule(file=st.sampled_from(FILES), level=st.sampled_from(LEVELS), point=st.sampled_from(DEATHS))
    def die(self, file: int, level: int, point: str) -> None:
        """A process dies in the middle of a get: a real one, forked from this."""
        asked = self.asked(file, level)
        is_built = not self.is_served(asked)
        self.set_aside(asked)
        in_force = self.failure_in_force(asked)
        is_built = is_built and not in_force
        now = self.clock.time()
        status = self.forked_get(file, level, point)
        assert status == (9 if is_built else 0)
        if is_built:
            self.keys.setdefault(asked, self.cache.explain(self.model_path(file), **self.ask(level)).key)
        if is_built and point in {"row", "end"}:
            self.damaged.discard(asked.plan)  # equal bytes heal the blob
        if is_built and point == "end":
            self.attempts.setdefault(asked, []).append(Attempt(now, is_success=True))
            self.publish(asked)

    def forked_get(self, file: int, level: int, point: str) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads of the test runner take no part
            pid = os.fork()
        if pid:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        signal.alarm(20)
        self.builder.before = (lambda _: os._exit(9)) if point == "builder" else None
        cache = self.cache
        if point == "stage":
            cache._storage.blobs.adopt = lambda *_: os._exit(9)
        elif point == "publish":
            cache._storage.blobs.publish = lambda *_: os._exit(9)
        elif point == "row":
            cache._registry.publish = lambda *_: os._exit(9)
        elif point == "end":
            publish = cache._registry.publish
            cache._registry.publish = lambda *row: (publish(*row), os._exit(9))
        try:
            with contextlib.suppress(BuildError):
                cache.get(self.model_path(file), **self.ask(level))
            os._exit(0)
        finally:
            os._exit(1)

    # What is done to stored engines

    def some(self, number: int) -> Asked:
        """One of those that are stored."""
        return sorted(self.stored)[number % len(self.stored)]

    @precondition(lambda self: self.stored)
    @rule(number=NUMBERS)
    def pin(self, number: int) -> None:
        asked = self.some(number)
        if asked in self.pinned:
            self.cache.unpin(self.record(asked))
            self.pinned.discard(asked)
        else:
            self.cache.pin(self.record(asked))
            self.pinned.add(asked)

    @precondition(lambda self: self.stored)
    @rule(number=NUMBERS)
    def remove(self, number: int) -> None:
        asked = self.some(number)
        if asked in self.pinned:
            with pytest.raises(OptionError, match="pinned"):
                self.cache.remove(self.record(asked))
            return
        self.cache.remove(self.record(asked))
        self.stored.discard(asked)
        self.drop_blob(asked.plan)

    @rule(limits=st.sampled_from(LIMITS), seconds=st.sampled_from(JUMPS_S))
    def prune_later(self, limits: dict[str, float], seconds: float) -> None:
        """Let time pass before a prune: recently used engines stay."""
        self.clock.ahead_s += seconds
        self.prune(limits)

    def prune(self, limits: dict[str, float]) -> None:
        plan = self.cache.plan_prune(**limits)
        by_key = {self.keys[asked]: asked for asked in self.stored}
        going = {by_key[item.standing.key] for item in plan.entries}
        gone = {asked.plan for asked in going}
        assert not gone & {asked.plan for asked in self.pinned & self.stored}
        assert going == {asked for asked in self.stored if asked.plan in gone}
        age_s = [(self.clock.utc_now() - item.standing.last_used_at).total_seconds() for item in plan.entries]
        assert all(age >= self.cache.config.keep_recent_s for age in age_s)
        before = self.size_bytes()
        freed = self.cache.execute_prune(plan)
        if not gone & self.damaged:
            assert freed >= plan.freed_bytes
            assert before - self.size_bytes() >= sum(map(len, gone))
        self.stored -= going
        for one in gone:
            self.drop_blob(one)
        if limits.get("max_size_bytes") is not None and not plan.shortfall_bytes:
            assert self.cache.stats().size_bytes <= limits["max_size_bytes"]

    def size_bytes(self) -> int:
        return sum(path.lstat().st_size for path in self.cache.root.engines.glob("*/*"))

    @precondition(lambda self: self.stored)
    @rule(number=NUMBERS, how=st.sampled_from(DAMAGES))
    def damage(self, number: int, how: str) -> None:
        plan = self.some(number).plan
        if plan not in self.damaged:
            path = self.blob(plan)
            settle(path, lambda: harm(path, plan, how))
            self.damaged.add(plan)

    @rule(deep=st.booleans(), is_repair=st.booleans())
    def verify(self, deep: bool, is_repair: bool) -> None:
        if is_repair:
            self.repair()
        else:
            self.check_findings(self.cache.verify(deep=deep))

    def repair(self) -> None:
        found = self.cache.verify(repair=True)
        self.check_findings(found)
        assert found.is_clean
        for plan in set(self.damaged):
            self.lose(plan)
        assert self.cache.verify(deep=True).findings == ()

    def check_findings(self, found) -> None:
        """Every damaged entry is found, and nothing else but garbage and attempts that died."""
        subjects = {finding.subject for finding in found.findings if finding.kind not in {"orphan", "build"}}
        damaged = {self.keys[asked]: asked.plan for asked in self.stored if asked.plan in self.damaged}
        assert subjects <= set(damaged)
        assert {damaged[key] for key in subjects} == self.damaged  # a repair fixes all entries of a blob at once
        garbage_paths = {finding.subject for finding in found.findings if finding.kind == "orphan"}
        assert not garbage_paths & {str(self.blob(asked.plan)) for asked in self.stored}

    @rule(seconds=st.sampled_from(JUMPS_S), is_opened=st.booleans())
    def jump(self, seconds: float, is_opened: bool) -> None:
        self.clock.ahead_s += seconds
        if is_opened:
            self.cache = self.open()

    @rule(seed=SEEDS)
    def walk(self, seed: int) -> None:
        """Steps of all sorts, evenly: hypothesis by itself prefers a few sorts and short histories."""
        chance = random.Random(seed)
        for _ in range(WALK):
            self.step(chance)
            self.rows_are_what_was_published()
            self.blobs_are_whole_but_for_the_damaged()

    def step(self, chance: random.Random) -> None:
        ask = (chance.choice(FILES), chance.choice(LEVELS))
        steps: list[tuple[Any, ...]] = [
            *[(self.get, *ask)] * 3,
            (self.rebuild, *ask),
            *[(self.get_and_fail, *ask, chance.random() < 0.3, chance.choice(["refused", *FAILURES]))] * 2,
            (self.get_offline, *ask),
            (self.explain, *ask),
            (self.die, *ask, chance.choice(DEATHS)),
            (self.change_model, ask[0], chance.randrange(len(MODELS))),
            (self.prune_later, chance.choice(LIMITS), chance.choice(JUMPS_S)),
            (self.verify, chance.random() < 0.5, chance.random() < 0.5),
            (self.jump, chance.choice(JUMPS_S), chance.random() < 0.2),
        ]
        if self.stored:
            number = chance.randrange(6)
            steps += [(self.pin, number), (self.remove, number)]
            steps += [(self.damage, number, chance.choice(DAMAGES))] * 2
        step, *given = chance.choice(steps)
        note(f"{step.__name__}{tuple(given)}")
        step(*given)

    # What must hold after each of them

    @invariant()
    def rows_are_what_was_published(self) -> None:
        assert len(set(self.keys.values())) == len(self.keys)
        entries = {used.record.key: used.record for used in self.cache.entries()}
        assert set(entries) == {self.keys[asked] for asked in self.stored}
        assert {key for key, record in entries.items() if record.is_pinned} == {
            self.keys[asked] for asked in self.pinned & self.stored
        }
        totals, plans = self.cache.stats(), {asked.plan for asked in self.stored}
        assert (totals.entries, totals.blobs, totals.size_bytes) == (len(entries), len(plans), sum(map(len, plans)))

    @invariant()
    def blobs_are_whole_but_for_the_damaged(self) -> None:
        assert self.damaged <= {asked.plan for asked in self.stored}
        for asked in self.stored:
            if asked.plan not in self.damaged:
                path = self.blob(asked.plan)
                assert path.read_bytes() == asked.plan
                assert path.stat().st_mode & 0o777 == 0o400


def harm(path: Path, plan: bytes, how: str) -> None:
    """Damage a blob as broken programs and media do."""
    if how in {"gone", "link"}:
        path.unlink(missing_ok=True)
        if how == "link":
            elsewhere = path.parents[2] / "elsewhere"
            elsewhere.write_bytes(plan)
            path.symlink_to(elsewhere)
        return
    path.chmod(0o600)
    middle = len(plan) // 2
    flipped = plan[:middle] + bytes([plan[middle] ^ 1]) + plan[middle + 1 :]
    path.write_bytes({"flip": flipped, "cut": plan[:middle], "longer": plan + b"\0"}[how])
    path.chmod(0o400)


_QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]

TestCacheModel = CacheModel.TestCase
TestCacheModel.settings = settings(max_examples=10, stateful_step_count=5, deadline=None, suppress_health_check=_QUIET)


@pytest.mark.reliability
class TestCacheModelAtLength(CacheModel.TestCase):
    settings = settings(max_examples=100, stateful_step_count=10, deadline=None, suppress_health_check=_QUIET)
