"""A plan in this process: with the genuine TensorRT-RTX, and with the names that five releases list."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from listed_runtime import DIAGNOSTICS, RELEASES, SEVERITIES, ListedRelease
from load_requests import request_for, scripted

from enginecache.errors import IntegrityError
from enginecache.key.options import PluginLibrary
from enginecache.trt.load import deserialize as module
from enginecache.trt.load.deserialize import deserialize
from enginecache.trt.load.logs import LoadLog, make_logger
from enginecache.trt.load.request import Failure, Loaded


@pytest.mark.rtx
def test_genuine_plan_without_a_driver_fails_with_the_errors_of_this_loading_alone(rtx_plan, no_driver):
    first, second = deserialize(request_for(rtx_plan)), deserialize(request_for(rtx_plan))
    assert first == second
    assert first.kind == "no_engine"
    assert any("cudaError 35" in line for line in first.lines)
    assert first.diagnostics == ("INVALID",)


@pytest.mark.rtx
def test_header_of_a_file_that_is_no_plan_is_malformed(tmp_path, no_driver):
    pytest.importorskip("tensorrt_rtx", reason="probe: no module tensorrt_rtx")
    assert deserialize(scripted(tmp_path, "junk" * 100)).diagnostics == ("MALFORMED_ENGINE",)


@pytest.mark.rtx
def test_plan_of_another_version_is_not_shown_to_tensorrt(rtx_plan):
    failure = deserialize(request_for(rtx_plan, version="1.6.0.1"), before=lambda: pytest.fail("it was shown"))
    assert failure == Failure("version", what="it was built by TensorRT-RTX 1.6.0.1, and 1.7.1.116 is here")


def test_damaged_bytes_of_the_right_size_are_an_integrity_error_before_tensorrt_is_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_module", lambda _: pytest.fail("TensorRT was imported"))
    request = scripted(tmp_path, "a plan")
    request.path.write_text("a plam")
    with pytest.raises(IntegrityError, match=f"not {request.digest[:12]}"):
        deserialize(request)


@pytest.mark.parametrize(("make", "reason"), [(lambda p: p.touch(), "is empty"), (lambda p: None, "No such file")])
def test_plan_that_is_empty_or_gone_is_an_integrity_error(tmp_path, make, reason):
    make(tmp_path / "plan")
    with pytest.raises(IntegrityError, match=reason):
        deserialize(request_for(tmp_path / "plan"))


# The names of five releases; see listed_runtime.


@pytest.fixture(params=RELEASES)
def listed(request, monkeypatch):
    return ListedRelease(monkeypatch, request.param)


def test_every_release_is_given_the_mapped_file_itself(listed, tmp_path):
    listed.logged = [("WARNING", "slow"), ("INFO", "loaded"), ("ERROR", "worked around"), ("VERBOSE", "tactic")]
    assert listed.load(tmp_path) == Loaded("an engine", ("worked around", "slow"))
    assert listed.given == [(b"a plan", "mmap")]
    # What only some releases have is asked for with hasattr.
    assert listed.absent == ({"Runtime.get_engine_validity"} if listed.flavour == "tensorrt" else set())
    assert [namespace for _, namespace in listed.arguments("init_libnvinfer_plugins")] == [""]


def test_every_release_hands_over_its_errors_and_exceptions(listed, tmp_path):
    listed.engine, listed.logged = None, [("INTERNAL_ERROR", " first "), ("WARNING", "slow"), ("ERROR", "second")]
    assert listed.load(tmp_path) == Failure("no_engine", ("first", "second"))
    listed.engine = ValueError("no buffer")
    assert listed.load(tmp_path) == Failure("exception", ("first", "second"), (), "ValueError: no buffer")
    listed.engine = MemoryError()
    assert listed.load(tmp_path).kind == "memory"


def test_host_code_is_allowed_for_the_one_loading_that_asks(listed, tmp_path):
    listed.load(tmp_path, allows_host_code=True)
    listed.engine = RuntimeError("x")
    listed.load(tmp_path, allows_host_code=True)
    listed.load(tmp_path)
    assert listed.arguments("engine_host_code_allowed") == [[True], [False], [True], [False], [False], [False]]


def test_plugin_library_is_loaded_once_and_only_with_its_own_bytes(listed, tmp_path):
    for name in ("one.so", "broken.so"):
        (tmp_path / name).write_bytes(name.encode())
    one, broken = (
        PluginLibrary(tmp_path / name, request_for(tmp_path / name).digest) for name in ("one.so", "broken.so")
    )
    for _ in range(2):
        assert isinstance(listed.load(tmp_path, plugins=(one,)), Loaded)
    ((path,),) = listed.arguments("load_library")
    assert Path(path).read_bytes() == b"one.so"  # an open file, of the bytes that were digested
    assert listed.load(tmp_path, plugins=(broken,)).engine == "an engine"  # TensorRT says whether it is missing
    (tmp_path / "two.so").write_bytes(b"other bytes")
    for wrong in (PluginLibrary(tmp_path / "two.so", "0" * 64), PluginLibrary(tmp_path / "gone.so", "1" * 64)):
        failure = listed.load(tmp_path, plugins=(wrong,))
        assert failure.kind == "plugin"
        assert f"the plugin library {wrong.path}" in failure.what


@pytest.mark.parametrize("listed", ["tensorrt_rtx-1.7.1.116"], indirect=True)
def test_header_check_names_what_it_finds_and_decides_nothing(listed, tmp_path):
    listed.validity = ("INVALID", DIAGNOSTICS[1:3])
    assert listed.load(tmp_path).engine == "an engine"
    listed.engine = None
    assert listed.load(tmp_path) == Failure("no_engine", (), ("UNSUPPORTED_CC", "OLD_CUDA_DRIVER"))
    listed.engine, listed.validity = "an engine", ("SUBOPTIMAL", ())
    assert listed.load(tmp_path).warnings == ("the header check calls the engine suboptimal on this GPU",)


@pytest.mark.parametrize("listed", ["tensorrt-8.6.1"], indirect=True)
def test_runtime_that_cannot_be_made_is_told_with_its_errors_and_tried_again(listed, tmp_path):
    def refuse(logger):
        logger.log(SEVERITIES["ERROR"], "CUDA initialization failure with error: 35")
        raise TypeError("factory function returned nullptr")

    listed.behaviours["Runtime"] = refuse
    failure = listed.load(tmp_path)
    assert (failure.kind, failure.lines) == ("toolchain", ("CUDA initialization failure with error: 35",))
    listed.behaviours["Runtime"] = listed.make_runtime
    assert isinstance(listed.load(tmp_path), Loaded)


@pytest.mark.parametrize("listed", ["tensorrt-10.16.1.11"], indirect=True)
def test_what_an_engine_says_later_goes_to_pythons_log(listed, tmp_path, caplog):
    listed.load(tmp_path)
    with caplog.at_level(logging.INFO, "enginecache"):
        listed.say("ERROR", "enqueue failed")
        listed.say("WARNING", "slow")
        listed.say("INFO", "hello")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "TensorRT: enqueue failed"),
        ("WARNING", "TensorRT: slow"),
    ]


def test_lines_of_one_loading_are_kept_once_and_not_without_end():
    log = LoadLog()
    with log.collecting() as kept:
        for number in range(1000):
            log.write(f"line {number}", is_error=True)
            log.write("again", is_error=False)
    assert len(kept.lines) == 101


@pytest.mark.rtx
def test_genuine_logger_takes_lines_from_the_genuine_runtime():
    trt = pytest.importorskip("tensorrt_rtx", reason="probe: no module tensorrt_rtx")
    log = LoadLog()
    with log.collecting() as kept:
        runtime = trt.Runtime(make_logger(trt, log))
        assert runtime.get_plugin_registry().load_library("/nowhere.so") is None
    assert any("/nowhere.so" in line for line in kept.lines)


FORKS = """
import os
from enginecache.trt.load import deserialize
deserialize._GUARD.acquire()  # another thread loads
pid = os.fork()
if pid == 0:
    os._exit(0 if deserialize._GUARD.acquire(timeout=60) else 1)
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_process_that_is_forked_during_a_loading_can_load():
    assert subprocess.run([sys.executable, "-c", FORKS], check=False).returncode == 0
