"""Failures that are the plan's fault, and those that are not."""

from __future__ import annotations

import typing
from dataclasses import replace
from pathlib import Path

import pytest
from builder_models import ADA
from hypothesis import given
from hypothesis import strategies as st
from load_requests import request_for

from enginecache.host.targets import ComputeCapability, Reach
from enginecache.trt.load.request import Failure, FailureKind, driver_of
from enginecache.trt.load.verdict import judge
from enginecache.trt.messages import clean_line

REQUEST = request_for(Path("/plan.engine"))
HOPPER = replace(ADA, name="NVIDIA H100 80GB HBM3", compute_capability=ComputeCapability(9, 0), sm_count=132)
INTERNAL = "[runtime.cpp::parsePlan::780] Error Code 1: Serialization (plan.header.size == blobSize failed)"
KINDS = typing.get_args(FailureKind)

# As TensorRT writes them: facts and issues named in the module.
ENVIRONMENT = [
    "IRuntime::deserializeCudaEngine: Error Code 1: Cuda Runtime (In ScopedCudaStream at x.cpp:25 (cudaError 35))",
    "CUDA initialization failure with error: 35",
    "CUDA error 999",
    "Error Code 1: Cuda Driver (CUDA_ERROR_NO_DEVICE)",
    "CUDA driver version is insufficient for CUDA runtime version",
    "libcuda.so.1: cannot open shared object file: No such file or directory",
    "terminate called after throwing an instance of 'std::system_error'  what():  Resource temporarily unavailable",
    "Error Code 2: OutOfMemory (Requested size was 1048576 bytes.)",
    "CUDA out of memory",
    "cudaErrorMemoryAllocation",
    "  what():  std::bad_alloc",
    "INVALID_ARGUMENT: getPluginCreator could not find plugin RoIAlign version 1",
    "IPluginRegistry::getCreator: Error Code 4: API Usage Error (Cannot find plugin: NMS_TRT, version: 1, namespace:.)",
    "Cannot deserialize plugin since corresponding IPluginCreator not found in Plugin Registry",
]
BITS = ["OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME", "INSUFFICIENT_GPU_MEMORY", "CUDA_ERROR"]


@pytest.mark.parametrize("kind", ["no_engine", "exception", "crash"])
def test_plan_that_covers_this_gpu_and_is_not_taken_is_bad(kind):
    verdict = judge(REQUEST, ADA, Failure(kind, (INTERNAL,), ("MALFORMED_ENGINE",)))
    assert (verdict.outcome, verdict.is_lasting) == ("bad", True)
    assert clean_line(INTERNAL) in verdict.reason
    assert "MALFORMED_ENGINE" in verdict.reason
    assert "builds it anew" in verdict.fix


@pytest.mark.parametrize(
    "failure",
    [
        Failure("no_engine"),
        Failure("no_engine", diagnostics=("VERSION_MISMATCH",)),
        Failure("no_engine", diagnostics=("UNSUPPORTED_CC",)),
        Failure("no_engine", ("Error Code 1: Cuda Runtime (an illegal memory access was encountered)",)),
        Failure("exception", what="RuntimeError: Permission denied"),
    ],
)
def test_words_that_no_library_was_seen_to_say_of_a_good_plan_do_not_save_it(failure):
    assert judge(REQUEST, ADA, failure).outcome == "bad"


def test_plan_for_another_gpu_is_refused_for_good_in_tensorrts_words():
    line = "The engine cannot run on this GPU, which has compute capability 9.0. Supported compute capabilities: 8.9."
    verdict = judge(REQUEST, HOPPER, Failure("no_engine", (line,), ("UNSUPPORTED_CC",)))
    assert (verdict.outcome, verdict.is_lasting) == ("refused", True)
    assert verdict.reason == (
        "it was built for compute capability 8.9, and NVIDIA H100 80GB HBM3 here has 9.0: "
        f"the header check says UNSUPPORTED_CC; {clean_line(line)}"
    )
    assert "--target sm_90" in verdict.fix


def test_crash_on_a_gpu_that_the_plan_is_not_for_is_a_refusal():
    assert judge(REQUEST, HOPPER, Failure("crash")).outcome == "refused"
    assert judge(REQUEST, None, Failure("crash")).outcome == "refused"


def test_plan_tuned_for_another_device_model_is_refused_for_good():
    request = replace(REQUEST, tuned_for="NVIDIA RTX 4090, 128 SMs")
    verdict = judge(request, ADA, Failure("no_engine", (INTERNAL,)))
    assert (verdict.outcome, verdict.is_lasting) == ("refused", True)
    assert "tuned for NVIDIA RTX 4090, 128 SMs, and NVIDIA L4, 58 SMs is here" in verdict.reason
    assert judge(replace(request, tuned_for=ADA.device_class), ADA, Failure("crash")).outcome == "bad"


@pytest.mark.parametrize("line", ENVIRONMENT)
@pytest.mark.parametrize("kind", ["no_engine", "exception", "crash"])
def test_what_the_place_is_to_blame_for_is_refused_and_not_for_good(line, kind):
    verdict = judge(REQUEST, ADA, Failure(kind, (INTERNAL, line)))
    assert (verdict.outcome, verdict.is_lasting) == ("refused", False)
    assert clean_line(line) in verdict.reason


@pytest.mark.parametrize("bit", BITS)
def test_header_check_that_names_the_place_is_a_refusal(bit):
    verdict = judge(REQUEST, ADA, Failure("no_engine", (INTERNAL,), (bit,)))
    assert (verdict.outcome, verdict.is_lasting) == ("refused", False)


@pytest.mark.parametrize(
    "line",
    [
        "[E] 3: getPluginCreator could not find plugin: EfficientNMS_TRT version: 1",
        "INVALID_ARGUMENT: getPluginCreator could not find plugin EfficientNMS_TRT version 1",
        "Error Code 4: API Usage Error (Cannot find plugin: EfficientNMS_TRT, version: 1, namespace:.)",
    ],
)
def test_missing_plugin_is_named(line):
    verdict = judge(REQUEST, ADA, Failure("no_engine", (line, "IPluginCreator not found in Plugin Registry")))
    assert "it needs the plugin EfficientNMS_TRT version 1 that is not loaded" in verdict.reason
    assert "plugins=[...]" in verdict.fix


def test_version_compatible_plan_whose_code_may_not_run_needs_trust():
    request = replace(REQUEST, is_version_compatible=True)
    verdict = judge(request, ADA, Failure("no_engine", (INTERNAL,)))
    assert verdict.outcome == "refused"
    assert "trusted=True" in verdict.fix
    assert judge(replace(request, allows_host_code=True), ADA, Failure("no_engine", (INTERNAL,))).outcome == "bad"


def test_plan_that_another_process_loaded_is_not_bad():
    verdict = judge(REQUEST, ADA, Failure("no_engine"), has_loaded=True)
    assert (verdict.outcome, verdict.is_lasting) == ("refused", False)


def test_reason_fits_a_message():
    assert len(judge(REQUEST, ADA, Failure("no_engine", ("x" * 500, "y" * 500))).reason) == 600
    assert "TensorRT gave no reason" in judge(REQUEST, ADA, Failure("no_engine")).reason


def test_class_and_driver_of_a_device_are_texts_that_equal_cards_share():
    assert ADA.device_class == replace(ADA, uuid="GPU-other", ordinal=1).device_class == "NVIDIA L4, 58 SMs"
    assert driver_of(ADA) == "580.65.06"
    assert driver_of(replace(ADA, driver_version="")) == "CUDA 13.0"


CAPABILITIES = st.sampled_from([ComputeCapability(8, 6), ComputeCapability(8, 9), ComputeCapability(9, 0)])
FAILURES = st.builds(
    Failure,
    st.sampled_from(KINDS),
    st.lists(st.sampled_from([*ENVIRONMENT, INTERNAL, "words"])).map(tuple),
    st.lists(st.sampled_from([*BITS, "MALFORMED_ENGINE", "INVALID"])).map(tuple),
    st.sampled_from(["", "RuntimeError: bad_alloc", "RuntimeError: words"]),
)
REQUESTS = st.builds(
    lambda capabilities, later, tuned, compatible, allowed: replace(
        REQUEST,
        reach=Reach(tuple(capabilities), later),
        tuned_for=tuned,
        is_version_compatible=compatible,
        allows_host_code=allowed,
    ),
    st.lists(CAPABILITIES, min_size=1),
    st.booleans(),
    st.sampled_from([None, ADA.device_class, HOPPER.device_class]),
    st.booleans(),
    st.booleans(),
)


@given(
    REQUESTS, st.sampled_from([None, ADA, HOPPER, replace(ADA, compute_capability=ComputeCapability(8, 6))]), FAILURES
)
def test_plan_is_bad_only_where_nothing_else_can_be_to_blame(request, device, failure):
    verdict = judge(request, device, failure)
    assert verdict.fix
    assert 0 < len(verdict.reason) <= 600
    if verdict.outcome == "bad":
        assert device is not None
        assert request.reach.covers_one(device.compute_capability)
        assert request.tuned_for in {None, device.device_class}
        assert failure.kind in {"no_engine", "exception", "crash"}
        assert not set(failure.lines) & set(ENVIRONMENT)
        assert not set(failure.diagnostics) & set(BITS)
        assert "bad_alloc" not in failure.what
    if device is None:
        assert not verdict.is_lasting
