"""One check: the reference, then the engine on a GPU or the converted graph on the CPU, then the comparison.

Each of the three computations runs in a child process, so that a crash, or a model that takes all memory, is a sentence
in the result. The comparison is made here. Nothing is written but into the folder that the caller gives.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from enginecache.environment import passed, snapshot
from enginecache.errors import (
    CheckUnavailableError,
    EngineCacheError,
    ModelChangedError,
    OptionError,
    StoreError,
    shown,
)
from enginecache.files.os_errors import describe_os_error
from enginecache.files.plain import from_plain, to_plain
from enginecache.files.units import time_json, utc_now
from enginecache.host.devices import Device
from enginecache.key.profiles import Profile
from enginecache.model import ModelInput, ModelSource, has_changed
from enginecache.quality.compare import compare, tolerance_for
from enginecache.quality.inputs import Point, Range, check_ranges, point_of_file, points_of
from enginecache.quality.result import Check, CheckVerdict, PointNumbers
from enginecache.trt.build.codec import MODEL_NAME, encode_request
from enginecache.trt.build.request import BuildRequest
from enginecache.trt.child import (
    child_environment,
    describe_status,
    is_from_outside,
    is_out_of_memory,
    running_worker,
    tail_of,
)
from enginecache.trt.interpreter import Interpreter, environment_for, run_with
from enginecache.trt.load.request import Failure, LoadRequest, driver_of
from enginecache.trt.load.verdict import judge
from enginecache.trt.messages import clean_lines

REFERENCE = "enginecache.quality.reference"
EXECUTE = "enginecache.quality.execute"
CONVERT = "enginecache.quality.convert"

EXECUTE_TIMEOUT_S = 600.0
"""An engine that has not ended by then stands still: a damaged byte may make a kernel wait forever."""

_INSTALL = "Install what a check needs: pip install 'onnxruntime>=1.23' 'cuda-bindings>=12.8'"
_GIVE_INPUTS = (
    "Give inputs that matter with --inputs (a file of numpy.savez, one array for each input), or the range of an "
    "input's values with --input-range (NAME=LOW:HIGH)."
)


@dataclass(frozen=True)
class CheckOptions:
    """Options of a check. None of them is in a key.

    Attributes:
        inputs: ``.npz`` files, each with an array for every input; none makes inputs from the seed.
        ranges: Smallest and largest value by input, both included.
        seed: What inputs are made from.
        max_error: The largest error that passes, of the largest value of the reference; None is the default of the
            engine's precision.
    """

    inputs: tuple[Path, ...] = ()
    ranges: Mapping[str, Range] = field(default_factory=dict)
    seed: int = 0
    max_error: float | None = None

    @classmethod
    def of(cls, options: object) -> CheckOptions:
        """Return the options; the defaults for None.

        Raises:
            OptionError: They are something else.
        """
        if options is None:
            return cls()
        if not isinstance(options, cls):
            raise OptionError(f"check: {shown(options)} is not True, False or CheckOptions", "Give one of these.")
        return options

    def require_valid(self) -> None:
        """Refuse values that no check can have.

        Raises:
            OptionError: The seed or the tolerance is out of range.
        """
        if not 0 <= self.seed < 1 << 63:
            raise OptionError(f"the seed {self.seed} is negative or too large", "Give a number from 0.")
        if self.max_error is not None and not 0 <= self.max_error < float("inf"):
            fix = "Give the largest error that passes, of the largest value of an output, such as 0.02."
            raise OptionError(f"max_error: {self.max_error} is not a tolerance", fix)


@dataclass(frozen=True)
class Subject:
    """A plan to check, and everything that it was made from.

    Attributes:
        build: What the plan was built from: model, profiles, options, conversion.
        plan: The plan.
        device: The GPU to run it on; None where there is none that it runs on: then its converted graph is checked.
        converted: The converted graph that it was built from; None where that was deleted.
    """

    build: BuildRequest
    plan: LoadRequest
    device: Device | None
    converted: Path | None = None


def require_packages(device: Device | None) -> None:
    """Refuse a check for which something is not installed; before a build, whose engine could not be checked.

    Args:
        device: The GPU that the engine is to run on, or None.

    Raises:
        CheckUnavailableError: So it is.
    """
    for module, name, is_needed in (
        ("onnxruntime", "ONNX Runtime", True),
        ("cuda.bindings", "cuda-bindings", device is not None),
    ):
        if is_needed and not _is_installed(module):
            raise CheckUnavailableError(f"the numbers cannot be checked: {name} is not installed", _INSTALL)


def _is_installed(module: str) -> bool:
    with contextlib.suppress(ImportError, ValueError):
        return find_spec(module) is not None
    return False


def plan_points(options: CheckOptions, inputs: Sequence[ModelInput], profiles: Sequence[Profile]) -> tuple[Point, ...]:
    """Return the inputs to check with.

    Raises:
        OptionError: A file or range does not fit the model.
    """
    options.require_valid()
    check_ranges(inputs, options.ranges)
    if options.inputs:
        return tuple(point_of_file(path, inputs, profiles) for path in options.inputs)
    return points_of(inputs, profiles)


class Checker:
    """Checks engines. Safe across threads; each check needs a folder of its own.

    Args:
        python: The interpreter of the child processes; default: this one.
        also: Names of further variables that they are given.
        timeout_s: After so many seconds an engine that runs is ended, and has failed. The reference has no limit.
    """

    def __init__(
        self, python: str | None = None, also: Sequence[str] = (), timeout_s: float = EXECUTE_TIMEOUT_S
    ) -> None:
        self._python = python
        self._also = also
        self.timeout_s = timeout_s

    def check(self, subject: Subject, options: CheckOptions, folder: Path) -> Check:
        """Check the numbers of one plan. Blocks; the reference alone takes as long as the model takes on the CPU.

        Args:
            subject: What is checked.
            options: How.
            folder: An empty, private folder; arrays go there, and stay.

        Returns:
            What was found, with verdict ``uninformative`` where the reference cannot be computed, or nothing can be
            compared with it.

        Raises:
            OptionError: A file of inputs or a range does not fit the model.
            ModelChangedError: The model's files are no longer those of its identity.
            CheckUnavailableError: ONNX Runtime or cuda-bindings is not installed.
            InterpreterError: There is no Python to run a child with.
            StoreError: The folder cannot be written, or was deleted meanwhile.
        """
        require_packages(subject.device)
        try:
            return _Run(self, subject, options, folder).check()
        except OSError as error:
            if isinstance(error, EngineCacheError):
                raise
            what, fix = describe_os_error(error, "the arrays of a check cannot be written or read", folder)
            raise StoreError(what, fix) from error

    def run_child(self, module: str, request: dict[str, Any], device: Device | None) -> dict[str, Any]:
        """Run a child, and return its last report; ``event`` is ``died`` or ``timeout`` where it gave none.

        Raises:
            InterpreterError: There is no Python to run it with.
        """
        environment = child_environment(device, passed(snapshot(), self._also))
        timeout_s = self.timeout_s if module == EXECUTE else math.inf
        return run_with(self._python, lambda python: _report_of(module, request, python, environment, timeout_s))


def _report_of(
    module: str, request: dict[str, Any], interpreter: Interpreter, environment: dict[str, str], timeout_s: float
) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        try:
            log = stack.enter_context(os.fdopen(os.memfd_create("check", os.MFD_CLOEXEC), "w+b", buffering=0))
            worker = stack.enter_context(
                running_worker(
                    module,
                    request,
                    python=interpreter.path,
                    environment=environment_for(interpreter, environment),
                    folder="/",  # where no model lies, and no module next to it
                    log=log,
                )
            )
        except OSError as error:
            what, _ = describe_os_error(error, "a child process cannot be started")
            return {"event": "failed", "what": what}
        last: dict[str, Any] = {}
        deadline = time.monotonic() + timeout_s
        for report in worker.reports():
            if report is None and time.monotonic() > deadline:
                return {"event": "timeout", "what": f"it did not end within {timeout_s:.0f} s"}
            if report is not None:
                last = report
                if report["event"] not in {"deserializing", "running"}:
                    return {**report, "log": tail_of(log)}
        status, tail = worker.wait(), tail_of(log)
        not_ready = worker.not_ready(status, tail)
        if not_ready is not None:
            raise not_ready
        what = f"its process ended {describe_status(status)}"
        if is_out_of_memory(tail) or is_from_outside(status, tail):
            return {"event": "failed", "what": f"{what}: out of memory, or ended from outside"}
        if status >= 0:  # an exception, of a full disk for one: no engine ends a process so
            return {"event": "failed", "what": f"{what}: {tail[-1] if tail else 'without a word'}"}
        return {"event": "died", "what": what, "after": last.get("event", "")}


def _explained(report: dict[str, Any]) -> str:
    """Return what a child reported, with the last line that TensorRT logged there."""
    lines = clean_lines(report.get("log", ()))
    return f"{report['what']}; its last line: {lines[-1]}" if lines else str(report["what"])


class _Inconclusive(Exception):  # noqa: N818  # never leaves this module
    """Nothing can be compared: why."""


class _Wrong(Exception):  # noqa: N818  # never leaves this module
    """The engine is wrong whatever it computes: why."""


class _Run:
    """One check under way."""

    def __init__(self, checker: Checker, subject: Subject, options: CheckOptions, folder: Path) -> None:
        self._checker, self._subject, self._folder = checker, subject, folder
        build = subject.build
        self._points = plan_points(options, build.identity.inputs, build.profiles)
        self._options = options
        flags = build.options.builder_flags
        limit = options.max_error
        self._tolerance = tolerance_for(build.options.precision, flags) if limit is None else limit
        self._reference = "onnxruntime"
        self._inputs: tuple[tuple[str, str], ...] = ()

    def check(self) -> Check:
        try:
            self._require_comparable()
            expected = self._compute_reference()
            if self._subject.device is not None:
                self._run_engine(expected["outputs"])
            else:
                self._compute_graph(expected["outputs"])
        except _Inconclusive as error:
            return self._result("uninformative", str(error))
        except _Wrong as error:
            return self._result("failed", str(error))
        return self._judged(expected)

    def _require_comparable(self) -> None:
        build = self._subject.build
        if build.options.strip_plan:
            raise _Inconclusive("a stripped plan has no weights, and computes nothing before it is refitted")
        if self._subject.device is None and build.conversion is None:
            message = "no GPU that runs the engine is here, and its graph is the model's own: there is nothing to "
            raise _Inconclusive(f"{message}compare. Check it on a GPU.")

    def _compute_reference(self) -> dict[str, Any]:
        source, options = self._subject.build.source, self._options
        report = self._checker.run_child(
            REFERENCE,
            {
                **_source_fields(source, self._folder),
                "graph": None,
                "points": [point.to_json() for point in self._points],
                "ranges": {name: list(limits) for name, limits in options.ranges.items()},
                "seed": options.seed,
                "tolerance": self._tolerance,
                "folder": str(self._folder),
            },
            None,
        )
        build = self._subject.build
        if has_changed(build.source, build.identity):
            message = f"{build.source.name} or its external data changed since its engine was asked for"
            raise ModelChangedError(message, "Run it again when nothing writes to them.")
        if report["event"] != "done":
            raise _Inconclusive(f"ONNX Runtime did not compute the model: {report['what']}")
        self._reference = report["version"]
        self._inputs = tuple((name, source) for name, source in report["inputs"])
        return report

    def _compute_graph(self, outputs: Sequence[str]) -> None:
        report = self._checker.run_child(
            REFERENCE,
            {
                "graph": str(self._converted()),
                "points": [point.to_json() for point in self._points],
                "folder": str(self._folder),
            },
            None,
        )
        if report["event"] != "done":
            raise _Inconclusive(f"ONNX Runtime did not compute the converted graph: {report['what']}")
        if report["outputs"] != list(outputs):
            raise _Wrong(f"the converted graph has other outputs: {', '.join(report['outputs'])}")

    def _converted(self) -> Path:
        if self._subject.converted is not None:
            return self._subject.converted
        build = self._subject.build
        folder = self._folder / "conversion"
        folder.mkdir()
        if build.source.data is not None:
            (folder / MODEL_NAME).write_bytes(build.source.data)
        request = encode_request(build)
        request |= {"work_dir": str(folder), "log_path": str(folder / "log"), "has_timing_cache": False}
        report = self._checker.run_child(CONVERT, {"build": request}, None)
        if report["event"] != "done":
            raise _Inconclusive(f"the graph could not be converted again: {report['what']}")
        return Path(report["path"])

    def _run_engine(self, outputs: Sequence[str]) -> None:
        subject = self._subject
        report = self._checker.run_child(
            EXECUTE,
            {
                "plan": to_plain(subject.plan),
                "points": [point.to_json() for point in self._points],
                "outputs": list(outputs),
                "folder": str(self._folder),
            },
            subject.device,
        )
        event = report["event"]
        if event == "not_loaded":
            verdict = judge(subject.plan, subject.device, from_plain(Failure, report["failure"]))
            what = f"TensorRT did not load the engine: {verdict.reason}"
            raise _Wrong(what) if verdict.outcome == "bad" else _Inconclusive(what)
        if event in {"no_run", "timeout"}:
            raise _Wrong(f"the engine did not run: {_explained(report)}")
        if event == "died" and report["after"]:
            doing = "was loaded" if report["after"] == "deserializing" else "ran"
            raise _Wrong(f"the engine crashed while it {doing}: {report['what']}")
        if event != "done":
            raise _Inconclusive(f"the engine could not be run: {_explained(report)}")

    def _judged(self, expected: Mapping[str, Any]) -> Check:
        from enginecache.quality.reference import load_arrays

        points = []
        for index, point in enumerate(self._points):
            pairs = zip(
                expected["outputs"],
                load_arrays(self._folder / f"expected-{index}.npz"),
                load_arrays(self._folder / f"found-{index}.npz"),
                strict=True,
            )
            shapes = {entry.name: entry.shape for entry in point.inputs}
            sure = expected["probabilities"]
            outputs = tuple(compare(name, right, found, float(name in sure)) for name, right, found in pairs)
            points.append(PointNumbers(point.profile, point.at, shapes, outputs))
        if expected["random"]:
            what = f"the model computes with random numbers ({', '.join(expected['random'])})"
            return self._result("uninformative", what, points)
        bad = [
            f"{output} at {_place(point, len(self._subject.build.profiles))}"
            for point in points
            for output in point.outputs
            if not output.is_within(self._tolerance)
        ]
        if bad:
            more = f", and {len(bad) - 3} more" if len(bad) > 3 else ""
            return self._result("failed", f"{'; '.join(bad[:3])}{more}; tolerance {self._tolerance:g}", points)
        if not expected["varies"]:
            what = "the reference's outputs are the same for two seeds, as a wrong engine's may be"
            return self._result("uninformative", f"{what}. {_GIVE_INPUTS}", points)
        return self._result("passed", "", points)

    def _result(self, verdict: CheckVerdict, reason: str, points: Sequence[PointNumbers] = ()) -> Check:
        device = self._subject.device
        return Check(
            verdict=verdict,
            scope="graph" if device is None else "engine",
            digest=self._subject.plan.digest,
            reference=self._reference,
            seed=self._options.seed,
            tolerance=self._tolerance,
            reason=reason,
            inputs=self._inputs,
            points=tuple(points),
            checked_at=time_json(utc_now()) or "",
            device=None if device is None else device.name,
            driver=None if device is None else driver_of(device),
        )


def _source_fields(source: ModelSource, folder: Path) -> dict[str, Any]:
    """Return what a child opens the model with; bytes go through a file."""
    if source.path is not None:
        return {"path": str(source.path), "data": None, "base_dir": None}
    data = folder / MODEL_NAME
    data.write_bytes(source.data or b"")
    return {"path": None, "data": str(data), "base_dir": None if source.base_dir is None else str(source.base_dir)}


def _place(point: PointNumbers, profiles: int) -> str:
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in point.shapes.items())
    of = f"{point.at} of profile {point.profile}" if profiles > 1 else point.at
    return f"{of} ({shapes})"
