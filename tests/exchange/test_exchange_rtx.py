"""Real plans of TensorRT-RTX: inspected, adopted, carried, and served from a folder that cannot be written."""

import pytest
from mounts import read_only

from enginecache.cache import EngineCache
from enginecache.exchange.foreign import examine
from enginecache.exchange.loads_here import Host
from enginecache.host.toolchain import inspect_toolchains

pytestmark = pytest.mark.rtx

ASK = {"dims": {"batch": (1, 2, 4)}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return EngineCache(tmp_path_factory.mktemp("rtx") / "cache")


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    from models import linear, save

    return save(linear(name="pixels"), tmp_path_factory.mktemp("rtx") / "model.onnx")


@pytest.fixture(scope="module")
def built(cache, onnx_file):
    return cache.get(onnx_file, **ASK, target=["sm_86", "sm_89"])


def test_real_plan_is_inspected_and_its_entry_found(cache, built):
    found = cache.inspect(built.path)
    header = found.file.header
    (toolchain,) = [one.toolchain for one in inspect_toolchains() if one.flavour == "tensorrt-rtx"]
    assert (found.file.kind, header.flavour, header.tensorrt_version) == ("plan", "tensorrt-rtx", toolchain.version)
    assert header.compute_capabilities == ("8.6", "8.9")
    assert (found.file.is_complete, header.declared_size_bytes) == (True, built.size_bytes)
    assert (found.file.digest, found.record) == (built.digest, built.record)
    assert header.weights_bytes > 0
    verdict = found.loads_here.verdict
    assert verdict in ({"no"} if Host.here().device is None else {"unknown", "no"})


def test_every_eighth_truncation_of_a_real_plan_is_found(built):
    data = built.path.read_bytes()
    for size in [*range(200), *range(200, len(data), 8)]:
        assert examine(data[:size], built.path).is_damaged


def test_real_plan_is_adopted_for_its_model(built, onnx_file, tmp_path):
    other = EngineCache(tmp_path / "other")
    adopted = other.adopt(built.path, onnx_file, **ASK, target="sm_89")
    assert "input_names" in adopted.verified
    taken = other.get(onnx_file, **ASK, target="sm_89", accept="compatible", offline=True)
    assert (taken.outcome, taken.digest) == ("compatible", built.digest)


def test_bundle_in_an_image_is_served_read_only(cache, built, onnx_file, tmp_path):
    """As ``RUN enginecache import engines.tar --dir /opt/engines`` in a Dockerfile makes it."""
    cache.export([built], tmp_path / "engines.tar")
    EngineCache(tmp_path / "opt").import_bundle(tmp_path / "engines.tar")
    with read_only(tmp_path / "opt"):
        served = EngineCache(tmp_path / "opt")
        entry = served.get(onnx_file, **ASK, target="sm_89", offline=True)
        assert (entry.outcome, entry.digest) == ("hit", built.digest)
        assert served.inspect(entry.path).record is not None
        assert served.verify(deep=True).is_clean
