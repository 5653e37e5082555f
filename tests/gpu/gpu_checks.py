"""Checks of real engines on the GPU of this host, as JSON files. Needs no pytest.

    python tests/gpu/gpu_checks.py OUT [MODEL.onnx ...] [--flips 200] [--jobs 8] [--seed 0]

It builds the small models of the check's tests in FP32 and FP16, and the models that are named, each at the profiles
that its inputs need (dynamic dimensions get 1, 2 and 4), checks the numbers, and writes one line a model to
``OUT/checks.jsonl`` while it runs. Then it flips one byte of a plan at so many places, past the digest check, and
writes what became of each to ``OUT/flips.jsonl``; ``OUT/summary.json`` counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

# An installed enginecache comes first; a bare checkout will do.
sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests/builders"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests/quality"))

import blake3

from enginecache.errors import EngineCacheError
from enginecache.key.options import BuildOptions
from enginecache.key.precision import plan_conversion
from enginecache.key.profiles import Profile, ProfileRequest, resolve_profiles
from enginecache.model import ModelSource, identify
from enginecache.pipeline.placement import place
from enginecache.quality.check import REFERENCE, Checker, CheckOptions, Subject
from enginecache.quality.result import Check
from enginecache.trt.build.process import ProcessBuilder
from enginecache.trt.build.request import BuildRequest
from enginecache.trt.load.request import LoadRequest

ROOT = Path(__file__).resolve().parents[2]

SIZES = (1, 2, 4)
"""Of each dynamic dimension: minimum, optimum, maximum."""


def build(
    folder: Path, model: Any, options: BuildOptions | None = None, profiles: tuple[Profile, ...] | None = None
) -> Subject:
    """Build an engine on this host's GPU, in a new folder.

    Args:
        folder: For the model, the plan and the log.
        model: A ``ModelProto``, or the path of an ONNX file.
        options: Builder options.
        profiles: None for :data:`SIZES`.

    Raises:
        EngineCacheError: It cannot be built.
    """
    folder.mkdir(parents=True)
    if not isinstance(model, Path):
        path = folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        model = path
    options = options or BuildOptions()
    source = ModelSource.of(model)
    identity = identify(source)
    placement = place("auto", None, options=options)
    work = folder / "work"
    work.mkdir()
    request = BuildRequest(
        source=source,
        identity=identity,
        profiles=_profiles(identity.inputs) if profiles is None else profiles,
        options=options,
        toolchain=placement.toolchain,
        target=placement.target,
        device=placement.device,
        work_dir=work,
        log_path=folder / "build.log",
        conversion=plan_conversion(options, placement.toolchain, identity),
    )
    built = ProcessBuilder().build(request)
    device = placement.device
    plan = LoadRequest(
        path=built.plan_path,
        digest=blake3.blake3(built.plan_path.read_bytes()).hexdigest(),
        flavour=placement.toolchain.flavour,
        version=built.loaded_version,
        reach=built.reach,
        tuned_for=None if device is None else device.device_class,
    )
    return Subject(request, plan, device)


def _profiles(inputs: Any) -> tuple[Profile, ...]:
    shapes = {
        entry.name: tuple(tuple(dim if isinstance(dim, int) else size for dim in entry.dims) for size in SIZES)
        for entry in inputs
        if not entry.is_static
    }
    return resolve_profiles(inputs, ProfileRequest((shapes,) if shapes else ()))


def check(subject: Subject, options: CheckOptions | None = None) -> Check:
    """Check an engine, in a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="check-") as folder:
        return Checker().check(subject, options or CheckOptions(), Path(folder))


def damaged(subject: Subject, content: bytes, folder: Path) -> Subject:
    """Return the subject with another plan, whose digest is right: as if no digest were compared."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "damaged.engine"
    path.write_bytes(content)
    return replace(subject, plan=replace(subject.plan, path=path, digest=blake3.blake3(content).hexdigest()))


class OnceChecker(Checker):
    """Computes the reference once, for many plans of one model that are checked in one folder."""

    def __init__(self) -> None:
        super().__init__(timeout_s=60)
        self._reference: dict[str, Any] | None = None

    def run_child(self, module: str, request: dict[str, Any], device: Any) -> dict[str, Any]:
        """Run a child, or return what the last reference was."""
        if module != REFERENCE:
            return super().run_child(module, request, device)
        if self._reference is None:
            self._reference = super().run_child(module, request, device)
        return self._reference


def flips(subject: Subject, folder: Path, count: int, first: int = 0, step: int = 1) -> Iterator[dict[str, Any]]:
    """Check the plan with one byte flipped, at so many places, evenly spread.

    Args:
        subject: The whole plan.
        folder: For what is damaged.
        count: Places in all.
        first: The first of them to try.
        step: From one to the next that is tried.
    """
    content, checker, work = subject.plan.path.read_bytes(), OnceChecker(), folder / "check"
    work.mkdir(parents=True)
    for index in range(first, count, step):
        offset = (2 * index + 1) * len(content) // (2 * count)
        changed = bytearray(content)
        changed[offset] ^= 0xFF
        found = checker.check(damaged(subject, bytes(changed), folder), CheckOptions(), work)
        yield {"offset": offset, "kind": kind_of(found), "verdict": found.verdict, "reason": found.reason}


def kind_of(found: Check) -> str:
    """Return what became of a damaged plan, in a word."""
    if found.verdict == "passed":
        return "computes right"
    if "crashed while it was loaded" in found.reason:
        return "crashed while it was loaded"
    if "crashed while it ran" in found.reason:
        return "crashed while it ran"
    if "did not load" in found.reason:
        return "refused"
    if "did not run" in found.reason:
        return "did not run"
    return "wrong numbers" if found.verdict == "failed" else "not judged"


def main() -> int:
    """Run all of it; exits with 1 where a check in FP32 failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--flips", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    import check_models

    models: dict[str, Any] = {**check_models.good_models(), **{path.name: path for path in arguments.models}}
    models["examples/cifar.onnx"] = ROOT / "examples/cifar.onnx"
    jobs = [(name, model, precision) for name, model in models.items() for precision in ((), ("fp16",))]
    how = CheckOptions(seed=arguments.seed)
    rows, counts = [], Counter[str]()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:

        def run(job: tuple[int, tuple[str, Any, Any]]) -> dict[str, Any]:
            number, (name, model, precision) = job
            return _row(Path(folder) / str(number), name, model, BuildOptions(precision=precision), how)

        with (arguments.out / "checks.jsonl").open("w") as lines:
            for row in pool.map(run, enumerate(jobs)):
                rows.append(row)
                _say(lines, row)
        if arguments.flips:
            subject = build(Path(folder) / "whole", ROOT / "examples/cifar.onnx")

            def flip(number: int) -> list[dict[str, Any]]:
                found = flips(subject, Path(folder) / f"flips{number}", arguments.flips, number, arguments.jobs)
                return [_said(lines, row) for row in found]

            with (arguments.out / "flips.jsonl").open("w") as lines:
                for found in pool.map(flip, range(arguments.jobs)):
                    counts.update(row["kind"] for row in found)
    verdicts = Counter(f"{row['precision']} {row['verdict']}" for row in rows)
    summary = {"verdicts": verdicts, "flips": counts}
    (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2))
    print(json.dumps(summary))
    return int(verdicts["fp32 failed"] > 0)


def _row(folder: Path, name: str, model: Any, options: BuildOptions, how: CheckOptions) -> dict[str, Any]:
    row: dict[str, Any] = {"model": name, "precision": ", ".join(options.precision) or "fp32"}
    began = time.monotonic()
    try:
        subject = build(folder, model, options)
        row["build_s"] = round(time.monotonic() - began, 2)
        began = time.monotonic()
        found = check(subject, how)
        row |= {"check_s": round(time.monotonic() - began, 2), **found.to_json()}
        row["error"] = max((output.error for output in found.worst), default=None)
    except EngineCacheError as error:
        row |= {"verdict": "error", "reason": str(error)[:1000]}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return row


_SHOWN = ("model", "offset", "precision", "verdict", "kind", "error", "build_s", "check_s", "reason")


def _say(lines: Any, row: dict[str, Any]) -> None:
    lines.write(json.dumps(row) + "\n")
    lines.flush()
    print(json.dumps({name: row[name] for name in _SHOWN if name in row}), flush=True)


def _said(lines: Any, row: dict[str, Any]) -> dict[str, Any]:
    _say(lines, row)
    return row


if __name__ == "__main__":
    sys.exit(main())
