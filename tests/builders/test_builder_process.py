"""Real builds with TensorRT-RTX, in a child process, on a machine without a GPU."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import builder_models as models
import numpy as np
import onnx
import pytest
from builder_processes import ENVIRONMENT, children
from onnx import helper, numpy_helper

from enginecache.errors import (
    BuildError,
    InterpreterError,
    ModelChangedError,
    ProfileError,
    StoreError,
    TargetError,
    ToolchainError,
)
from enginecache.host.targets import ComputeCapability, Target
from enginecache.host.toolchain import PORTABLE_COMPUTE_CAPABILITIES as PORTABLE
from enginecache.key.options import BuildOptions
from enginecache.key.precision import plan_conversion
from enginecache.key.profiles import ProfileRequest, resolve_profiles
from enginecache.model import ModelSource, identify
from enginecache.trt.build.process import ProcessBuilder
from enginecache.trt.child import module_search_path

pytestmark = pytest.mark.rtx

X = ((1, 4), (4, 4), (8, 4))


def refusal(builder, kind, *arguments, **changes):
    """The error of a build that must fail, and its request."""
    request = models.request_for(*arguments, **changes)
    with pytest.raises(kind) as caught:
        builder.build(request)
    assert type(caught.value) is kind
    assert not (request.work_dir / "plan.engine").exists()
    return caught.value, request


def test_real_model_gives_a_plan_a_log_and_progress(tmp_path, builder):
    request, events = models.request_for(tmp_path), []

    plan = builder.build(request, events.append)

    assert plan.plan_path.parent == request.work_dir
    assert plan.plan_path.read_bytes()[:4] == b"vtrt"
    assert plan.plan_path.stat().st_mode & 0o777 == 0o600
    assert plan.loaded_version == "1.7.1.116"
    assert plan.reach.compute_capabilities == (ComputeCapability(8, 9),)
    assert plan.warnings == ()
    # Before TensorRT's first step there may be silence, which is said after half a second.
    steps = [(event.phase, event.step, event.step_count) for event in events if event.phase != "Starting"]
    assert ("Building engine", 1, 6) in steps
    assert ("Optimizing graph", 1, 30) in steps
    assert len(steps) >= 20
    assert all(1 <= step <= count for _, step, count in steps)
    seconds = [event.elapsed_seconds for event in events]
    assert seconds == sorted(seconds)
    assert seconds[-1] <= plan.build_seconds
    log = request.log_path.read_text()
    assert "[I] tensorrt_rtx 1.7.1.116, library 1.7.1.116: light_squeezenet.onnx for sm_89" in log
    assert "[I] Engine generation completed" in log
    assert "VERBOSE" not in log
    assert request.log_path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("targets", "reach"),
    [
        (("sm_89", "7.5", "120"), ("7.5", "8.9", "12.0")),
        (("portable",), tuple(str(capability) for capability in PORTABLE)),
    ],
)
def test_targets_decide_what_the_plan_reaches(tmp_path, builder, targets, reach):
    plan = builder.build(models.request_for(tmp_path, models.conv_model(1), target=Target.parse(targets)))
    assert tuple(str(capability) for capability in plan.reach.compute_capabilities) == reach


def test_target_that_rtx_lacks_is_refused_with_those_that_it_has(tmp_path, builder):
    error, _ = refusal(builder, TargetError, tmp_path, target=Target.parse(("9.0",)))
    assert "cannot build for compute capability 9.0; it can for 7.5, 8.0, 8.6, 8.9, 12.0, 12.1" in error.what
    assert "--target" in error.fix


def test_dynamic_model_builds_with_two_profiles(tmp_path, builder):
    other = models.profile(x=((16, 3, 8, 8), (16, 3, 8, 8), (32, 3, 8, 8)))
    plan = builder.build(models.request_for(tmp_path, models.conv_model(), profiles=(*models.BATCHES, other)))
    assert plan.plan_path.stat().st_size > 10_000


def test_dynamic_model_without_profile_says_which_flags_to_add(tmp_path, builder):
    error, _ = refusal(builder, ProfileError, tmp_path, models.conv_model())
    assert "'x' is dynamic" in error.what
    assert "--dim batch=1:8:32" in error.fix
    assert "--min-shapes x:1x3x8x8 --opt-shapes x:8x3x8x8 --max-shapes x:32x3x8x8" in error.fix


def test_shape_tensor_builds_with_values_and_asks_for_them_without(tmp_path, builder):
    values = models.profile(x=X, s=((1, 4), (2, 8), (4, 8), "values"))
    plan = builder.build(models.request_for(tmp_path, models.reshape_model(), profiles=(values,)))
    assert plan.plan_path.read_bytes()[:4] == b"vtrt"
    assert any("Int64 binding" in line for line in plan.warnings)

    error, _ = refusal(builder, ProfileError, tmp_path, models.reshape_model(), profiles=(models.profile(x=X),))
    assert "TensorRT reads the values of input 's' while building" in error.what
    assert "--min-shapes x:1x4,s:MINxMIN --opt-shapes x:4x4,s:OPTxOPT --max-shapes x:8x4,s:MAXxMAX" in error.fix


def test_values_for_an_input_that_is_no_shape_tensor_are_refused(tmp_path, builder):
    values = models.profile(x=X, s=((1,) * 4, (1,) * 4, (1,) * 4, "values"))
    error, _ = refusal(builder, ProfileError, tmp_path, models.add_integers_model(), profiles=(values,))
    assert "it is not a shape tensor" in error.what
    assert "--min-shapes x:1x4 --opt-shapes x:4x4 --max-shapes x:8x4" in error.fix


def test_optimum_that_breaks_a_reshape_is_named_with_the_node(tmp_path, builder):
    odd = (models.profile(x=((2, 4), (3, 4), (8, 4))),)
    error, request = refusal(builder, BuildError, tmp_path, models.rows_of_eight_model(), profiles=odd)
    assert "the optimum shapes of profile 0 do not fit the graph: IShuffleLayer reshape1" in error.what
    assert "--opt-shapes x:3x4" in error.fix
    assert error.log_path == str(request.log_path)
    assert "cudaError" not in str(error)


def test_input_that_is_an_output_gets_its_profile_though_tensorrt_renames_it(tmp_path, builder):
    model = models.conv_model()
    model.graph.output.append(model.graph.input[0])
    model.graph.output.append(model.graph.output[0])  # and an output twice
    profiles = (models.profile(x=((1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8))),)
    plan = builder.build(models.request_for(tmp_path, model, profiles=profiles))
    assert "input 'x' is also an output: TensorRT calls the input '__x' in the engine" in plan.warnings


def test_advice_for_an_input_that_tensorrt_renames_has_the_name_in_the_file(tmp_path, builder):
    model = models.reshape_model()
    model.graph.output.append(model.graph.input[1])
    error, _ = refusal(builder, ProfileError, tmp_path, model, profiles=(models.profile(x=X),))
    assert "x:8x4,s:MAXxMAX" in error.fix
    assert "__s" not in str(error)
    values = models.profile(x=X, s=((1, 4), (2, 8), (4, 8), "values"))
    assert builder.build(models.request_for(tmp_path, model, profiles=(values,))).plan_path.exists()


def test_static_size_of_0_builds_without_a_profile(tmp_path, builder):
    request = models.request_for(tmp_path, models.conv_model(batch=0))
    assert resolve_profiles(request.identity.inputs, ProfileRequest()) == ()
    assert builder.build(request).plan_path.exists()


def test_dimensions_without_a_size_are_dynamic_here_and_in_tensorrt(tmp_path, builder):
    for size in (-1, -7, None):
        request = models.request_for(tmp_path, models.conv_model(batch=size))
        assert request.identity.inputs[0].dims[0] is None
        profiles = resolve_profiles(request.identity.inputs, ProfileRequest.from_flags(opt_shapes=["x:2x3x8x8"]))
        assert builder.build(replace(request, profiles=profiles)).plan_path.exists()


def test_name_with_a_colon_and_a_comma_gets_its_profile(tmp_path, builder):
    model = models.conv_model()
    model.graph.input[0].name = model.graph.node[0].input[0] = "a:0,b"
    request = models.request_for(tmp_path, model)
    profiles = resolve_profiles(request.identity.inputs, ProfileRequest.from_flags(opt_shapes=['"a:0,b":2x3x8x8']))
    assert builder.build(replace(request, profiles=profiles)).plan_path.exists()


def test_one_name_for_different_dimensions_is_explained(tmp_path, builder):
    different = (models.profile(a=((1, 3),) * 3, b=((4, 3),) * 3),)
    error, _ = refusal(builder, ProfileError, tmp_path, models.concat_model("?", "?"), profiles=different)
    assert "several dimensions have the one name '?' in a: [?, 3], b: [?, 3]" in error.what
    assert "give each its own name" in error.fix
    plan = builder.build(models.request_for(tmp_path, models.concat_model("m", "n"), profiles=different))
    assert plan.plan_path.exists()


def test_matrices_in_fp32_on_turing_are_advised_to_be_fp16_which_builds(tmp_path, builder):
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    model = models.graph_model([helper.make_node("MatMul", ["x", "w"], ["y"])], [models.tensor("x", [4, 64])], [weight])
    turing = Target((ComputeCapability(7, 5),))
    error, request = refusal(builder, BuildError, tmp_path, model, target=turing)
    assert "FP32 GEMM is not supported, and FP16 is" in error.what
    assert error.fix == "Build it in FP16: add --fp16."
    options = BuildOptions(precision=("fp16",))
    conversion = plan_conversion(options, request.toolchain, request.identity)
    followed = models.request_for(tmp_path, model, target=turing, options=options, conversion=conversion)
    assert builder.build(followed).plan_path.exists()


def test_unknown_operator_is_named(tmp_path, builder):
    error, _ = refusal(builder, BuildError, tmp_path, models.unknown_operator_model())
    assert "it has no operator Frobnicate as node 'frob1' (Frobnicate) uses it" in error.what


def test_input_too_small_for_a_convolution_is_named(tmp_path, builder):
    error, _ = refusal(builder, BuildError, tmp_path, models.conv_model(1, size=2))
    assert "too small for a layer: conv1: image size is smaller than filter size" in error.what


def test_workspace_without_a_tactic_says_to_raise_it(tmp_path, builder):
    error, _ = refusal(builder, BuildError, tmp_path, options=BuildOptions(workspace_bytes=1 << 20))
    assert "no tactics" in error.what
    assert "--workspace 1GiB" in error.fix


def test_bytes_that_are_no_model_are_a_build_error(tmp_path, builder):
    identity = identify(ModelSource.of(models.SQUEEZENET))
    request = replace(models.request_for(tmp_path), source=ModelSource.of(b"not onnx"), identity=identity)
    with pytest.raises(BuildError, match="refused <bytes>"):
        builder.build(request)


def test_optimization_level_changes_nothing_on_rtx_and_is_said_to(tmp_path, builder):
    plans = [
        builder.build(
            models.request_for(tmp_path, models.conv_model(1), options=BuildOptions(optimization_level=level))
        )
        for level in (0, 3, 5)
    ]
    assert len({plan.plan_path.read_bytes() for plan in plans}) == 1
    assert [plan.warnings for plan in plans] == [
        ("TensorRT-RTX 1.7.1.116 ignores the optimization level",),
        (),
        ("TensorRT-RTX 1.7.1.116 ignores the optimization level",),
    ]


def external_model(folder, seed=0):
    path = folder / "external.onnx"
    onnx.save(
        models.conv_model(1, seed=seed), path, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    return path


def test_external_data_is_found_from_a_path_and_from_bytes_with_a_folder(tmp_path, builder):
    folder = tmp_path / "models"
    folder.mkdir()
    path = external_model(folder)
    from_path = builder.build(models.request_for(tmp_path, path))
    source = ModelSource.of(path.read_bytes(), base_dir=folder)
    from_bytes = builder.build(models.request_for(tmp_path, source))
    inline = builder.build(models.request_for(tmp_path, models.conv_model(1)))
    assert len({plan.plan_path.read_bytes() for plan in (from_path, from_bytes, inline)}) == 1


@pytest.mark.parametrize("part", ["external.onnx", "weights.bin"])
def test_model_that_changed_since_its_identity_is_not_built(tmp_path, builder, part):
    path = external_model(tmp_path)
    request = models.request_for(tmp_path, path)
    data = bytearray((tmp_path / part).read_bytes())
    (tmp_path / part).write_bytes(data)  # the same bytes, but not the same times
    with pytest.raises(ModelChangedError, match=r"external\.onnx or its external data changed"):
        builder.build(request)


def test_change_within_one_tick_of_the_clock_is_seen_by_its_bytes(tmp_path, builder):
    path = tmp_path / "model.onnx"
    path.write_bytes(models.conv_model(1, seed=1).SerializeToString())
    young = identify(ModelSource.of(path))
    other = models.request_for(tmp_path, models.conv_model(1, seed=2))
    # What a rewrite within one tick leaves: the fingerprint of the identity, and other bytes.
    forged = replace(young, files=identify(other.source).files, is_settled=False)
    with pytest.raises(ModelChangedError):
        builder.build(replace(other, identity=forged))


def test_another_version_than_the_key_names_builds_nothing(tmp_path, builder):
    other = replace(models.RTX, version="1.6.0.99")
    error, _ = refusal(builder, ToolchainError, tmp_path, toolchain=other)
    assert "1.6.0.99 was expected; the Python bindings here are 1.7.1.116" in error.what
    assert error.exit_code == 8
    same = replace(models.RTX, version="1.7.1.116.post1")
    assert builder.build(models.request_for(tmp_path, models.conv_model(1), toolchain=same)).plan_path.exists()


def test_flavour_that_is_not_installed_is_a_toolchain_error(tmp_path, builder):
    error, _ = refusal(builder, ToolchainError, tmp_path, toolchain=models.TRT, device=models.ADA)
    assert "the Python module tensorrt cannot be imported" in error.what


def test_existing_log_is_never_written_over(tmp_path, builder):
    request = models.request_for(tmp_path)
    request.log_path.write_text("someone's")
    with pytest.raises(StoreError):
        builder.build(request)
    assert request.log_path.read_text() == "someone's"


def test_interpreter_that_cannot_be_started_is_an_error_of_its_own_and_leaves_no_descriptor(tmp_path):
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(InterpreterError, match="not a program that this user may run"):
        ProcessBuilder(python=str(tmp_path / "no-python")).build(models.request_for(tmp_path))
    broken = tmp_path / "python3"
    broken.write_text("#!/no/such/interpreter\n", encoding="utf-8")
    broken.chmod(0o755)
    with pytest.raises(InterpreterError, match="cannot be started: No such file"):
        ProcessBuilder(python=str(broken)).build(models.request_for(tmp_path))
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_threads_build_at_once(tmp_path, builder):
    requests = [models.request_for(tmp_path, models.conv_model(1, seed=seed)) for seed in range(6)]
    pipes: dict[int, set[str]] = {}

    def look(_event):
        for pid in children():
            with contextlib.suppress(OSError):
                if b"enginecache.trt.build.worker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                    continue  # forked, and not yet the new program: it has all descriptors for a moment
                links = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
                pipes.setdefault(pid, set()).update(link for link in links if link.startswith("pipe:"))

    with ThreadPoolExecutor(6) as pool:
        plans = list(pool.map(lambda request: builder.build(request, look), requests))

    assert len({plan.plan_path.read_bytes() for plan in plans}) == 6
    # No worker holds a pipe of another: a dead parent, or a dead worker, would not be seen.
    held = [pipe for names in pipes.values() for pipe in names]
    assert len(held) == len(set(held))
    assert max(len(names) for names in pipes.values()) == 2


def test_child_imports_nothing_from_the_current_folder(tmp_path):
    for name in ("tensorrt_rtx", "tensorrt", "json", "dataclasses", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + '\\n')\n")
    script = tmp_path / "script" / "main.py"
    script.parent.mkdir()
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(models.__file__).parent)!r})\n"
        "import pathlib, builder_models\n"
        "from enginecache.trt.build.process import ProcessBuilder\n"
        "request = builder_models.request_for(pathlib.Path('script').absolute())\n"
        "sys.path.insert(0, '')\n"
        "sys.path.insert(0, str(pathlib.Path.cwd()))\n"
        "print(ProcessBuilder().build(request).loaded_version)\n"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert done.stdout == "1.7.1.116\n"
    assert not (tmp_path / "ran").exists()


def test_search_path_keeps_this_process_order_and_holds_the_package(monkeypatch, tmp_path):
    root = str(Path(__file__).parents[2])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "/usr/lib/python", str(tmp_path), "relative", "/site-packages"])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    relative = str(tmp_path / "relative")
    assert module_search_path() == [root, "/usr/lib/python", relative, "/site-packages"]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert module_search_path() == [root, "/usr/lib/python", str(tmp_path), relative, "/site-packages"]
    monkeypatch.setattr(sys, "path", ["/usr/lib/python", root])
    assert module_search_path() == ["/usr/lib/python", root]


def test_worker_imports_no_registry_and_no_command_line():
    code = "import sys, enginecache.trt.build.worker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    unwanted = {"sqlalchemy", "alembic", "typer", "rich", "filelock", "onnx", "numpy", "tensorrt_rtx", "tensorrt"}
    assert not unwanted & set(done.stdout.split())
