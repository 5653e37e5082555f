"""Every operation that writes is killed, or fails, at every system call that changes the file system."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Iterable, Iterator
from itertools import cycle, islice, product
from pathlib import Path

import pytest
from crash_faults import FAULTS, Call, Fault, Tracer, points
from crash_folders import cache_in, write_models
from crash_invariants import assert_holds
from crash_operations import OPERATIONS

from enginecache.files import digest
from enginecache.files.fingerprint import SETTLE_NS

QUICK = 3
"""Cases of each operation in the normal run."""


@pytest.fixture(scope="module")
def tracer() -> Iterator[Tracer]:
    if shutil.which("strace") is None:
        pytest.skip("probe: strace is not installed")
    with Tracer() as tracer, pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "BUFFER_BYTES", 64 << 10)  # plans have 4 KiB here
        write_models(tracer.folder)
        time.sleep(SETTLE_NS / 1e9 + 0.1)  # what is younger is not remembered, and the runs would differ
        yield tracer


TRIES = 5
"""Of one recording or case: on a busy machine a file may become old enough to be remembered during one of the runs."""


class Matrix:
    """The cases of one operation."""

    def __init__(self, tracer: Tracer, name: str) -> None:
        self._tracer = tracer
        self._name = name
        self._operation = OPERATIONS[name]
        self._prepared = tracer.folder / "prepared"
        shutil.rmtree(self._prepared, ignore_errors=True)
        cache_in.cache_clear()  # another folder will have the name of the last one
        self._operation.prepare(self._prepared)
        self._case = tracer.folder / "case"
        self.points = self._recorded()

    def _fresh(self) -> Path:
        shutil.rmtree(self._case, ignore_errors=True)
        return Path(shutil.copytree(self._prepared, self._case, symlinks=True))

    def _recorded(self) -> list[Call]:
        """Return the points of a run without a fault, once two runs in a row have made the same calls."""
        self._tracer.warm(self._name, self._fresh())
        earlier: list[Call] = []
        for _ in range(TRIES):
            try:
                run = self._tracer.run(self._name, self._fresh())
            except PermissionError as error:
                pytest.skip(f"probe: {error}")
            assert (run.status, run.said, run.stderr) == (0, ("done",), ""), run
            assert_holds(self._operation, self._case, is_acknowledged=True)
            found = points(run.calls)
            if found == earlier:
                return found
            earlier = found
        raise AssertionError(f"{self._name} makes other calls each time")

    def try_at(self, call: Call, fault: Fault) -> str:
        """Return what is wrong after the fault; empty if all is well."""
        for _ in range(TRIES):
            case = self._fresh()
            ended = self._tracer.run(self._name, case, fault.options(call), again=not fault.is_lasting)
            same = [seen.place for seen in ended.calls if (seen.name, seen.number) == (call.name, call.number)]
            if same == [call.place]:
                break
        try:
            assert same == [call.place], "the fault was not at the planned call"
            assert ended.status == (-9 if fault.what == "KILL" else 0), ended.status
            assert not any(line.startswith("bad") for line in ended.said), ended.said
            assert ended.stderr == ""
            # Once the fault is over, the same process can do it.
            assert fault.what == "KILL" or fault.is_lasting or ended.is_acknowledged, ended.said
            assert_holds(self._operation, case, is_acknowledged=ended.is_acknowledged)
        except Exception:  # noqa: BLE001  # all of them are listed
            said = "\n    ".join(ended.said)
            return f"{self._name}: {fault} at {call.name} {call.number} of {call.place}\n    {said}\n{_last_lines()}"
        return ""

    def try_all(self, cases: Iterable[tuple[Call, Fault]]) -> None:
        """Raises where something is wrong after one of them."""
        began = time.monotonic()
        found = [self.try_at(call, fault) for call, fault in cases]
        bad = [text for text in found if text]
        print(
            f"{self._name}: {len(self.points)} calls, {len(found)} cases, {len(bad)} bad, "
            f"{time.monotonic() - began:.0f} s"
        )
        assert not bad, "\n".join(bad)


def _last_lines() -> str:
    return "".join(f"    {line}" for line in traceback.format_exc(limit=-2).splitlines(keepends=True)[-6:])


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_fault_at_a_sample_of_the_calls_that_write_loses_nothing(tracer, name):
    matrix = Matrix(tracer, name)
    step = max(len(matrix.points) // QUICK, 1)
    # Not the same faults for each operation.
    faults = islice(cycle(FAULTS), list(OPERATIONS).index(name), None)
    matrix.try_all(zip(matrix.points[::step], faults, strict=False))


@pytest.mark.reliability
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_fault_at_any_call_that_writes_loses_nothing(tracer, name):
    matrix = Matrix(tracer, name)
    matrix.try_all(product(matrix.points, FAULTS))
