"""TensorRT reads the files that the key names, wherever their paths lead meanwhile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from builder_models import request_for
from models import linear, save

from enginecache.builders.pinning import pinned
from enginecache.errors import ModelChangedError
from enginecache.model import ModelSource, identify


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A link ``current`` to the first of two releases of one model with external weights."""
    for number in (1, 2):
        save(linear(seed=number), tmp_path / f"v{number}" / "m.onnx", external="w.bin")
    (tmp_path / "current").symlink_to("v1")
    return tmp_path


def lead(release: Path, to: str) -> None:
    (release / "next").symlink_to(to)
    (release / "next").rename(release / "current")


def request(release: Path):
    source = ModelSource.of(release / "current" / "m.onnx")
    work = release / "work"
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
        model.check()


def test_path_that_leads_elsewhere_before_the_build_is_a_changed_model(release):
    asked = request(release)
    lead(release, "v2")
    with pytest.raises(ModelChangedError), pinned(asked):
        pass


@pytest.mark.parametrize("name", ["m.onnx", "w.bin"])
def test_file_that_changes_while_it_is_read_is_a_changed_model(release, name):
    with pinned(request(release)) as model:
        path = release / "v1" / name
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        with pytest.raises(ModelChangedError):
            model.check()


def test_file_that_is_gone_is_a_changed_model(release):
    asked = request(release)
    (release / "v1/w.bin").unlink()
    with pytest.raises(ModelChangedError), pinned(asked):
        pass
