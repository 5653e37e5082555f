"""Measure the cost of a hit, here and in other caches, side by side in one run on the same bytes.

No GPU is needed, and no TensorRT but TensorRT-RTX: deserialization is left out. Every figure is a median over
interleaved rounds, with the middle half of the runs; a ratio is to the floor that is named next to it.

Peers: diskcache and joblib.Memory, if they are installed (``pip install diskcache joblib``); a file that is named by
the SHA-256 of the model; and the engine cache of Torch-TensorRT, whose one module is loaded alone, with stand-ins for
what it imports, if its wheel is unpacked somewhere (``--torch-tensorrt FOLDER``).

Usage: python benchmarks/performance.py [--rounds N] [--entries N] [--only PART ...] [--json FILE]
"""
# ruff: noqa: D101, D102, D103, INP001, S101, SLF001, T201  a script that prints, and looks inside

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from enginecache.cache import EngineCache
from enginecache.config import Config
from enginecache.files.canonical import canonical_json, key_digest
from enginecache.files.units import utc_now
from enginecache.host.devices import Device
from enginecache.host.targets import ComputeCapability, Reach, Target
from enginecache.host.toolchain import Toolchain
from enginecache.key.key import KEY_VERSION
from enginecache.model import ModelSource, identify
from enginecache.pipeline.load import EngineLoader, Loading
from enginecache.pipeline.placement import Placement
from enginecache.pipeline.request import Request
from enginecache.storage.registry.rows import EntryRecord
from enginecache.trt.build.request import BuildRequest, BuiltPlan
from enginecache.trt.load.deserialize import _verified
from enginecache.trt.load.request import Loaded, LoadRequest

EXAMPLE = Path(__file__).parents[1] / "examples" / "cifar.onnx"
SETTLED_S = 2.2
MIB = 1 << 20
PLAN_BYTES = 100 * MIB
SM_89 = ComputeCapability(8, 9)
ASK: dict[str, Any] = {"dims": {"batch": (1, 2, 4)}}


@dataclass
class Row:
    """One figure.

    Attributes:
        name: What was measured.
        seconds: Every run.
        floor: Name of the row that it is compared with; empty for none.
        goal: The goal, for display.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    floor: str = ""
    goal: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, part: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(int(len(ordered) * part), len(ordered) - 1)]


class Table:
    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def add(self, name: str, seconds: Sequence[float], floor: str = "", goal: str = "") -> Row:
        row = self.rows.setdefault(name, Row(name, floor=floor, goal=goal))
        row.seconds.extend(seconds)
        return row

    def interleaved(self, actions: Mapping[str, Callable[[], object]], rounds: int, floor: str = "") -> None:
        """Time each action once a round, one after the other, so that a slow moment hits all of them."""
        for _ in range(rounds):
            for name, action in actions.items():
                started = time.perf_counter()
                action()
                self.add(name, [time.perf_counter() - started], "" if name == floor else floor)

    def show(self) -> None:
        width = max(map(len, self.rows), default=0)
        for row in self.rows.values():
            ratio = f"{row.median / self.rows[row.floor].median:8.2f} x {row.floor}" if row.floor in self.rows else ""
            middle = f"{_time(row.quantile(0.25))} .. {_time(row.quantile(0.75))}, p99 {_time(row.quantile(0.99))}"
            print(f"{row.name:{width}}  {_time(row.median)}  ({middle}){ratio}  {row.goal}")

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {
                "name": row.name,
                "median_s": row.median,
                "p25_s": row.quantile(0.25),
                "p75_s": row.quantile(0.75),
                "p99_s": row.quantile(0.99),
                "runs": len(row.seconds),
                "floor": row.floor,
                "ratio": row.median / self.rows[row.floor].median if row.floor in self.rows else None,
                "goal": row.goal,
            }
            for row in self.rows.values()
        ]


def _time(seconds: float) -> str:
    for factor, unit in ((1.0, "s "), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1:
            return f"{seconds * factor:7.1f} {unit}"
    return f"{seconds * 1e9:7.0f} ns"


class FileBuilder:
    """Writes bytes where TensorRT would build: the caches are compared, and not TensorRT."""

    def __init__(self, size_bytes: int = 4096) -> None:
        self._content = os.urandom(min(size_bytes, MIB)) * max(size_bytes // MIB, 1)

    def build(self, request: BuildRequest, progress: object = None) -> BuiltPlan:  # noqa: ARG002
        request.log_path.touch()
        plan = request.work_dir / "plan"
        plan.write_bytes(self._content)
        return BuiltPlan(plan, 1.0, Reach((SM_89,)), "1.7.1.116")


def place(*_: object, **__: object) -> Placement:
    return Placement(Toolchain("tensorrt-rtx", "1.7.1.116", 13, "linux", "x86_64"), Target((SM_89,)), None, ())


def open_cache(folder: Path, size_bytes: int = 4096) -> EngineCache:
    return EngineCache(Config(dir=folder), builder=FileBuilder(size_bytes), place=place)


def run(*command: object, folder: Path | None = None, quiet: bool = True) -> subprocess.CompletedProcess[bytes]:
    environ = {**os.environ, **({} if folder is None else {"ENGINECACHE_DIR": str(folder)})}
    out = subprocess.DEVNULL if quiet else subprocess.PIPE
    return subprocess.run([str(part) for part in command], check=True, env=environ, stdout=out, stderr=out)


def script() -> str:
    found = Path(sys.executable).with_name("enginecache")
    return str(found) if found.exists() else str(shutil.which("enginecache"))


# Whole processes

BY_HASH = """
import hashlib, sys
print(sys.argv[2] + "/" + hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())
"""
DISKCACHE = """
import hashlib, sys, diskcache
with diskcache.Cache(sys.argv[2]) as cache:
    print(len(cache[hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest()]))
"""
JOBLIB = """
import hashlib, sys, joblib
def build(digest): raise SystemExit("a miss")
build = joblib.Memory(sys.argv[2], verbose=0).cache(build)
print(build.__name__)
"""


def processes(table: Table, rounds: int, folder: Path) -> None:
    """A warm ``enginecache get``, against a Python that does nothing and what others would start."""
    model = folder / "cifar.onnx"
    shutil.copyfile(EXAMPLE, model)
    time.sleep(SETTLED_S)
    get = (script(), "get", model, "--dim", "batch=1:32:64", "--target", "sm_89")
    for _ in range(2):
        run(*get, folder=folder / "cache")
    time.sleep(SETTLED_S)
    for _ in range(2):
        run(*get, folder=folder / "cache")
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    actions: dict[str, Callable[[], object]] = {
        "python -c pass": lambda: run(sys.executable, "-c", "pass"),
        "enginecache get, warm": lambda: run(*get, folder=folder / "cache"),
        "a file named by SHA-256, warm": lambda: run(sys.executable, "-c", BY_HASH, model, folder),
    }
    if importlib.util.find_spec("diskcache"):
        import diskcache  # type: ignore[import-untyped,import-not-found,unused-ignore]

        with diskcache.Cache(str(folder / "diskcache")) as kept:
            kept[digest] = b"vtrt" * 100_000
        actions["diskcache, warm"] = lambda: run(sys.executable, "-c", DISKCACHE, model, folder / "diskcache")
    if importlib.util.find_spec("joblib"):
        actions["joblib.Memory, imported"] = lambda: run(sys.executable, "-c", JOBLIB, model, folder / "joblib")
    table.interleaved(actions, rounds, "python -c pass")
    table.rows["enginecache get, warm"].goal = "at most 3.0"
    cold = {
        "python -c pass ": lambda: run(sys.executable, "-c", "pass"),
        "enginecache --help": lambda: run(script(), "--help"),
        "enginecache get, full path": lambda: run(*get, "--verify-model", folder=folder / "cache"),
    }
    table.interleaved(cold, max(rounds // 3, 3))
    table.rows["enginecache --help"].goal = "at most 250 ms more than python -c pass"


# In one process


def in_process(table: Table, rounds: int, folder: Path, entries: int) -> None:
    """``cache.get`` in a server, from one thread and from eight, with few entries and with many."""
    for count in (10, entries):
        cache = filled(folder / f"with-{count}", count)
        model = linear(folder / "small.onnx")
        time.sleep(SETTLED_S)
        cache.get(model, **ASK)
        time.sleep(SETTLED_S)
        cache.get(model, **ASK)  # notes in the registry that the plan was verified
        time.sleep(SETTLED_S)
        cache.get(model, **ASK)
        for threads in (1, 8):
            row = table.add(f"cache.get, {count:,} entries, {threads} thread{'s'[: threads > 1]}", [])
            row.seconds.extend(_hammered(lambda: cache.get(model, **ASK), threads, 400 * rounds))  # noqa: B023
            row.goal = "p50 at most 50 us, p99 at most 300 us"
    for threads in (1, 8):
        stats = _hammered(lambda: [os.stat(model) for _ in range(4)], threads, 400 * rounds)
        table.add(f"four calls of os.stat, {threads} thread{'s'[: threads > 1]}", stats)
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    peers: dict[str, Callable[[], object]] = {
        "a file named by SHA-256, in process": lambda: hashlib.sha256(model.read_bytes()).hexdigest() and os.stat(model)
    }
    if importlib.util.find_spec("diskcache"):
        import diskcache  # type: ignore[import-untyped,import-not-found,unused-ignore]

        kept = diskcache.Cache(str(folder / "diskcache-in-process"))
        kept[digest] = "/a/path"
        peers["diskcache, in process"] = lambda: kept[hashlib.sha256(model.read_bytes()).hexdigest()]
    if importlib.util.find_spec("joblib"):
        import joblib  # type: ignore[import-untyped,import-not-found,unused-ignore]

        remembered = joblib.Memory(str(folder / "joblib-in-process"), verbose=0).cache(str.upper)
        remembered(digest)
        peers["joblib.Memory, in process"] = lambda: remembered(hashlib.sha256(model.read_bytes()).hexdigest())
    table.interleaved(peers, 20 * rounds)


def _hammered(action: Callable[[], object], threads: int, calls: int) -> list[float]:
    """One thread calls without a rest. Several rest for a millisecond after each call: else the GIL is measured."""
    seconds: list[float] = []

    def call() -> None:
        mine = []
        for _ in range(calls // threads):
            started = time.perf_counter()
            action()
            mine.append(time.perf_counter() - started)
            if threads > 1:
                time.sleep(0.001)
        seconds.extend(mine)

    workers = [threading.Thread(target=call) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return seconds


def linear(path: Path, size: int = 8) -> Path:
    weight = numpy_helper.from_array(np.arange(size * size, dtype=np.float32).reshape(size, size), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", size])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@functools.cache
def filled(folder: Path, count: int) -> EngineCache:
    """A cache with so many entries: rows, plans and records of a few bytes, logs, and notes of use."""
    cache = open_cache(folder)
    cache.make()
    resolved = cache._resolve(Request.of(linear(folder.with_suffix(".onnx")), ASK))  # type: ignore[arg-type]
    fields = resolved.key.fields()
    now = utc_now()
    records = []
    for number in range(count):
        structure, weights = (hashlib.blake2b(f"{what} {number}".encode(), digest_size=32).hexdigest() for what in "sw")
        model = {**fields["model"], "structure": structure, "weights": weights}
        text = canonical_json({**fields, "model": model})
        digest = hashlib.blake2b(f"plan {number}".encode(), digest_size=32).hexdigest()
        records.append(
            EntryRecord(
                key=key_digest(KEY_VERSION, text),
                key_json=text,
                key_version=KEY_VERSION,
                model_digest=structure,
                model_name=f"model-{number}.onnx",
                digest=digest,
                size_bytes=1000 + number,
                backend="tensorrt-rtx",
                tensorrt_version="1.7.1.116",
                compute_capabilities=("8.9",),
                device_name=None,
                driver_version=None,
                build_id=digest[:32],
                build_seconds=1.0 + number % 977,
                created_at=now - dt.timedelta(seconds=number + 3600),
            )
        )
    cache._registry.restore(records)
    for record in records:
        plan = cache.path(record)
        plan.parent.mkdir(exist_ok=True)
        plan.write_bytes(b"plan")
        plan.with_suffix(".json").write_bytes(b"{}")
        cache.root.log_path(record.build_id).touch()
        (cache.root.uses / record.key).touch()
        os.utime(cache.root.uses / record.key, (record.created_at.timestamp(),) * 2)
    return cache


# Loading


def loading(table: Table, rounds: int, folder: Path) -> None:
    """``load`` of a plan of 100 MiB but for the deserialization, against one reading of the file."""
    cache = open_cache(folder / "loading", PLAN_BYTES)
    entry = cache.get(linear(folder / "large.onnx"), **ASK)
    time.sleep(SETTLED_S)
    gpu = Device(0, "GPU", SM_89, 1, MIB, "GPU-1", "00000000:00:01.0", "580.0", (13, 0))

    def handed_over(request: LoadRequest) -> Loaded:
        with _verified("engine", request.path, request.digest) as plan:
            return Loaded(len(plan))

    def loader() -> EngineLoader:
        loading = Loading(trial=lambda *_: None, deserializer=handed_over, find_device=lambda: gpu)
        return EngineLoader(cache._registry, lambda *_: None, loading)

    from enginecache.trt.load import deserialize

    def first() -> None:
        deserialize._VERIFIED.clear()
        loader().load(entry.record, entry.path)

    first()
    floor = f"read {PLAN_BYTES // MIB} MiB"
    table.interleaved({floor: entry.path.read_bytes, "load, first in the process": first}, rounds, floor)
    table.rows["load, first in the process"].goal = "at most 1.3"
    warm = loader()
    for _ in range(2):  # the first notes in the registry that it went well
        warm.load(entry.record, entry.path)
    table.interleaved({"load, later": lambda: warm.load(entry.record, entry.path)}, rounds * 10)
    table.rows["load, later"].goal = "at most 1 ms"


# First sight of a model


def tables_model(path: Path, tensors: int, size_bytes: int, *, external: bool) -> Path:
    """A model of lookups in so many tables; its file, or the one of its external data, which has the tables' bytes."""
    names = [f"w{number}" for number in range(tensors)]
    tables = [
        numpy_helper.from_array(np.frombuffer(os.urandom(size_bytes), np.float32).reshape(-1, 1024), name)
        for name in names
    ]
    graph = helper.make_graph(
        [helper.make_node("Gather", [name, "x"], [f"y{name}"]) for name in names],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("yw0", TensorProto.FLOAT, ["n", 1024])],
        tables,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data = path.with_suffix(".data")
    onnx.save_model(model, path, save_as_external_data=external, location=data.name if external else None)
    return data if external else path


def first_sight(table: Table, rounds: int, folder: Path) -> None:
    """Identity of a model that is not known yet, against BLAKE3's own rate: all threads, over the bytes in memory."""
    for what, tensors, size_bytes, external in (
        ("1 GiB of external weights", 1, 1024 * MIB, True),
        ("256 MiB inline, 64 tensors", 64, 4 * MIB, False),
        ("256 MiB inline, 1 tensor", 1, 256 * MIB, False),
    ):
        path = folder / "sight.onnx"
        content = tables_model(path, tensors, size_bytes, external=external).read_bytes()
        os.sync()  # else the kernel writes it while it is read
        floor = f"BLAKE3 of {what}"
        actions: dict[str, Callable[[], object]] = {
            floor: lambda content=content: blake3.blake3(content, max_threads=blake3.blake3.AUTO).digest(),  # type: ignore[misc]
            f"identity, {what}": lambda path=path: identify(ModelSource(path=path)),  # type: ignore[misc]
        }
        table.interleaved(actions, max(rounds // 2, 5), floor)
        table.rows[f"identity, {what}"].goal = f"at most {1 / 0.7:.2f}" if external else "at most 10"

    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(50_000)]
    values_info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("t0", "t50000")]
    graph = helper.make_graph(nodes, "g", values_info[:1], values_info[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "deep.onnx")
    table.interleaved(
        {"identity, 50,000 nodes": lambda: identify(ModelSource(path=folder / "deep.onnx"))}, max(rounds // 3, 3)
    )
    table.rows["identity, 50,000 nodes"].goal = "under 1.5 s"


# Many entries, large plans, herds


def cold_paths(table: Table, rounds: int, folder: Path, entries: int) -> None:
    """Commands on a large cache, and the publication of a large plan."""
    cache = filled(folder / f"with-{entries}", entries)
    key = cache.entries(limit=1)[0].record.key
    many = cache.root.path
    table.interleaved(
        {
            f"ls --limit 50, {entries:,} entries": lambda: run(script(), "ls", "--limit", "50", folder=many),
            f"show, {entries:,} entries": lambda: run(script(), "show", key, folder=many),
            f"stats, {entries:,} entries": lambda: run(script(), "stats", folder=many),
        },
        max(rounds // 5, 3),
    )
    for row in list(table.rows.values())[-3:]:
        row.goal = "under 600 ms"
    size_bytes = cache.stats().size_bytes
    for what, limit in (("nothing", size_bytes), ("a tenth", size_bytes * 9 // 10), ("half", size_bytes // 2)):
        seconds = planned(many, limit, rounds)
        table.add(f"plan a prune of {entries:,} with their files, {what} goes", seconds, goal="under 2 s")
    for name in ("engines", "uses", "logs"):
        (many / name).rename(folder / name)
    table.add(f"plan a prune of {entries:,}, rows alone", planned(many, size_bytes, rounds), goal="under 2 s")
    for name in ("engines", "uses", "logs"):
        (many / name).rmdir()
        (folder / name).rename(many / name)
    large = open_cache(folder / "large", PLAN_BYTES)
    content = large._publication._builder._content  # type: ignore[attr-defined]

    def write() -> None:
        with (folder / "plain").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    floor = f"write {PLAN_BYTES // MIB} MiB and fsync"
    for _ in range(max(rounds // 3, 5)):
        (folder / "plain").unlink(missing_ok=True)
        started = time.perf_counter()
        write()
        table.add(floor, [time.perf_counter() - started])
        source = folder / "built"
        source.write_bytes(content)  # TensorRT's own writing, which is not part of a publication
        started = time.perf_counter()
        staged = large._storage.blobs.stage(source)
        large._storage.blobs.publish(staged)
        table.add("store a plan of that size", [time.perf_counter() - started], floor, "at most 1.5")
        source.unlink()
        large._storage.blobs.delete(staged.digest)


PLANS = """
import json, sys, time
from enginecache.cli.parameters import open_stored
cache = open_stored(sys.argv[1])
seconds = []
for _ in range(int(sys.argv[3])):
    started = time.perf_counter()
    cache.plan_prune(max_size_bytes=int(sys.argv[2]))
    seconds.append(time.perf_counter() - started)
print(json.dumps(seconds))
"""


def planned(root: Path, limit: int, rounds: int) -> list[float]:
    """Measure how long plans take in a separate process that is set up like the command line's."""
    command = [sys.executable, "-c", PLANS, str(root), str(limit), str(max(rounds // 5, 3))]
    seconds: list[float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return seconds


WAITER = """
import sys, time
from enginecache.cache import EngineCache
from enginecache.config import Config
sys.path.insert(0, sys.argv[1])
from performance import ASK, open_cache
from pathlib import Path
cache = open_cache(Path(sys.argv[2]))
print("ready", flush=True)
cache.get(sys.argv[3], **ASK)
print(repr(time.time()), flush=True)
"""


def herd(table: Table, folder: Path, size: int = 64) -> None:
    """Processes that wait for one build: how long after it is published until the last of them has it."""
    model = linear(folder / "herd.onnx")
    for number in range(5):
        root = folder / f"herd-{number}"
        cache = open_cache(root)
        resolved = cache._resolve(Request.of(model, ASK))  # type: ignore[arg-type]
        with cache._storage.locks.hold(resolved.key.digest, 10.0):  # the builder's place
            command = [sys.executable, "-c", WAITER, str(Path(__file__).parent), str(root), str(model)]
            waiters = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(size)]
            for waiter in waiters:
                assert waiter.stdout is not None
                waiter.stdout.readline()
            time.sleep(3.0)
            cache._publication.build(resolved)
            published = time.time()
        ends = [float(waiter.communicate()[0].strip()) for waiter in waiters]
        table.add(f"the last of {size} waiting processes", [max(ends) - published], goal="at most 250 ms")


# Torch-TensorRT's engine cache


def torch_tensorrt(table: Table, rounds: int, folder: Path, unpacked: Path) -> None:
    """Its hit on a plan of 100 MiB, once its digest of the graph is known, against ours and one reading of the file."""
    path = unpacked / "torch_tensorrt" / "dynamo" / "_engine_cache.py"
    stand_ins: dict[str, dict[str, Any]] = {
        "torch": {"fx": types.SimpleNamespace(GraphModule=object, Graph=object)},
        "torch._inductor": {},
        "torch._inductor.codecache": {"sha256_hash": lambda data: hashlib.sha256(data).hexdigest()},
        "torch_tensorrt": {},
        "torch_tensorrt._Input": {"Input": object},
        "torch_tensorrt.dynamo": {},
        "torch_tensorrt.dynamo._settings": {"_SETTINGS_TO_BE_ENGINE_INVARIANT": (), "CompilationSettings": object},
    }
    with _standing_in(stand_ins):
        spec = importlib.util.spec_from_file_location("engine_cache_of_torch_tensorrt", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    theirs = module.DiskEngineCache(str(folder / "torch"), 1 << 40)
    ours = open_cache(folder / "next-to-torch", PLAN_BYTES)
    model = linear(folder / "torch.onnx")
    entry = ours.get(model, **ASK)
    theirs.insert("0" * 64, (entry.path.read_bytes(), ["x"], ["y"], [], {}, False, False, {}))
    time.sleep(SETTLED_S)
    ours.get(model, **ASK)
    floor = f"read {PLAN_BYTES // MIB} MiB "
    table.interleaved(
        {
            floor: entry.path.read_bytes,
            "Torch-TensorRT's DiskEngineCache.check": lambda: theirs.check("0" * 64),
            "cache.get, and reading the plan": lambda: bytes(ours.get(model, **ASK).path.read_bytes()),
        },
        rounds,
        floor,
    )


@contextlib.contextmanager
def _standing_in(modules: dict[str, dict[str, Any]]) -> Iterator[None]:
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--only", nargs="*", default=())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--torch-tensorrt", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    table = Table()
    with tempfile.TemporaryDirectory(prefix="enginecache-benchmark-") as name:
        folder = Path(name)
        parts: dict[str, Callable[[], None]] = {
            "processes": lambda: processes(table, given.rounds, folder),
            "in-process": lambda: in_process(table, given.rounds, folder, given.entries),
            "loading": lambda: loading(table, given.rounds, folder),
            "first-sight": lambda: first_sight(table, given.rounds, folder),
            "cold": lambda: cold_paths(table, given.rounds, folder, given.entries),
            "herd": lambda: herd(table, folder),
        }
        if given.torch_tensorrt is not None:
            parts["torch-tensorrt"] = lambda: torch_tensorrt(table, given.rounds, folder, given.torch_tensorrt)
        for part, measure in parts.items():
            if not given.only or part in given.only:
                measure()
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {dt.date.today()}")  # noqa: DTZ011
    table.show()
    if given.json is not None:
        given.json.write_text(json.dumps(table.to_json(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
