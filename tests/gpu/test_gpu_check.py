"""On a GPU host: engines are checked against ONNX Runtime. ``gpu_checks.py`` runs more, and writes files."""

from importlib.util import find_spec

import gpu_checks
import numpy as np
import pytest
from gpu_checks import build, check, damaged

from enginecache import CheckError, EngineCache
from enginecache.errors import BackendError
from enginecache.key.options import BuildOptions
from enginecache.pipeline.placement import place
from enginecache.quality.check import CheckOptions


def problem():
    """Return why no engine can be built and run here; empty where one can."""
    try:
        device = place("auto", None).device
    except BackendError as error:
        return error.what.splitlines()[0]
    if device is None:
        return "no GPU"
    missing = [name for name in ("onnxruntime", "cuda") if find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


WHY = problem()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY), reason=f"probe: {WHY}")]
if not WHY:
    import builder_models
    import check_models as models
else:
    models = None


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """An engine with a dynamic batch."""
    text = "(float[batch,64] x) => (float[batch,64] y) { y = MatMul(x, w) }"
    return build(tmp_path_factory.mktemp("linear") / "one", models.model(text, w=models.normal(64, 64)))


def test_engine_passes_at_every_corner_of_its_profile(linear):
    found = check(linear)
    assert (found.verdict, found.scope, found.reason) == ("passed", "engine", "")
    assert [point.shapes["x"] for point in found.points] == [(2, 64), (1, 64), (4, 64)]
    assert found.device == linear.device.name
    assert found.worst[0].error < 1e-3


@pytest.mark.parametrize("name", ["an embedding", "a mask", "a picture of bytes", "two outputs, one of integers"])
def test_inputs_and_outputs_of_other_types(tmp_path, name):
    found = check(build(tmp_path / "one", models.good_models()[name]))
    assert (found.verdict, found.scope) == ("passed", "engine"), found.reason


@pytest.mark.parametrize("precision", [(), ("fp16",)], ids=["fp32", "fp16"])
def test_example_passes(tmp_path, precision):
    found = check(build(tmp_path / "one", gpu_checks.ROOT / "examples/cifar.onnx", BuildOptions(precision=precision)))
    assert found.verdict == "passed", found.reason


def test_engine_of_other_weights_fails(tmp_path, linear):
    text = "(float[batch,64] x) => (float[batch,64] y) { y = MatMul(x, w) }"
    other = build(tmp_path / "other", models.model(text, w=models.normal(64, 64, seed=1)))
    found = check(gpu_checks.replace(linear, plan=other.plan))
    assert found.verdict == "failed"
    assert "output y: error" in found.reason


def test_second_profile_runs_with_inputs_that_only_it_takes(tmp_path):
    text = "(float[batch,8] x) => (float[batch,8] y) { y = Tanh(x) }"
    profiles = tuple(builder_models.profile(x=tuple((n, 8) for n in sizes)) for sizes in ((1, 2, 4), (8, 16, 32)))
    subject = build(tmp_path / "one", models.model(text), profiles=profiles)
    found = check(subject)
    assert found.verdict == "passed", found.reason
    assert [(point.profile, point.shapes["x"][0]) for point in found.points] == [
        *((0, 2), (0, 1), (0, 4)),
        *((1, 16), (1, 8), (1, 32)),
    ]
    np.savez(tmp_path / "given.npz", x=models.normal(31, 8))
    found = check(subject, CheckOptions(inputs=(tmp_path / "given.npz",)))
    assert (found.verdict, found.points[0].profile, found.points[0].at) == ("passed", 1, "given")


def test_shape_tensor_is_given_the_values_of_the_profile(tmp_path):
    profile = builder_models.profile(
        x=((2, 4), (4, 4), (8, 4)),
        s=((2, 4), (4, 4), (8, 4), "values"),
    )
    found = check(build(tmp_path / "one", builder_models.reshape_model(), profiles=(profile,)))
    assert found.verdict == "passed", found.reason


def test_output_whose_size_only_the_run_tells(tmp_path):
    model = models.model(
        "(float[4,8] x) => (float[n] y) { z = Relu(x) k = NonZero(z) t = Transpose(k) y = GatherND(x, t) }"
    )
    found = check(build(tmp_path / "one", model))
    assert found.verdict == "passed", found.reason


def test_input_that_is_an_output_too(tmp_path):
    found = check(
        build(tmp_path / "one", models.model("(float[4,8] x) => (float[4,8] y, float[4,8] x) { y = Neg(x) }"))
    )
    assert found.verdict == "passed", found.reason


def test_get_with_a_check_runs_the_engine_before_it_is_published(tmp_path):
    text = "(float[batch,64] x) => (float[batch,64] y) { y = MatMul(x, w) }"
    path = tmp_path / "model.onnx"
    path.write_bytes(models.model(text, w=models.normal(64, 64)).SerializeToString())
    cache, ask = EngineCache(tmp_path / "cache"), {"dims": {"batch": (1, 2, 4)}}
    with pytest.raises(CheckError, match="tolerance"):
        cache.get(path, check=CheckOptions(max_error=0.0, seed=3), **ask)
    assert cache.entries() == []
    entry = cache.get(path, check=True, **ask)
    check = entry.record.check
    assert (entry.outcome, check["verdict"], check["scope"]) == ("built", "passed", "engine")
    assert cache.get(path, require_check=True, offline=True, **ask).key == entry.key
    assert cache.load(path, check=True, **ask).num_io_tensors == 2
    assert cache.check(entry, path, CheckOptions(seed=9)).verdict == "passed"
    assert cache.verify(deep=True).is_clean


def test_plan_that_is_cut_short_fails_with_tensorrts_words(tmp_path, linear):
    content = linear.plan.path.read_bytes()
    found = check(damaged(linear, content[: len(content) // 2], tmp_path / "cut"))
    assert (found.verdict, "did not load" in found.reason) == ("failed", True), found.reason


def test_flipped_bytes_never_end_this_process(tmp_path, linear):
    rows = list(gpu_checks.flips(linear, tmp_path / "flips", 8))
    assert len(rows) == 8
    assert {row["verdict"] for row in rows} <= {"passed", "failed", "uninformative"}
