"""EngineLoader: when a plan is tried first, what is remembered, and what is raised."""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import blake3
import pytest
from fakes import H100
from records import attempt, entry, fields_of, loads_of

from enginecache.errors import IntegrityError, LoadError, LoadRefusedError, NotCachedError, RegistryError, StoreError
from enginecache.files.canonical import canonical_json
from enginecache.files.mounts import boot_id
from enginecache.files.units import utc_now
from enginecache.host.targets import ComputeCapability
from enginecache.key.options import PluginLibrary
from enginecache.pipeline import load as loading
from enginecache.pipeline.load import EngineLoader, Loading, first_step
from enginecache.storage.registry.database import Database
from enginecache.storage.registry.registry import Registry
from enginecache.storage.registry.rows import LoadRecord
from enginecache.storage.registry.schema import ensure_schema
from enginecache.trt.load.request import Failure, Loaded

ADA = replace(H100, name="NVIDIA L4", compute_capability=ComputeCapability(8, 9), sm_count=58)
INTERNAL = Failure("no_engine", ("Error Code 2: Internal Error",))
ROOT = Path(__file__).parents[1]


class Desk:
    """A loader whose two ways to load do what the test says, on a real registry.

    Attributes:
        tried: Requests that went to a trial.
        loaded: Requests that were loaded here.
        aside: Reasons that the entry was set aside for.
    """

    def __init__(self, folder):
        database = Database(folder / "registry.sqlite")
        ensure_schema(database, 0o600)
        self.registry = Registry(database)
        self.path = folder / "plan.engine"
        self.path.write_bytes(b"a plan")
        self.device, self.trial_gives, self.here_gives = ADA, None, Loaded("an engine")
        self.tried, self.loaded, self.aside = [], [], []
        self.published = 0

    def publish(self, fields=None, **values):
        """An entry of the plan."""
        digest = blake3.blake3(self.path.read_bytes()).hexdigest()
        json_text = canonical_json({**fields_of("a"), **(fields or {})})
        self.published += 1
        record = entry("a", self.published, **{"digest": digest, "key_json": json_text, **values})
        self.registry.start_build(attempt("a", self.published))
        self.registry.publish(record)
        return record

    def load(self, record, **asked):
        def trial(request, _device):
            self.tried.append(request)
            return self.trial_gives

        def deserialize(request):
            self.loaded.append(request)
            return self.here_gives

        def set_aside(_record, reason):
            self.aside.append(reason)

        loader = EngineLoader(self.registry, set_aside, Loading(trial, deserialize, lambda: self.device))
        return loader.load(record, self.path, **asked)

    def refusal(self, record, kind, **asked):
        with pytest.raises(kind) as caught:
            self.load(record, **asked)
        assert type(caught.value) is kind
        return caught.value

    def counts(self):
        return len(self.tried), len(self.loaded)

    def outcomes(self, record):
        return [load.outcome for load in loads_of(self.registry, record.digest)]


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory):
    return Desk(tmp_path_factory.mktemp("registry")).path.with_name("registry.sqlite")


@pytest.fixture
def desk(tmp_path, empty_registry):
    shutil.copy(empty_registry, tmp_path)
    return Desk(tmp_path)


# When there is a trial


def test_first_load_is_tried_in_a_child_and_the_second_is_not(desk):
    record = desk.publish()
    assert desk.load(record) == "an engine"
    assert desk.load(record) == "an engine"
    assert desk.counts() == (1, 2)
    (row,) = loads_of(desk.registry, record.digest)
    assert (row.device, row.toolchain, row.driver) == ("NVIDIA L4, 58 SMs", "tensorrt-rtx 1.7.1.116", "580.65.06")
    assert (row.outcome, row.reason, row.boot) == ("loaded", "", boot_id())


def test_load_of_what_is_known_writes_nothing(desk):
    record = desk.publish()
    desk.load(record)
    (before,) = loads_of(desk.registry, record.digest)
    desk.load(record)
    assert loads_of(desk.registry, record.digest) == [before]


@pytest.mark.parametrize(
    "changed",
    [{"driver_version": "590.1"}, {"name": "NVIDIA L40S"}, {"sm_count": 60}],
    ids=["driver", "device", "multiprocessors"],
)
def test_another_driver_or_class_of_gpu_is_tried_anew(desk, changed):
    record = desk.publish()
    desk.load(record)
    desk.device = replace(ADA, **changed)
    desk.load(record)
    assert len(desk.tried) == 2


def test_plan_that_this_host_built_and_never_loaded_is_tried(desk):
    record = desk.publish(device_name=ADA.name)
    (build,) = desk.registry.builds(record.key)
    assert build.host == "here"
    desk.load(record)
    assert desk.counts() == (1, 1)


@pytest.mark.parametrize(("now", "tried"), [("the same", 0), ("another host, or after a reboot", 1), ("", 1)])
def test_that_a_plan_was_loaded_counts_in_the_same_boot_of_the_same_host_alone(desk, monkeypatch, now, tried):
    record = desk.publish()
    monkeypatch.setattr(loading, "boot_id", lambda: now and "the same")
    desk.load(record)
    desk.tried.clear()
    monkeypatch.setattr(loading, "boot_id", lambda: now)
    desk.load(record)
    assert len(desk.tried) == tried


def test_a_lasting_refusal_counts_on_every_host_of_the_class(desk, monkeypatch):
    record, desk.trial_gives = desk.publish(compute_capabilities=("9.0",)), INTERNAL
    desk.refusal(record, LoadRefusedError)
    monkeypatch.setattr(loading, "boot_id", lambda: "another host")
    desk.refusal(record, LoadRefusedError)
    assert len(desk.tried) == 1


def test_what_this_process_has_loaded_is_not_asked_of_the_registry(desk, monkeypatch):
    record = desk.publish()
    loader = EngineLoader(desk.registry, desk.aside.append, Loading(lambda *_: None, lambda _: Loaded(1), lambda: ADA))
    loader.load(record, desk.path)
    monkeypatch.setattr(desk.registry, "find_load", lambda *_: pytest.fail("asked"))
    assert loader.load(record, desk.path) == 1


@pytest.mark.parametrize(
    ("known", "auto", "never", "always"),
    [
        (None, "try", "load", "try"),
        ("loaded", "load", "load", "try"),
        ("refused", "raise", "raise", "try"),
        ("bad", "raise", "raise", "try"),
    ],
)
def test_first_step_is_decided_by_what_is_known_and_the_policy(known, auto, never, always):
    assert [first_step(known, policy) for policy in ("auto", "never", "always")] == [auto, never, always]


def test_without_a_known_gpu_every_load_is_tried_and_nothing_is_remembered(desk):
    record, desk.device = desk.publish(), None
    desk.load(record)
    desk.load(record)
    assert desk.counts() == (2, 2)
    assert desk.outcomes(record) == []


# What a failure does


@pytest.mark.parametrize("kind", ["crash", "no_engine", "exception"])
def test_plan_that_fails_its_trial_is_set_aside_and_never_loaded_here(desk, kind):
    record, desk.trial_gives = desk.publish(), Failure(kind, ("line one", "line two"))
    error = desk.refusal(record, LoadError)
    assert f"TensorRT did not load the engine {desk.path}: " in error.what
    assert "line one; line two" in error.what
    assert desk.counts() == (1, 0)
    (reason,) = desk.aside
    assert reason in error.what
    (row,) = loads_of(desk.registry, record.digest)
    assert row.outcome == "bad"
    assert row.reason.splitlines()[1:] == ["line one", "line two"]


def test_bad_plan_whose_bytes_were_built_again_is_an_error_at_once_until_it_is_tried_again(desk):
    record, desk.trial_gives = desk.publish(), Failure("crash")
    desk.refusal(record, LoadError, trial="always")
    error = desk.refusal(record, LoadError)
    assert "builds the same bytes again" in error.fix
    assert (len(desk.tried), len(desk.aside)) == (1, 1)
    desk.trial_gives = None
    assert desk.load(record, trial="always") == "an engine"
    assert len(desk.tried) == 2
    assert desk.outcomes(record) == ["loaded"]


def test_plan_for_another_gpu_is_refused_once_by_tensorrt_and_then_from_memory(desk):
    record, desk.device = desk.publish(compute_capabilities=("8.9",)), H100
    desk.trial_gives = Failure("no_engine", ("The engine cannot run on this GPU",), ("UNSUPPORTED_CC",))
    first = desk.refusal(record, LoadRefusedError)
    second = desk.refusal(record, LoadRefusedError)
    for error in (first, second):
        assert "The engine cannot run on this GPU" in error.what
    assert "0 min ago" in second.what
    assert "trial='always'" in second.fix
    assert desk.counts() == (1, 0)
    assert desk.aside == []
    desk.trial_gives = None
    assert desk.load(record, trial="always") == "an engine"
    assert desk.outcomes(record) == ["loaded"]


def test_old_refusal_tells_its_age_in_hours(desk):
    record = desk.publish()
    row = ("NVIDIA L4, 58 SMs", "tensorrt-rtx 1.7.1.116", "580.65.06", "refused", "why\nline")
    desk.registry.record_load(LoadRecord(record.digest, *row, utc_now() - dt.timedelta(hours=5)))
    error = desk.refusal(record, LoadRefusedError)
    assert error.what.endswith("5 h ago, on this class of GPU and this driver: why")


@pytest.mark.parametrize(
    "failure",
    [
        Failure("killed"),
        Failure("timeout"),
        Failure("memory"),
        Failure("toolchain", what="no module"),
        Failure("no_engine", ("cudaError 35",)),
        Failure("no_engine", ("could not find plugin X version 1",)),
    ],
    ids=["killed", "timeout", "memory", "toolchain", "driver", "plugin"],
)
def test_refusal_that_may_pass_is_not_remembered_and_sets_nothing_aside(desk, failure):
    record, desk.trial_gives = desk.publish(), failure
    desk.refusal(record, LoadRefusedError)
    desk.refusal(record, LoadRefusedError)
    assert desk.counts() == (2, 0)
    assert (desk.aside, desk.outcomes(record)) == ([], [])


def test_failure_here_after_a_trial_that_went_well_is_not_the_plans(desk):
    record, desk.here_gives = desk.publish(), INTERNAL
    assert "this process must be to blame" in desk.refusal(record, LoadRefusedError).what
    assert desk.aside == []


def test_failure_here_without_a_trial_is_judged(desk):
    record, desk.here_gives, desk.trial_gives = desk.publish(), INTERNAL, INTERNAL
    desk.refusal(record, LoadError, trial="never")
    assert (len(desk.tried), len(desk.aside)) == (1, 1)


def test_failure_here_of_what_a_fresh_process_loads_is_no_fault_of_the_plan(desk):
    record, desk.here_gives = desk.publish(), INTERNAL
    desk.refusal(record, LoadRefusedError, trial="never")
    assert (len(desk.tried), desk.aside) == (1, [])


def test_bad_plan_that_cannot_be_set_aside_is_still_told(desk):
    record = desk.publish()

    def set_aside(*_):
        raise StoreError("the folder is read-only")

    loading_plan = Loading(lambda *_: INTERNAL, find_device=lambda: ADA)
    loader = EngineLoader(desk.registry, set_aside, loading_plan)
    with pytest.raises(LoadError, match=r"Internal Error\nIt could not be set aside: the folder is read-only"):
        loader.load(record, desk.path)


def test_registry_that_fails_stops_no_load(desk, monkeypatch):
    record = desk.publish()

    def fail(*_, **__):
        raise RegistryError("disk I/O error")

    for name in ("find_load", "record_load"):
        monkeypatch.setattr(desk.registry, name, fail)
    assert desk.load(record) == "an engine"
    desk.trial_gives = Failure("crash")
    desk.refusal(record, LoadError)


def test_changed_bytes_are_an_integrity_error_and_no_outcome(desk):
    record = desk.publish()
    desk.path.write_bytes(b"a plam")
    loader = EngineLoader(desk.registry, lambda *_: pytest.fail("set aside"), Loading(find_device=lambda: ADA))
    for trial in ("auto", "never"):
        with pytest.raises(IntegrityError) as caught:
            loader.load(record, desk.path, trial=trial)
        assert not isinstance(caught.value, LoadError)
    assert desk.outcomes(record) == []


@pytest.mark.parametrize("trial", ["auto", "never"])
def test_plan_that_was_deleted_after_it_was_handed_out_is_not_cached_any_more(desk, trial):
    record = desk.publish()
    desk.path.unlink()
    loader = EngineLoader(desk.registry, lambda *_: pytest.fail("set aside"), Loading(find_device=lambda: ADA))
    with pytest.raises(NotCachedError, match="was deleted after it was handed out"):
        loader.load(record, desk.path, trial=trial)
    assert desk.outcomes(record) == []


# What TensorRT is given


def test_request_says_what_the_row_says(desk, monkeypatch):
    monkeypatch.chdir(desk.path.parent)
    desk.path = Path("plan.engine")
    plugin = PluginLibrary(Path("/lib.so"), "1" * 64)
    target = {"device": {"name": "NVIDIA L4", "sm_count": 58}}
    record = desk.publish(fields={"target": target}, compute_capabilities=("8.0+",), tensorrt_version="10.0.1.6")
    desk.load(record, plugins=[plugin])
    (request,) = desk.tried
    assert desk.loaded == [request]
    assert request.path == Path.cwd() / "plan.engine"
    assert (request.digest, request.flavour, request.version) == (record.digest, "tensorrt-rtx", "10.0.1.6")
    assert (request.reach, request.tuned_for) == (record.reach, "NVIDIA L4, 58 SMs")
    assert (request.plugins, request.is_version_compatible, request.allows_host_code) == ((plugin,), False, False)


@pytest.mark.parametrize(
    ("compatible", "trusted", "is_allowed"), [(True, False, False), (True, True, True), (False, True, False)]
)
@pytest.mark.parametrize("trial", ["auto", "never", "always"])
def test_host_code_may_run_only_in_a_version_compatible_plan_that_the_caller_trusts(
    desk, compatible, trusted, is_allowed, trial
):
    record = desk.publish({"options": {"version_compatible": compatible}})
    desk.load(record)
    desk.load(record, trusted=trusted, trial=trial)
    assert {request.allows_host_code for request in (desk.loaded[1], *desk.tried[1:])} == {is_allowed}


def test_warnings_of_a_good_load_are_logged(desk, caplog):
    record, desk.here_gives = desk.publish(), Loaded("an engine", ("across different models of devices",))
    with caplog.at_level(logging.WARNING, "enginecache"):
        desk.load(record)
    assert caplog.messages == ["TensorRT, loading a.onnx: across different models of devices"]


# With TensorRT itself

SCRIPT = """
import json, sys
from pathlib import Path
import test_loader
from enginecache.pipeline.load import EngineLoader, Loading
desk = test_loader.Desk(Path(sys.argv[1]))
said = []
for text in ("engine", "crash|reading weights", "none|not mine", "engine"):
    desk.path.write_text(text)
    record = desk.publish()
    set_aside = lambda record, reason: desk.aside.append(reason)
    loader = EngineLoader(desk.registry, set_aside, Loading(find_device=lambda: test_loader.ADA))
    try:
        said.append(loader.load(record, desk.path))
    except Exception as error:
        said.append([type(error).__name__, error.what])
print(json.dumps([said, desk.aside]))
"""


@pytest.mark.rtx
def test_plan_that_crashes_tensorrt_leaves_this_process_alive_and_is_set_aside(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="probe: no module tensorrt_rtx")
    tests = ROOT / "tests"
    path = [tests / "runtimes" / "data", tests, tests / "support", ROOT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True, check=True, env=environment
    )
    said, aside = json.loads(ran.stdout)
    assert (said[0], said[3]) == ("an engine", "an engine")
    assert [kind for kind, _ in said[1:3]] == ["LoadError", "LoadError"]
    assert said[1][1].endswith("ended by SIGSEGV: reading weights")
    assert said[2][1].endswith(": the header check says MALFORMED_ENGINE; not mine")
    assert len(aside) == 2
