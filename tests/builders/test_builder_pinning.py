"""TensorRT reads the files that the key names, wherever their paths lead meanwhile."""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builder_models import graph_model, request_for, tensor
from held_worker import builders_that_stop, go_on, held_workers
from models import linear, save
from onnx import helper, numpy_helper

from enginecache.cache import EngineCache
from enginecache.config import Config
from enginecache.errors import BuildError, ModelChangedError
from enginecache.files import fingerprint
from enginecache.files.digest import digest_of
from enginecache.files.fingerprint import Fingerprint
from enginecache.key.options import PluginLibrary
from enginecache.model import ModelSource, identify
from enginecache.trt import plugin_libraries
from enginecache.trt.build import open_files
from enginecache.trt.build.open_files import pinned

SETTLED_S = 0.1


@pytest.fixture(autouse=True)
def _short_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "SETTLE_NS", 50_000_000)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A link ``current`` to the first of two releases of one model with external weights."""
    for number in (1, 2):
        save(linear(seed=number), tmp_path / f"v{number}" / "m.onnx", external="w.bin")
    (tmp_path / "current").symlink_to("v1")
    return tmp_path


@pytest.fixture
def settled(release: Path) -> Path:
    """The same, so old that a fingerprint stands for the bytes."""
    time.sleep(SETTLED_S)
    assert request(release, "unused").identity.is_settled
    return release


def lead(release: Path, to: str) -> None:
    (release / "next").symlink_to(to)
    (release / "next").rename(release / "current")


def request(release: Path, name: str = "work"):
    source = ModelSource.of(release / "current" / "m.onnx")
    work = release / name
    work.mkdir()
    made = request_for(work)
    return replace(made, source=source, identity=identify(source), work_dir=work)


def test_path_that_leads_elsewhere_and_back_changes_nothing_that_is_read(release):
    with pinned(request(release)) as model:
        lead(release, "v2")
        seen = model.request.source.path
        assert seen.read_bytes() == (release / "v1/m.onnx").read_bytes()
        assert (seen.parent / "w.bin").read_bytes() == (release / "v1/w.bin").read_bytes()
        assert identify(model.request.source).digest == identify(ModelSource.of(release / "v1/m.onnx")).digest
        lead(release, "v1")


def test_path_that_leads_elsewhere_before_the_build_is_a_changed_model(release):
    asked = request(release)
    lead(release, "v2")
    with pytest.raises(ModelChangedError), pinned(asked):
        pass


@pytest.mark.parametrize("name", ["m.onnx", "w.bin"])
def test_file_that_changes_while_it_is_read_is_a_changed_model(release, name):
    path = release / "v1" / name
    with pytest.raises(ModelChangedError), pinned(request(release)):
        path.write_bytes(path.read_bytes()[:-1] + b"!")


@pytest.mark.parametrize("name", ["m.onnx", "w.bin"])
def test_change_is_seen_when_tensorrt_has_parsed(release, name):
    path = release / "v1" / name
    seen = []

    def change_and_look(model):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        with pytest.raises(ModelChangedError) as early:
            model.compare()
        seen.append(early.value)

    with pytest.raises(ModelChangedError), pinned(request(release)) as model:
        change_and_look(model)
    assert seen


def rewrite_and_restore(path: Path) -> None:
    """Write other bytes, then the old ones, and set the old times: ``rsync --inplace -t`` there and back."""
    before, content = path.stat(), path.read_bytes()
    path.write_bytes(bytes(len(content)))
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("has_notices", [True, False])
def test_file_that_was_rewritten_and_restored_meanwhile_is_a_changed_model(settled, monkeypatch, has_notices):
    if not has_notices:
        monkeypatch.setattr(open_files._Writes, "seen", lambda self: None)
    with pytest.raises(ModelChangedError), pinned(request(settled)):
        rewrite_and_restore(settled / "v1/w.bin")


def replace_by_rename(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    other.rename(path)


@pytest.mark.parametrize(
    "act",
    [
        replace_by_rename,
        Path.unlink,
        lambda path: path.rename(path.with_name("moved")),
        lambda path: path.with_name("linked").hardlink_to(path),
        lambda path: path.chmod(0o640),
        lambda path: path.read_bytes(),
    ],
    ids=["replaced", "deleted", "renamed", "linked", "mode", "read"],
)
@pytest.mark.parametrize("name", ["m.onnx", "w.bin"])
def test_what_leaves_the_bytes_as_they_were_costs_no_build(settled, act, name):
    with pinned(request(settled)):
        act(settled / "v1" / name)


def test_without_notices_a_change_of_ctime_is_a_changed_model(settled, monkeypatch):
    monkeypatch.setattr(open_files._Writes, "seen", lambda self: None)
    with pytest.raises(ModelChangedError), pinned(request(settled)):
        (settled / "v1/w.bin").chmod(0o640)


def test_change_through_a_mapping_whose_page_is_dirty_is_seen(release):
    path = release / "v1/w.bin"
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[0] ^= 1  # the times move here, and then not before the kernel has written the page
        time.sleep(SETTLED_S)
        with pytest.raises(ModelChangedError), pinned(request(release)):
            mapped[0] ^= 1


def test_external_data_of_model_bytes_is_compared_too(settled):
    source = ModelSource.of((settled / "v1/m.onnx").read_bytes(), settled / "v1")
    asked = replace(request(settled), source=source, identity=identify(source))
    with pytest.raises(ModelChangedError), pinned(asked):
        rewrite_and_restore(settled / "v1/w.bin")


def test_young_file_is_read_again(release, monkeypatch):
    monkeypatch.setattr(open_files._Writes, "seen", lambda self: None)
    asked = request(release)
    path = release / "v1/w.bin"
    path.write_bytes(bytes(path.stat().st_size))
    young = [
        replace(file, fingerprint=Fingerprint.of_path(asked.source.path_of(file.location)))
        for file in asked.identity.files
    ]
    asked = replace(asked, identity=replace(asked.identity, files=tuple(young), is_settled=False))
    with pytest.raises(ModelChangedError), pinned(asked):
        pass


def test_a_refusal_of_a_changed_model_is_a_changed_model(release):
    def refuse():
        (release / "v1/w.bin").write_bytes(b"short")
        raise BuildError("the parser refuses it")

    with pytest.raises(ModelChangedError) as caught, pinned(request(release)):
        refuse()
    assert isinstance(caught.value.__cause__, BuildError)


def test_a_refusal_of_an_unchanged_model_stays_one(release):
    with pytest.raises(BuildError, match="refuses"), pinned(request(release)):
        raise BuildError("the parser refuses it")


def test_a_plugin_library_that_is_written_to_while_building_is_a_change(release, monkeypatch):
    library = release / "libplugin.so"
    library.write_bytes(b"code")
    plugin = PluginLibrary(library, digest_of(b"code"))
    with library.open("rb") as file:
        monkeypatch.setattr(plugin_libraries, "_REGISTERED", [(file.fileno(), plugin)])
        with pinned(request(release)):
            pass
        with pytest.raises(ModelChangedError, match=r"libplugin\.so changed"), pinned(request(release, "again")):
            library.write_bytes(b"edoc")


def test_file_that_is_gone_is_a_changed_model(release):
    asked = request(release)
    (release / "v1/w.bin").unlink()
    with pytest.raises(ModelChangedError), pinned(asked):
        pass


# With TensorRT-RTX, which maps external data and reads it while it builds


WIDTH = 512


def two_layers(folder: Path, number: float = 1.25) -> Path:
    """A model whose weights are all ``number``, in a file of 2 MiB next to it."""
    weights = np.full((WIDTH, WIDTH), number, np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(weights, name) for name in ("a", "b")]
    return save(graph_model(nodes, [tensor("x", [4, WIDTH])], tensors), folder / "m.onnx", external="w.bin")


class Act:
    """A progress callback that does something once, in the middle of TensorRT's build."""

    def __init__(self, action) -> None:
        self.action = action
        self.is_done = False

    def __call__(self, step) -> None:
        if step.phase != "Starting" and not self.is_done:
            self.is_done = True
            (worker,) = held_workers()
            self.action()
            go_on(worker)


def write_other_weights(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(np.full(2 * WIDTH * WIDTH, 7.75, np.float32).tobytes())


@pytest.mark.rtx
@pytest.mark.parametrize("is_bytes", [False, True], ids=["path", "bytes"])
@pytest.mark.parametrize("change", [write_other_weights, lambda path: os.truncate(path, 0)], ids=["written", "cut"])
def test_weights_that_change_during_a_real_build_are_published_under_no_key(tmp_path, builder, change, is_bytes):
    path = two_layers(tmp_path)
    weights = tmp_path / "w.bin"
    time.sleep(SETTLED_S)
    cache = EngineCache(Config(dir=tmp_path / "cache"), builder=builder)
    model, asked = (path.read_bytes(), {"base_dir": tmp_path}) if is_bytes else (path, {})
    act = Act(lambda: change(weights))
    with pytest.raises(ModelChangedError), builders_that_stop():
        cache.get(model, target="sm_89", progress=act, **asked)
    assert act.is_done
    assert cache.entries() == []
    weights.unlink()  # onnx appends to a file that is there
    two_layers(tmp_path)
    entry = cache.get(model, target="sm_89", **asked)
    assert entry.outcome == "built"
    assert np.full(64, 1.25, np.float32).tobytes() in entry.path.read_bytes()


@pytest.mark.rtx
def test_model_that_is_replaced_by_another_during_a_real_build_is_built_as_it_was(tmp_path, builder):
    path = two_layers(tmp_path)
    time.sleep(SETTLED_S)
    cache = EngineCache(Config(dir=tmp_path / "cache"), builder=builder)
    act = Act(lambda: replace_by_rename(tmp_path / "w.bin"))
    with builders_that_stop():
        entry = cache.get(path, target="sm_89", progress=act)
    assert act.is_done
    assert entry.outcome == "built"
    assert np.full(64, 1.25, np.float32).tobytes() in entry.path.read_bytes()
