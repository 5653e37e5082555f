"""Whole checks, in child processes as users have them; the engine's half runs on GPU hosts, see tests/gpu."""

import signal
from dataclasses import replace

import builder_models
import check_models as models
import numpy as np
import onnx
import pytest

from enginecache.errors import CheckUnavailableError, ModelChangedError, OptionError
from enginecache.key.options import BuildOptions
from enginecache.model import ModelSource
from enginecache.quality import check as check_module
from enginecache.quality.check import Checker, CheckOptions, plan_points, require_packages

LINEAR = models.model("(float[batch,8] x) => (float[batch,8] y) { y = MatMul(x, w) }", w=models.normal(8, 8))
CONSTANT = "(float[2,4] x) => (float[2,4] y) { z = Mul(x, zero) y = Add(z, w) }"
BATCHES = (builder_models.profile(x=((1, 8), (4, 8), (16, 8))),)


def test_check_in_child_processes_passes_and_says_how_far_it_went(tmp_path):
    subject = models.subject_of(tmp_path, LINEAR, profiles=BATCHES)
    (tmp_path / "check").mkdir()
    found = Checker().check(subject, CheckOptions(), tmp_path / "check")
    assert (found.verdict, found.scope, found.device) == ("passed", "graph", None)
    assert [(point.at, point.shapes["x"]) for point in found.points] == [
        ("opt", (4, 8)),
        ("min", (1, 8)),
        ("max", (16, 8)),
    ]
    assert found.reference.startswith("onnxruntime ")
    assert found.inputs == (("x", "seed"),)
    assert 0 < found.worst[0].error < found.tolerance == 0.05
    assert str(found).startswith("passed a check of its graph alone, on a CPU: largest error")


def test_same_seed_gives_the_same_numbers_and_another_others(tmp_path):
    first, again, other = (
        models.check(tmp_path / str(number), LINEAR, profiles=BATCHES, options=CheckOptions(seed=seed)).worst
        for number, seed in enumerate((0, 0, 1))
    )
    assert first == again != other


def test_max_error_decides(tmp_path):
    strict = models.check(tmp_path / "a", LINEAR, profiles=BATCHES, options=CheckOptions(max_error=1e-7))
    assert (strict.verdict, strict.tolerance) == ("failed", 1e-7)
    assert "output y: error" in strict.reason
    assert "tolerance 1e-07" in strict.reason


@pytest.mark.parametrize(
    "text",
    [
        "(float[2,4] x) => (float[2,4] y) { z = Mul(x, zero) y = Add(z, w) }",
        "(float[2,4] x) => (int64[2] y) { y = Shape(x) }",
    ],
    ids=["constant", "shape"],
)
def test_model_whose_outputs_do_not_depend_on_the_input_is_uninformative(tmp_path, text):
    found = models.check(tmp_path / "a", models.model(text, zero=np.float32(0), w=models.normal(2, 4)))
    assert found.verdict == "uninformative"
    assert "the same for two seeds" in found.reason
    assert "--inputs (a file of numpy.savez" in found.reason


def test_constant_output_that_is_wrong_fails_all_the_same(tmp_path):
    original, converted = (
        models.model(CONSTANT, zero=np.float32(0), w=models.normal(2, 4, seed=seed)) for seed in (0, 1)
    )
    assert models.check(tmp_path / "a", original, converted).verdict == "failed"


RARE = models.model(
    "(float[4] x) => (float[4] y) { d = Sub(x, far) r = Relu(d) y = Mul(r, s) }", far=np.float32(100), s=np.float32(2)
)


def test_range_makes_an_uninformative_check_informative(tmp_path):
    assert models.check(tmp_path / "a", RARE).verdict == "uninformative"
    found = models.check(tmp_path / "b", RARE, options=CheckOptions(ranges={"x": (0, 255)}))
    assert (found.verdict, found.inputs) == ("passed", (("x", "range 0:255"),))


def test_given_inputs_make_an_uninformative_check_informative(tmp_path):
    np.savez(tmp_path / "given.npz", x=np.array([90, 150, 200, 101.0]))
    found = models.check(tmp_path / "a", RARE, options=CheckOptions(inputs=(tmp_path / "given.npz",)))
    assert (found.verdict, found.inputs, found.points[0].at) == ("passed", (("x", "file"),), "given")


def test_given_inputs_that_show_nothing_are_uninformative_too(tmp_path):
    np.savez(tmp_path / "given.npz", x=np.zeros(4))
    found = models.check(tmp_path / "a", RARE, options=CheckOptions(inputs=(tmp_path / "given.npz",)))
    assert found.verdict == "uninformative"


def test_model_without_a_conversion_has_nothing_to_compare_without_a_gpu(tmp_path):
    found = models.check(tmp_path / "a", LINEAR, profiles=BATCHES, conversion=None)
    assert (found.verdict, found.points) == ("uninformative", ())
    assert "Check it on a GPU" in found.reason


def test_stripped_plan_is_uninformative(tmp_path):
    options = BuildOptions(precision=("fp16",), strip_plan=True)
    assert "refitted" in models.check(tmp_path / "a", LINEAR, profiles=BATCHES, build_options=options).reason


@pytest.mark.parametrize("as_bytes", [False, True], ids=["file", "bytes"])
def test_weights_outside_the_model_are_read_also_through_links(tmp_path, as_bytes):
    stored, named = tmp_path / "blobs", tmp_path / "snapshot"
    stored.mkdir()
    named.mkdir()
    copy = onnx.ModelProto.FromString(LINEAR.SerializeToString())
    onnx.save_model(copy, str(stored / "m.onnx"), save_as_external_data=True, location="w.data", size_threshold=0)
    (stored / "w.data").rename(stored / "abc123")
    (named / "w.data").symlink_to(stored / "abc123")
    (named / "m.onnx").write_bytes((stored / "m.onnx").read_bytes())
    source = ModelSource.of((named / "m.onnx").read_bytes(), named) if as_bytes else ModelSource.of(named / "m.onnx")
    found = models.check(tmp_path / "a", replace(source, follows_links=True), profiles=BATCHES)
    assert (found.verdict, found.reason) == ("passed", "")


def test_weights_of_a_converted_graph_are_read_from_their_file(tmp_path):
    text = "(float[2,256] x) => (float[2,256] y) { y = MatMul(x, w) }"
    found = models.check(tmp_path / "a", models.model(text, w=models.normal(256, 256)))
    (weights,) = (tmp_path / "a").rglob("weights.data")
    assert weights.stat().st_size == 256 * 256 * 2
    assert (found.verdict, found.reason) == ("passed", "")


def test_model_that_onnxruntime_does_not_know_is_uninformative_with_its_words(tmp_path):
    node = onnx.helper.make_node("Frobnicate", ["x"], ["y"], domain="my.ops")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [2])], [value("y", 1, [2])])
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("my.ops", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    found = models.check(tmp_path / "a", model)
    assert found.verdict == "uninformative"
    assert "Frobnicate" in found.reason


def test_model_of_random_numbers_is_uninformative(tmp_path):
    model = models.model("(float[2,4] x) => (float[2,4] y) { r = RandomNormalLike(x) y = Add(x, r) }")
    found = models.check(tmp_path / "a", model, model)
    assert (found.verdict, "RandomNormalLike" in found.reason) == ("uninformative", True)


def test_converted_graph_with_other_outputs_fails(tmp_path):
    other = models.model("(float[2,4] x) => (float[2,4] z) { z = Relu(x) }")
    found = models.check(tmp_path / "a", models.model("(float[2,4] x) => (float[2,4] y) { y = Relu(x) }"), other)
    assert (found.verdict, "other outputs: z" in found.reason) == ("failed", True)


def test_output_of_another_shape_fails(tmp_path):
    pair = [models.model(f"(float[2,4] x) => (float y) {{ y = ReduceSum<keepdims={k}>(x) }}") for k in (0, 1)]
    found = models.check(tmp_path / "a", *pair)
    assert (found.verdict, "shape" in found.reason) == ("failed", True)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSEGV])
def test_death_of_the_reference_is_a_sentence_and_not_the_end_of_this_process(tmp_path, monkeypatch, end):
    module = tmp_path / "dying_reference.py"
    module.write_text(
        "import os\nfrom enginecache.trt.child import receive_request\nreceive_request()\n"
        f"os.kill(os.getpid(), {int(end)})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(check_module, "REFERENCE", "dying_reference")
    (tmp_path / "check").mkdir()
    found = Checker().check(models.subject_of(tmp_path, LINEAR, profiles=BATCHES), CheckOptions(), tmp_path / "check")
    assert found.verdict == "uninformative"
    assert f"by {end.name}" in found.reason


def test_engine_that_stands_still_is_ended(tmp_path, monkeypatch):
    module = tmp_path / "still.py"
    module.write_text(
        "import time\nfrom enginecache.trt.child import receive_request\nreceive_request()\ntime.sleep(99)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(check_module, "EXECUTE", "still")
    assert Checker(timeout_s=0).run_child("still", {}, None)["event"] == "timeout"


def test_model_that_changes_meanwhile_is_an_error_and_no_verdict(tmp_path):
    class Changing(models.HereChecker):
        def run_child(self, module, request, device):
            subject.build.source.path.write_bytes(b"another")
            return super().run_child(module, request, device)

    subject = models.subject_of(tmp_path, LINEAR, profiles=BATCHES)
    (tmp_path / "check").mkdir()
    with pytest.raises(ModelChangedError, match="changed since"):
        Changing().check(subject, CheckOptions(), tmp_path / "check")


def test_reference_is_what_the_kernel_ends_first(tmp_path, monkeypatch):
    module = tmp_path / "scored.py"
    module.write_text(
        "import enginecache.quality.reference as reference\n"
        "def run(record, reports):\n"
        "    reports.send({'event': 'failed', 'what': open('/proc/self/oom_score_adj').read().strip()})\n"
        "reference.run = run\nreference.main()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert Checker().run_child("scored", {}, None)["what"] == "1000"


@pytest.mark.parametrize(
    "options",
    [
        *(CheckOptions(seed=-1), CheckOptions(max_error=-1.0), CheckOptions(max_error=float("nan"))),
        CheckOptions(ranges={"nope": (0, 1)}),
    ],
)
def test_options_that_no_check_can_have_are_refused_before_anything_runs(tmp_path, options):
    with pytest.raises(OptionError):
        plan_points(options, models.subject_of(tmp_path, LINEAR, profiles=BATCHES).build.identity.inputs, BATCHES)


def test_package_that_is_missing_is_named_with_the_command_that_installs_it(monkeypatch):
    require_packages(None)
    monkeypatch.setattr(check_module, "find_spec", lambda _name: None)
    with pytest.raises(CheckUnavailableError, match=r"ONNX Runtime is not installed\n.*pip install 'onnxruntime>="):
        require_packages(None)


@pytest.mark.parametrize("last", ["Sigmoid", "Softmax"])
def test_probabilities_are_measured_against_1(tmp_path, last):
    text = f"(float[2,64] x) => (float[2,64,1] y) {{ a = MatMul(x, w) p = {last}(a) y = Unsqueeze(p, axis) }}"
    model = models.model(text, w=models.normal(64, 64, scale=0.25), axis=np.array([2]))
    found = models.check(tmp_path / "a", model).worst[0]
    assert found.error == found.max_abs_error


def test_detector_that_finds_nothing_is_uninformative(tmp_path):
    text = "(float[2,64] x) => (float[2,64] y) { a = Sub(x, far) y = Sigmoid(a) }"
    assert models.check(tmp_path / "a", models.model(text, far=np.float32(9))).verdict == "uninformative"
