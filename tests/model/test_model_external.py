"""External data: where it may lie, and what is refused."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from small_onnx_models import WEIGHT, external, identity_of, linear, raw

from enginecache.errors import ModelError
from enginecache.files.digest import BUFFER_BYTES
from enginecache.files.fingerprint import Fingerprint
from enginecache.model import ModelSource, has_changed, identify

EXPECTED = identity_of(linear())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    return tmp_path


@pytest.fixture
def never_blocks():
    """Ends a test that waits for a writer which never comes."""
    signal.alarm(10)
    yield
    signal.alarm(0)


def refused(tensor: TensorProto, folder, text: str) -> ModelError:
    with pytest.raises(ModelError, match=text) as caught:
        identity_of(linear(tensor), folder)
    assert caught.value.fix
    return caught.value


def save(model: onnx.ModelProto, path) -> ModelSource:
    path.write_bytes(model.SerializeToString())
    return ModelSource.of(path)


def test_a_model_saved_by_onnx_with_external_data_is_the_same_model(tmp_path):
    onnx.save(linear(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    identity = identify(ModelSource.of(tmp_path / "m.onnx"))
    assert identity.digest == EXPECTED.digest
    assert [file.location for file in identity.files] == ["", "m.data"]


def test_files_are_the_model_and_then_each_data_file_once(tmp_path):
    model = linear(external(raw(), "b.bin"))
    for name, location in [("v", "a.bin"), ("u", "b.bin"), ("t", "./b.bin")]:
        model.graph.initializer.append(external(raw(name=name), location))
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(WEIGHT.tobytes())
    source = save(model, tmp_path / "m.onnx")
    files = identify(source).files
    assert [file.location for file in files] == ["", "b.bin", "a.bin"]
    assert [file.fingerprint for file in files] == [
        Fingerprint.of_path(tmp_path / name) for name in ("m.onnx", "b.bin", "a.bin")
    ]


def test_a_changed_data_file_is_another_model_and_is_noticed_by_its_stat(folder):
    source = save(linear(external(raw())), folder / "m.onnx")
    before = identify(source)
    assert not has_changed(source, before)
    (folder / "w.bin").write_bytes(WEIGHT[::-1].tobytes())
    assert has_changed(source, before)
    after = identify(source)
    assert after.structure == before.structure
    assert after.weights != before.weights


@pytest.mark.parametrize("size", [BUFFER_BYTES - 31, BUFFER_BYTES, 2 * BUFFER_BYTES + 5])
def test_tensors_around_the_size_of_a_buffer_are_read_whole(size, tmp_path):
    array = np.random.default_rng(7).integers(0, 256, size, np.uint8)
    (tmp_path / "w.bin").write_bytes(array.tobytes())
    inside, outside = identity_of(linear(raw(array))), identity_of(linear(external(raw(array))), tmp_path)
    assert outside.digest == inside.digest
    array[-1] ^= 1
    (tmp_path / "w.bin").write_bytes(array.tobytes())
    assert identity_of(linear(external(raw(array))), tmp_path).weights != inside.weights


def test_symbolic_links_are_followed_from_the_folder_of_the_path_as_given(tmp_path):
    # As model hubs lay it out: a snapshot folder of links into a folder of blobs.
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    save(linear(external(raw())), blobs / "1234")
    (blobs / "5678").write_bytes(WEIGHT.tobytes())
    (snapshot / "m.onnx").symlink_to("../blobs/1234")
    (snapshot / "w.bin").symlink_to("../blobs/5678")
    assert identify(ModelSource.of(snapshot / "m.onnx")).digest == EXPECTED.digest


@pytest.mark.parametrize("location", ["w.bin", "./w.bin", "a b\n.bin", "w.bin:1", "ü.bin", "..w.bin", "deep/er/w.bin"])
def test_any_file_name_inside_the_folder_is_legal(location, folder):
    path = folder / location
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(WEIGHT.tobytes())
    assert identity_of(linear(external(raw(), location)), folder).digest == EXPECTED.digest


@pytest.mark.parametrize(
    "location",
    [
        "",
        "..",
        "../w.bin",
        "a/../w.bin",
        "a/../../w.bin",
        "..\\w.bin",
        "a\\..\\w.bin",
        "/etc/passwd",
        "\\w.bin",
        "\\\\host\\share\\w.bin",
        "C:\\w.bin",
        "c:w.bin",
        "w.bin\0",
    ],
)
def test_a_location_that_could_leave_the_folder_is_refused(location, folder):
    refused(external(raw(), location), folder, "not a path inside the model's folder")


def test_a_missing_location_is_refused(folder):
    tensor = external(raw())
    del tensor.external_data[:]
    refused(tensor, folder, "not a path inside")


def test_a_location_that_is_not_utf8_is_refused(folder):
    data = linear(external(raw())).SerializeToString().replace(b"w.bin", b"w.\xff\xfen")
    with pytest.raises(ModelError, match="cannot be read"):
        identify(ModelSource.of(data, folder))


def test_a_missing_file_is_refused_by_its_path(tmp_path):
    error = refused(external(raw()), tmp_path, "there is no file")
    assert str(tmp_path / "w.bin") in error.what


def test_a_folder_is_not_data(tmp_path):
    (tmp_path / "w.bin").mkdir()
    refused(external(raw()), tmp_path, "is a folder")


@pytest.mark.usefixtures("never_blocks")
def test_a_fifo_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "w.bin")
    refused(external(raw()), tmp_path, "not a regular file")
    with pytest.raises(ModelError, match="not a regular file"):
        identify(ModelSource.of(tmp_path / "w.bin"))


def test_a_device_is_refused(tmp_path):
    (tmp_path / "w.bin").symlink_to("/dev/zero")
    refused(external(raw()), tmp_path, "not a regular file")


def test_a_link_to_itself_and_a_name_too_long_are_refused(tmp_path):
    (tmp_path / "w.bin").symlink_to("w.bin")
    refused(external(raw()), tmp_path, "cannot be read")
    refused(external(raw(), "w" * 300), tmp_path, "cannot be read")


@pytest.mark.parametrize("entries", [{"offset": 1}, {"offset": 1, "length": 48}, {"offset": 1 << 62}])
def test_a_range_beyond_the_file_is_refused(entries, folder):
    error = refused(external(raw(), **entries), folder, "too short")
    assert "the file at 48" in error.what


def test_an_offset_at_the_end_of_the_file_is_no_place_for_a_tensor(folder):
    refused(external(raw(), offset=48), folder, "too short")


@pytest.mark.parametrize("length", [0, 47, 49])
def test_a_length_that_is_not_the_tensors_is_refused(length, folder):
    # TensorRT reads length 0 as "the whole file", the onnx package as nothing.
    refused(external(raw(), length=length), folder, "takes 48 bytes")


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize("text", ["-1", "", "1.0", "0x10", "1e3", " 0", "1_0", "\u0660", "9" * 19, "9" * 5000])
def test_a_number_that_readers_could_take_differently_is_refused(key, text, folder):
    refused(external(raw(), **{key: text}), folder, "not a number of bytes")


def test_a_key_that_nobody_knows_is_refused(folder):
    refused(external(raw(), compression="zstd"), folder, "compression")


def test_a_key_that_is_there_twice_is_refused(folder):
    tensor = external(raw())
    tensor.external_data.add(key="location", value="other.bin")
    refused(tensor, folder, "location")


def test_external_data_beside_data_of_its_own_is_refused(folder):
    tensor = external(raw())
    tensor.raw_data = WEIGHT.tobytes()
    refused(tensor, folder, "inline data")


def test_external_strings_are_refused(folder):
    tensor = external(TensorProto(name="w", data_type=TensorProto.STRING, dims=[1]))
    refused(tensor, folder, "strings")


def test_entries_without_the_external_location_flag_are_not_followed(folder):
    tensor = raw()
    tensor.external_data.add(key="location", value="/etc/passwd")
    assert identity_of(linear(tensor), folder).digest == EXPECTED.digest


def test_a_shape_of_petabytes_costs_nothing(folder):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 50])
    refused(external(tensor), folder, "too short")


def test_an_empty_tensor_takes_nothing_from_its_file(folder):
    empty = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[0, 4])
    inside = identity_of(linear(empty)).digest
    assert identity_of(linear(external(empty)), folder).digest == inside
    assert identity_of(linear(external(empty, length=0, offset=48)), folder).digest == inside


def test_bytes_with_external_data_need_a_folder():
    error = refused(external(raw()), None, "no folder")
    assert "base_dir" in error.fix


def test_bytes_list_only_their_data_files(folder):
    identity = identity_of(linear(external(raw())), folder)
    assert [file.location for file in identity.files] == ["w.bin"]
    assert identity_of(linear()).files == ()


def test_a_git_lfs_pointer_instead_of_the_data_is_named_as_one(folder):
    (folder / "w.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 48\n")
    error = refused(external(raw(), offset=4096), folder, "too short")
    assert "git lfs pull" in error.fix


def test_a_thousand_data_files_need_one_descriptor_at_a_time(tmp_path):
    import resource

    model = linear()
    for index in range(300):
        (tmp_path / f"{index}.bin").write_bytes(WEIGHT.tobytes())
        model.graph.initializer.append(external(raw(name=f"w{index}"), f"{index}.bin"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        identity = identity_of(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(identity.files) == 300


# Links: a location that is a path inside the folder may lead out of it all the same


@pytest.fixture
def elsewhere(tmp_path):
    """A file with the weights, outside the folder ``model`` that the test makes."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/w.bin").write_bytes(WEIGHT.tobytes())
    (tmp_path / "model").mkdir()
    return tmp_path / "elsewhere/w.bin"


def link_file(folder, target):
    (folder / "w.bin").symlink_to(target)
    return "w.bin"


def link_relative(folder, target):
    (folder / "w.bin").symlink_to(os.path.relpath(target, folder))
    return "w.bin"


def link_folder(folder, target):
    (folder / "data").symlink_to(target.parent)
    return f"data/{target.name}"


def link_chain(folder, target):
    (folder / "two").symlink_to(target)
    (folder / "w.bin").symlink_to("two")
    return "w.bin"


LINKS = [link_file, link_relative, link_folder, link_chain]


@pytest.mark.parametrize("link", LINKS)
def test_a_link_that_leaves_the_folder_is_refused_unless_that_is_allowed(link, elsewhere, tmp_path):
    folder = tmp_path / "model"
    model = linear(external(raw(), link(folder, elsewhere)))
    for source in (save(model, folder / "m.onnx"), ModelSource.of(model.SerializeToString(), folder)):
        with pytest.raises(ModelError, match="leaves the model's folder") as caught:
            identify(source)
        assert str(elsewhere) in caught.value.what
        assert "ENGINECACHE_FOLLOW_LINKS=yes" in caught.value.fix
        found = identify(replace(source, follows_links=True))
        assert found.digest == EXPECTED.digest
        assert found.has_links_out


@pytest.mark.parametrize("link", LINKS)
def test_a_link_that_stays_in_the_folder_is_followed(link, folder):
    (folder / "deep").mkdir()
    (folder / "w.bin").rename(folder / "deep/weights")
    source = save(linear(external(raw(), link(folder, folder / "deep/weights"))), folder / "m.onnx")
    found = identify(source)
    assert found.digest == EXPECTED.digest
    assert not found.has_links_out


def test_a_link_may_lead_into_the_folder_that_the_model_itself_is_a_link_into(elsewhere, tmp_path):
    save(linear(external(raw())), elsewhere.parent / "m.onnx")
    for name in ("m.onnx", "w.bin"):
        (tmp_path / "model" / name).symlink_to(elsewhere.parent / name)
    assert identify(ModelSource.of(tmp_path / "model/m.onnx")).digest == EXPECTED.digest


def test_a_folder_that_is_a_link_itself_is_the_folder_it_leads_to(folder, tmp_path_factory):
    save(linear(external(raw())), folder / "m.onnx")
    current = tmp_path_factory.mktemp("releases") / "current"
    current.symlink_to(folder)
    assert identify(ModelSource.of(current / "m.onnx")).digest == EXPECTED.digest


@pytest.mark.parametrize("inner", ["", "onnx"])
@pytest.mark.parametrize("is_model_a_link", [True, False])
def test_a_model_hubs_blobs_are_followed(inner, is_model_a_link, tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123abc" / inner, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "5678").write_bytes(WEIGHT.tobytes())
    model = linear(external(raw(), "m.onnx_data"))
    (snapshot / "m.onnx_data").symlink_to(os.path.relpath(blobs / "5678", snapshot))
    if is_model_a_link:
        save(model, blobs / "1234")
        (snapshot / "m.onnx").symlink_to(os.path.relpath(blobs / "1234", snapshot))
    else:
        save(model, snapshot / "m.onnx")
    for source in (ModelSource.of(snapshot / "m.onnx"), ModelSource.of(model.SerializeToString(), snapshot)):
        assert identify(source).digest == EXPECTED.digest


@pytest.mark.parametrize("target", ["other/blobs/5678", "blobs/deep/5678", "refs/5678", "snapshots/other/5678"])
def test_what_is_not_among_the_repositorys_own_blobs_is_refused(target, tmp_path):
    snapshot = tmp_path / "hub" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    path = tmp_path / "hub" / target
    path.parent.mkdir(parents=True)
    path.write_bytes(WEIGHT.tobytes())
    (snapshot / "w.bin").symlink_to(path)
    with pytest.raises(ModelError, match="leaves the model's folder"):
        identify(save(linear(external(raw())), snapshot / "m.onnx"))


def test_blobs_that_are_a_link_to_elsewhere_are_refused(elsewhere, tmp_path):
    snapshot = tmp_path / "hub" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "blobs").symlink_to(elsewhere.parent)
    (snapshot / "w.bin").symlink_to("../../blobs/w.bin")
    with pytest.raises(ModelError, match="leaves the model's folder"):
        identify(save(linear(external(raw())), snapshot / "m.onnx"))


def test_a_mounted_volume_of_kubernetes_is_followed(tmp_path):
    data = tmp_path / "..2026_11_30_20_57_00.123"
    data.mkdir()
    (data / "w.bin").write_bytes(WEIGHT.tobytes())
    save(linear(external(raw())), data / "m.onnx")
    (tmp_path / "..data").symlink_to(data.name)
    for name in ("m.onnx", "w.bin"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    assert identify(ModelSource.of(tmp_path / "m.onnx")).digest == EXPECTED.digest


def test_a_link_that_is_led_out_of_the_folder_when_it_was_looked_at_is_refused(folder, elsewhere, monkeypatch):
    """The file that was opened counts, and not the one that the link led to before."""
    (folder / "model/inside.bin").write_bytes(WEIGHT.tobytes())
    path = folder / "model/w.bin"
    path.symlink_to("inside.bin")
    source = save(linear(external(raw())), folder / "model/m.onnx")
    open_file = os.open

    def lead_out_and_open(name, flags, *rest):
        if name == path:
            path.unlink()
            path.symlink_to(elsewhere)
        return open_file(name, flags, *rest)

    monkeypatch.setattr(os, "open", lead_out_and_open)
    with pytest.raises(ModelError, match="leaves the model's folder"):
        identify(source)


@pytest.mark.parametrize("target", ["/proc/self/environ", "/proc/self/mem", "/dev/zero", "/etc/passwd"])
def test_files_of_the_system_never_become_weights(target, tmp_path, never_blocks):
    tensor = external(TensorProto(name="w", data_type=TensorProto.UINT8, dims=[16]))
    (tmp_path / "w.bin").symlink_to(target)
    refused(tensor, tmp_path, r"leaves the model's folder|not a regular file|may not be read")
