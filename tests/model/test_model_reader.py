"""Reading a model: bad input, inputs of the graph, files that change, and golden digests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from small_onnx_models import LIGHT, PLACES, WEIGHT, external, identity_of, linear, raw
from waiting import LIMIT_S

from enginecache.errors import ModelError
from enginecache.files.plain import from_plain, to_plain
from enginecache.model import ModelIdentity, ModelInput, ModelSource, identify, reader
from enginecache.model.files import ModelFiles

GOLDEN = {
    # Append only. A change here gives every user of that model a miss: it needs a new version in the digests' domain.
    "light_squeezenet": (
        "9183c4d6fb94ea75bf3237a5938164133d08c31f39563b9471eb131c25c291be",
        "bb1af60fd71f3c4c91e0dcd3c08e3c6c7f3da91134b9f0c67cb9ddd1c174ab96",
    ),
    "light_zfnet512": (
        "b5aa5c3743d5765c4de0ebb68db738922552ae1e840c2f1cd663594dbb70aa07",
        "e9b87a723e362070b7771ced03a394e1997cef370ae230f570a1b6274358ef79",
    ),
}
"""Structure and weights digests of models that come with the onnx package."""

SQUEEZENET = next(path for path in LIGHT if path.stem == "light_squeezenet").read_bytes()


def refused(data: bytes, text: str, **source) -> ModelError:
    with pytest.raises(ModelError, match=text) as caught:
        identify(ModelSource.of(data, **source))
    assert caught.value.what
    assert caught.value.fix
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize("stem", GOLDEN)
def test_golden_digests(stem):
    path = next(path for path in LIGHT if path.stem == stem)
    identity = identify(ModelSource.of(path))
    assert (identity.structure, identity.weights) == GOLDEN[stem]


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_a_path_and_its_bytes_are_the_same_model(path):
    from_path, from_bytes = identify(ModelSource.of(path)), identify(ModelSource.of(path.read_bytes()))
    assert from_path.digest == from_bytes.digest
    assert from_path.inputs == from_bytes.inputs
    assert from_plain(ModelIdentity, to_plain(from_path)) == from_path


def test_real_models_all_differ():
    assert len({identify(ModelSource.of(path)).digest for path in LIGHT}) == len(LIGHT)


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_initializers_listed_as_inputs_are_not_inputs(path):
    (only,) = identify(ModelSource.of(path)).inputs
    assert only == ModelInput(only.name, "FLOAT", (1, 3, 224, 224))


def test_the_name_and_the_folder_of_a_model_do_not_count(tmp_path):
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "m.onnx", tmp_path / "a" / "other"):
        path.write_bytes(SQUEEZENET)
        assert identify(ModelSource.of(path)).digest == identify(ModelSource.of(SQUEEZENET)).digest


def with_input(value: onnx.ValueInfoProto) -> onnx.ModelProto:
    model = linear()
    model.graph.input.append(value)
    return model


def test_inputs_keep_their_order_and_their_kinds_of_dimension():
    model = with_input(helper.make_tensor_value_info("ids", TensorProto.INT64, [2, None, "length"]))
    model.graph.input.append(helper.make_tensor_value_info("scalar", TensorProto.FLOAT16, []))
    old = model.graph.input.add(name="old")
    old.CopyFrom(helper.make_tensor_value_info("old", TensorProto.UINT8, [0, -1, 5]))
    assert identity_of(model).inputs == (
        ModelInput("x", "FLOAT", ("batch", 3)),
        ModelInput("ids", "INT64", (2, None, "length")),
        ModelInput("scalar", "FLOAT16", ()),
        ModelInput("old", "UINT8", (0, None, 5)),
    )


def test_a_sparse_initializer_is_not_an_input():
    model = with_input(helper.make_tensor_value_info("sparse", TensorProto.FLOAT, [3]))
    model.graph.sparse_initializer.add(values=raw(name="sparse"), indices=raw(name="i"), dims=[3])
    assert [found.name for found in identity_of(model).inputs] == ["x"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (helper.make_tensor_sequence_value_info("q", TensorProto.FLOAT, [1]), "not a tensor"),
        (helper.make_sparse_tensor_value_info("q", TensorProto.FLOAT, [1]), "not a tensor"),
        (onnx.ValueInfoProto(name="q"), "not a tensor"),
        (helper.make_tensor_value_info("q", TensorProto.FLOAT, None), "without a shape"),
        (helper.make_tensor_value_info("q", TensorProto.UNDEFINED, [1]), "element type 0"),
        (helper.make_tensor_value_info("q", 99, [1]), "element type 99"),
    ],
)
def test_an_input_that_tensorrt_cannot_take_is_named(value, text):
    assert "'q'" in refused(with_input(value).SerializeToString(), text).what


def test_an_input_whose_dimension_is_not_utf8_is_refused():
    refused(linear().SerializeToString().replace(b"batch", b"bat\xff\xfe"), "not UTF-8")


def test_a_missing_file_is_refused_by_its_path(tmp_path):
    with pytest.raises(ModelError, match=r"there is no file .*gone\.onnx"):
        identify(ModelSource.of(tmp_path / "gone.onnx"))


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ModelError, match="is a folder"):
        identify(ModelSource.of(tmp_path))


def test_a_path_that_is_none_is_refused():
    with pytest.raises(ModelError, match="null"):
        identify(ModelSource.of("a\0b"))


def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(SQUEEZENET)
    path.chmod(0)
    script = (
        "import os, sys, onnx, enginecache.model.reader as reader\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "try: reader.identify(reader.ModelSource.of(sys.argv[1]))\n"
        "except reader.ModelError as error: print(error.what)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert "may not be read" in result.stdout


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "m.onnx").touch()
    with pytest.raises(ModelError, match="is empty"):
        identify(ModelSource.of(tmp_path / "m.onnx"))
    refused(b"", "is empty")


def test_text_is_refused_as_text():
    assert "it is text" in refused(b"# A model\n\nDownload it from the hub.\n" * 40, "not an ONNX model").what


def test_a_git_lfs_pointer_is_named_as_one():
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 15618\n"
    assert "git lfs pull" in refused(pointer, "not an ONNX model").fix


@pytest.mark.parametrize("part", ["graph", "ir_version", "opset_import"])
def test_a_message_without_what_every_model_has_is_refused(part):
    model = linear()
    model.ClearField(part)
    refused(model.SerializeToString(), "it has no")


def test_a_graph_without_outputs_is_refused():
    model = linear()
    del model.graph.output[:]
    refused(model.SerializeToString(), "no graph output")


def test_another_protobuf_message_is_refused():
    refused(raw().SerializeToString(), "not an ONNX model")


def test_an_ir_version_above_the_packages_says_to_upgrade_it():
    model = linear()
    model.ir_version = onnx.IR_VERSION + 1
    assert "pip install --upgrade onnx" in refused(model.SerializeToString(), "IR version").fix


def test_a_file_of_two_gibibytes_is_refused_unread(tmp_path):
    with (tmp_path / "m.onnx").open("wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(ModelError, match="less than 2 GiB") as caught:
        identify(ModelSource.of(tmp_path / "m.onnx"))
    assert "external data" in caught.value.fix


def nested(depth: int) -> onnx.ModelProto:
    """A model with ``depth`` subgraphs, one inside the other."""
    graph = linear().graph
    for _ in range(depth):
        outer = linear().graph
        outer.node.append(helper.make_node("Loop", ["n", ""], ["z"], body=graph))
        graph = outer
    model = linear()
    model.graph.CopyFrom(graph)
    return model


def test_nesting_is_read_as_deep_as_protobuf_goes_and_refused_below_that():
    assert identity_of(nested(20)).digest != identity_of(nested(21)).digest
    for depth in range(28, 34):
        try:
            identity_of(nested(depth))
        except ModelError:
            break
    else:
        pytest.fail("no depth was refused")


def length_delimited(number: int, content: bytes) -> bytes:
    size, out = len(content), b""
    while size > 127:
        out, size = out + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + out + bytes([size]) + content


@pytest.mark.parametrize("depth", [100, 10_000])
def test_deep_nesting_is_refused_and_does_not_exhaust_the_stack(depth):
    content = b""
    for _ in range(depth):  # a graph attribute in a node in a graph
        content = length_delimited(1, length_delimited(5, length_delimited(6, content[:1_000_000])))
    refused(b"\x08\x08" + length_delimited(7, content), "nested too deeply|not an ONNX model")


def test_a_stack_that_is_nearly_used_up_is_bad_input_and_not_a_recursion_error():
    data = nested(20).SerializeToString()

    def descend(left: int) -> None:
        if left:
            descend(left - 1)
            return
        refused(data, "nested too deeply")

    identify(ModelSource.of(data))
    frame, depth = sys._getframe(), 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1
    descend(sys.getrecursionlimit() - depth - 90)


@pytest.mark.parametrize("cut", [1, 7, 100, 5_000, 15_000])
def test_a_file_that_was_cut_off_is_refused(cut):
    refused(SQUEEZENET[:-cut], "not an ONNX model")


def test_files_that_change_are_read_again(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(linear().SerializeToString())
    touches = iter([True, True, False])

    class Touched(ModelFiles):
        def open(self, path: Path, location: str = ""):
            file = super().open(path, location)
            if next(touches):
                path.write_bytes(SQUEEZENET)
            return file

    monkeypatch.setattr(reader, "ModelFiles", Touched)
    assert identify(ModelSource.of(path)).digest == identify(ModelSource.of(SQUEEZENET)).digest
    assert next(touches, None) is None


@pytest.mark.parametrize("content", [SQUEEZENET, b"half a model"])
def test_a_file_that_keeps_changing_is_being_written(content, tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)

    class Touched(ModelFiles):
        def open(self, path: Path, location: str = ""):
            file = super().open(path, location)
            os.utime(path, ns=(0, 0))
            path.write_bytes(content)
            return file

    monkeypatch.setattr(reader, "ModelFiles", Touched)
    with pytest.raises(ModelError, match="is being written"):
        identify(ModelSource.of(path))


def test_data_that_is_cut_while_it_is_read_is_being_written(tmp_path, monkeypatch):
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())

    class Cut(ModelFiles):
        def open(self, path: Path, location: str = ""):
            path.write_bytes(WEIGHT.tobytes())
            file = super().open(path, location)
            os.truncate(path, 20)
            return file

    monkeypatch.setattr(reader, "ModelFiles", Cut)
    with pytest.raises(ModelError, match="is being written"):
        identity_of(linear(external(raw())), tmp_path)


def test_a_file_that_was_just_written_is_not_settled(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(SQUEEZENET)
    assert not identify(ModelSource.of(path)).is_settled
    assert identify(ModelSource.of(LIGHT[0])).is_settled


def test_the_package_does_not_load_onnx_or_numpy():
    script = "import sys, enginecache.model; print({'onnx', 'numpy', 'google.protobuf'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_a_forked_process_identifies_models_too():
    # blake3's own pool of threads does not survive a fork: the next update would wait forever.
    script = (
        "import os, signal, enginecache.model as model\n"
        "source = model.ModelSource.of(model_bytes())\n"
        "expected = model.identify(source)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(20)\n"
        "    os._exit(model.identify(source) != expected)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    maker = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "def model_bytes():\n"
        "    import numpy, small_onnx_models\n"
        "    big = numpy.zeros(20_000_000, numpy.uint8)\n"
        "    return small_onnx_models.linear(small_onnx_models.raw(big)).SerializeToString()\n"
    )
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", maker + script, str(Path(__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT_S)
    assert result.stdout == "0\n"


def outcome_of(data: bytes) -> ModelIdentity | ModelError:
    try:
        return identify(ModelSource.of(data, base_dir="/nonexistent"))
    except ModelError as error:
        return error


def survives(data: bytes) -> None:
    """Identify bytes that may be anything: an identity or a ModelError, and no other exception."""
    outcome = outcome_of(data)
    assert isinstance(outcome, ModelIdentity) or (outcome.what and outcome.fix)


@given(st.binary(max_size=300))
@example(b"\x08\x08")
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_model_or_bad_input(data):
    survives(data)


SEEDS = [place(form).SerializeToString() for place in PLACES for form in (raw(), external(raw(), offset=0, length=48))]


@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3)), min_size=1, max_size=4))
@settings(max_examples=500, deadline=None)
def test_a_damaged_model_is_a_model_or_bad_input(data, patches):
    for where, patch in patches:
        position = int(where * len(data))
        data = data[:position] + patch + data[position + len(patch) :]
    survives(data)


@given(st.floats(0, 1), st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_a_damaged_real_model_is_a_model_or_bad_input(where, byte):
    damaged = bytearray(SQUEEZENET)
    damaged[int(where * (len(damaged) - 1))] = byte
    survives(bytes(damaged))
