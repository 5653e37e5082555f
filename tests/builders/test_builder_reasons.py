"""Error lines into reasons. Lines as TensorRT-RTX 1.7.1 logged them in 2026-11, but where a comment says otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import builder_models as models
import pytest

from enginecache.errors import BuilderKilledError, BuildError, NoDeviceError, ProfileError, UnsupportedOptionError
from enginecache.key.options import BuildOptions, PluginLibrary
from enginecache.trt.build.explain import ParserProblem, explain_build, explain_parsing
from enginecache.trt.build.logs import MAX_SHOWN, shown_warnings
from enginecache.trt.messages import clean_lines

DRIVER = (
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at "
    "/_src/common/dispatch/checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient for CUDA runtime "
    "version))"
)
NO_PROFILE = (
    "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (Network has dynamic or shape inputs, but no "
    "optimization profile has been defined. In validate at /_src/optimizer/api/network.cpp:4023)"
)
BAD_OPT = (
    "IBuilder::buildSerializedNetwork: Error Code 4: Internal Error (kOPT values for profile 0 violate shape "
    "constraints: IShuffleLayer rs: reshaping failed for tensor: x Reshape dimension of -1 has no solution. In "
    "executeReshape at /_src/runtime/core/shapeMachine.cpp:340 In evaluateShapeChecks at "
    "/_src/optimizer/common/shapeCompiler.cpp:1375)"
)
LEAN = (
    "IBuilder::buildSerializedNetwork: Error Code 6: API Usage Error (Unable to load library: libnvinfer_lean.so.1: "
    "libnvinfer_lean.so.1: cannot open shared object file: No such file or directory In Impl at "
    "/_src/runtime/dispatch/libLoader.cpp:305)"
)
MYELIN = (
    "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([myelin_graph.h:1295: attachExceptionMsgToGraph] "
    "MyelinCheckException: graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed.  In compileGraph at "
    "/_src/optimizer/myelin/codeGenerator.cpp:2012)"
)
NO_FP32 = (
    "IBuilder::buildSerializedNetwork: Error Code 9: API Usage Error (Cannot compile operation 'mm' for Turing (SM75): "
    "FP32 GEMM is not supported. In compile at /_src/optimizer/x.cpp:1)"
)
NOT_ONE_SIZE = (
    "IBuilder::buildSerializedNetwork: Error Code 4: Internal Error (Profile kOPT values are not self-consistent. "
    "Dimensions with name batch must be equal. Condition '==' violated: 2 != 3. In operator() at "
    "/_src/runtime/core/shapeMachine.cpp:640 Instruction: CHECK_EQUAL 2 3.)"
)
CLEAN_BAD_OPT = (
    "kOPT values for profile 0 violate shape constraints: IShuffleLayer rs: reshaping failed for tensor: x Reshape "
    "dimension of -1 has no solution"
)


@pytest.fixture
def request_(tmp_path):
    return models.request_for(tmp_path, models.conv_model(), profiles=models.BATCHES)


def test_lines_lose_source_places_wrapping_repetitions_and_driver_noise():
    lines = [BAD_OPT, DRIVER, BAD_OPT, 'onnxOpCheckers.cpp:998: creator && "Plugin not found"', "--- End node ---"]
    assert clean_lines(lines) == [CLEAN_BAD_OPT, "Plugin not found"]


def test_driver_is_the_reason_where_nothing_else_was_said(request_):
    error = explain_build(request_, [DRIVER, DRIVER])
    assert isinstance(error, NoDeviceError)
    assert "cudaError 35" in error.what


@pytest.mark.parametrize(
    ("line", "kind", "what", "fix"),
    [
        (NO_PROFILE, ProfileError, "no shapes were given", "--dim batch=1:8:32"),
        (BAD_OPT, BuildError, "optimum shapes of profile 0", "--opt-shapes x:4x3x8x8"),
        # As NVIDIA's issue threads quote TensorRT 8.6 and 10; not logged here, where there is no GPU.
        (
            "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
            BuilderKilledError,
            "",
            "Free",
        ),
        (
            "[localCheckMacros.cpp::getErrorStr::132] Error Code 2: OutOfMemory (Requested size was 12036633 bytes.)",
            BuilderKilledError,
            "ran out of memory: out of memory: Requested size was 12036633 bytes",
            "Free memory",
        ),
        (
            "Error Code 1: Myelin ([x.h:1: f] Unexpected exception Resource temporarily unavailable)",
            BuilderKilledError,
            "could not start a thread",
            "ulimit -u",
        ),
        (
            NO_FP32,
            BuildError,
            "FP32 GEMM is not supported, and FP16 is",
            "add --fp16",
        ),
        (
            NOT_ONE_SIZE,
            ProfileError,
            "several dimensions have the one name 'batch' in x: [batch, 3, 8, 8]",
            "its own name",
        ),
        (
            "Error Code 10: Internal Error (Could not find any implementation for node Conv_0.)",
            BuildError,
            "Conv_0",
            "opt",
        ),
        ("Error Code 2: Internal Error (Assertion engine failed. )", BuildError, "internal check", "onnx.checker"),
        ("something new", BuildError, "refused model0.onnx: something new", "onnx.checker"),
    ],
)
def test_known_lines_have_a_reason_and_a_remedy(request_, line, kind, what, fix):
    error = explain_build(request_, [line])
    assert type(error) is kind
    assert what in error.what
    assert fix in error.fix
    assert "\n" not in error.what
    assert "/_src/" not in str(error)


def test_layer_that_wants_more_than_the_workspace_says_to_raise_it(request_):
    line = "[localCheckMacros.cpp::getErrorStr::132] Error Code 2: OutOfMemory (Requested size was 12036633 bytes.)"
    error = explain_build(replace(request_, options=BuildOptions(workspace_bytes=1 << 20)), [line])
    assert type(error) is BuilderKilledError
    assert error.what.endswith("Requested size was 12036633 bytes, and --workspace allows a layer 1 MiB")
    assert error.fix.startswith("Raise --workspace")
    enough = explain_build(replace(request_, options=BuildOptions(workspace_bytes=1 << 30)), [line])
    assert "Free memory" in enough.fix


def test_missing_lean_runtime_is_an_option_that_this_machine_lacks(request_):
    error = explain_build(request_, [LEAN, DRIVER])
    assert type(error) is UnsupportedOptionError
    assert "its lean runtime into a version compatible plan, and cannot load it: Unable to load library" in error.what
    assert "leave --version-compatible out" in error.fix


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (BuildOptions(strip_plan=True), "--strip-plan"),
        (BuildOptions(builder_flags=("REFIT_IDENTICAL", "TF32=OFF")), "--builder-flag REFIT_IDENTICAL"),
        (
            BuildOptions(strip_plan=True, builder_flags=("REFIT",)),
            "--strip-plan and --builder-flag REFIT",
        ),
    ],
)
def test_failing_cuda_call_of_a_plan_for_refitting_is_put_down_to_the_option(request_, options, asked):
    error = explain_build(replace(request_, options=options), [MYELIN])
    assert type(error) is UnsupportedOptionError
    assert f"with {asked}, and that failed: MyelinCheckException: graph_jit.cpp:278: CHECK" in error.what
    assert error.fix.endswith(f"or leave {asked} out.")


def test_failing_cuda_call_of_another_plan_is_the_builds_own_failure(request_):
    options = BuildOptions(builder_flags=("REFIT=OFF",))
    error = explain_build(replace(request_, options=options), [MYELIN])
    assert type(error) is BuildError
    assert "refused model0.onnx: MyelinCheckException" in error.what


def test_missing_plugin_says_which_libraries_did_not_have_it(request_):
    problem = ParserProblem(3, "frob1", "Frobnicate", "Plugin not found, are the plugin name, version correct?")
    assert "name that: --plugin FILE" in explain_parsing(request_, [problem], []).fix
    plugins = (PluginLibrary(Path("/lib/liba.so"), "0" * 64),)
    error = explain_parsing(replace(request_, options=BuildOptions(plugins=plugins)), [problem], [])
    assert "it has no operator Frobnicate as node 'frob1' (Frobnicate) uses it" in error.what
    assert error.fix.startswith("None of liba.so has the plugin Frobnicate: compare its name, version and namespace")


def test_cause_stands_before_its_consequences(request_):
    assert isinstance(explain_build(request_, ["Assertion x failed", "CUDA: out of memory"]), BuilderKilledError)


def test_no_line_at_all_is_said(request_):
    assert "it gave no reason" in explain_build(request_, []).what
    error = explain_parsing(request_, [], [])
    assert "while parsing it, without naming a node: it gave no reason" in error.what


def test_assertion_without_a_parser_error_has_a_hint(request_):
    error = explain_parsing(request_, [], ["Error Code 2: Internal Error (Assertion graph.isValid() failed. )"])
    assert "an internal check of TensorRT failed" in error.what
    assert "fold its constants" in error.fix


def test_further_parser_errors_are_counted(request_):
    problems = [ParserProblem(i, f"node{i}", "Conv", "bad weights\nIn foo at /_src/a.cpp:3") for i in range(3)]
    error = explain_parsing(request_, problems, [])
    assert "at node 'node0' (Conv): bad weights (and 2 more, in the log)" in error.what


def test_parser_error_without_a_node_has_no_place(request_):
    error = explain_parsing(request_, [ParserProblem(-1, "", "", "cannot open the file")], [])
    assert error.what.endswith("refused model0.onnx: cannot open the file")


def test_many_warnings_are_cut_with_their_number():
    shown = shown_warnings([f"warning {i}" for i in range(MAX_SHOWN + 7)])
    assert len(shown) == MAX_SHOWN + 1
    assert shown[-1] == "... and 7 more warnings in the builder's log"
