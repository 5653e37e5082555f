"""Build models with trained weights in FP32 and FP16, check what each engine computes, and flip bytes of one plan.

    python tests/gpu/trained_models.py MODELS
    python tests/gpu/gpu_trained.py MODELS OUT [--level 1] [--jobs 1] [--flips 200] [--target sm_89]

Writes one JSON line for each engine to ``OUT/checks.jsonl`` while it runs, and one for each flipped byte to
``OUT/flips.jsonl``. Without a GPU, ``--target`` lets TensorRT-RTX build, and the converted graphs are checked.
Each process builds several engines in a row, since a builder of TensorRT 8.6 takes 8 s to start. Keep to one or two
jobs on one GPU: seven builders that started at once took 137 s each (H200, 2026-12-01).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# An installed enginecache comes first; a bare checkout will do.
sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "quality"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "builders"))

import gpu_checks
from trained_models import TRAINED

from enginecache.errors import EngineCacheError
from enginecache.files.plain import from_plain
from enginecache.host.targets import Reach, Target
from enginecache.key.options import BuildOptions
from enginecache.key.profiles import ProfileRequest, resolve_profiles
from enginecache.model import ModelSource, identify
from enginecache.pipeline import placement
from enginecache.quality.check import CheckOptions
from enginecache.trt.build import worker
from enginecache.trt.build.codec import PLAN_NAME, decode_error, encode_request
from enginecache.trt.build.request import BuildRequest, BuiltPlan


class BuilderHere:
    """Builds in this process, one engine after another."""

    def build(self, request: BuildRequest) -> BuiltPlan:
        """Build the plan, as the child process of a build does."""
        sent: list[dict[str, Any]] = []

        class Sink:
            def send(self, report: dict[str, Any]) -> None:
                sent.append(report)

        started = time.monotonic()
        worker.run(encode_request(request), Sink())  # type: ignore[arg-type]
        report = sent[-1]
        if report["event"] == "error":
            raise decode_error(report, request.log_path)
        return BuiltPlan(
            plan_path=request.work_dir / PLAN_NAME,
            build_seconds=time.monotonic() - started,
            reach=from_plain(Reach, report["reach"]),
            loaded_version=report["loaded_version"],
        )


def one(job: tuple[str, str, str, str, int, str]) -> dict[str, Any]:
    """Build and check one engine; returns what was seen."""
    models, folder, name, precision, level, target = job
    gpu_checks.ProcessBuilder = BuilderHere  # type: ignore[misc,assignment]
    if target:
        asked = Target.parse([target])
        gpu_checks.place = lambda *_, options: placement.place("auto", asked, options=options)
    trained, path = TRAINED[name], Path(models) / f"{name}.onnx"
    options = BuildOptions(precision=(precision,) if precision != "fp32" else (), optimization_level=level)
    row: dict[str, Any] = {"model": name, "precision": precision}
    began = time.monotonic()
    try:
        inputs = identify(ModelSource.of(path)).inputs
        profiles = resolve_profiles(inputs, ProfileRequest((trained.shapes,) if trained.shapes else ()))
        subject = gpu_checks.build(Path(folder) / f"{name}-{precision}", path, options, profiles)
        row |= {"build_s": round(time.monotonic() - began, 2), "plan_bytes": subject.plan.path.stat().st_size}
        began = time.monotonic()
        found = gpu_checks.check(subject, CheckOptions(ranges=trained.ranges))
        row |= {"check_s": round(time.monotonic() - began, 2), **found.to_json()}
        row["error"] = max((output.error for output in found.worst), default=None)
    except EngineCacheError as error:
        row |= {"verdict": "error", "reason": str(error)[:2000]}
    except Exception as error:  # noqa: BLE001  # one model's trouble ends nothing
        row |= {"verdict": "bug", "reason": f"{type(error).__name__}: {error}"[:2000]}
    return row


def flip(job: tuple[str, str, int, int, int]) -> list[dict[str, Any]]:
    """Flip every so-many-th byte of the example's plan, and check each."""
    _, folder, count, first, step = job
    options = BuildOptions(optimization_level=1)
    subject = gpu_checks.build(Path(folder) / f"flip{first}", gpu_checks.ROOT / "examples/cifar.onnx", options)
    found = gpu_checks.flips(subject, Path(folder) / f"flips{first}", count, first, step)
    return [row | {"size": subject.plan.path.stat().st_size} for row in found]


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--level", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--flips", type=int, default=0)
    parser.add_argument("--target", default="")
    parser.add_argument("--precision", action="append")
    parser.add_argument("--only", action="append")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    precisions = given.precision or ["fp32", "fp16"]
    context = get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(given.jobs, context) as pool,
    ):
        names = given.only or list(TRAINED)
        jobs = [
            (str(given.models), folder, name, kind, given.level, given.target) for name in names for kind in precisions
        ]
        futures = [pool.submit(one, job) for job in jobs]
        flipping = [
            pool.submit(flip, (str(given.models), folder, given.flips, number, given.jobs))
            for number in range(given.jobs if given.flips else 0)
        ]
        with (given.out / "checks.jsonl").open("w") as lines:
            for future in as_completed(futures):
                gpu_checks._say(lines, future.result())
        with (given.out / "flips.jsonl").open("w") as lines:
            for future in as_completed(flipping):
                for row in future.result():
                    gpu_checks._say(lines, row)


if __name__ == "__main__":
    main()
