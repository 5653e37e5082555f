"""Fixtures of the runtimes' tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The models, processes and listed releases of the builders' tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "builders"))


@pytest.fixture(scope="session")
def rtx_plan(tmp_path_factory):
    """A real plan of TensorRT-RTX for compute capability 8.9."""
    pytest.importorskip("tensorrt_rtx", reason="probe: no module tensorrt_rtx")
    import builder_models as models

    from enginecache.trt.build.process import ProcessBuilder

    request = models.request_for(tmp_path_factory.mktemp("plan"), models.conv_model(), profiles=models.BATCHES)
    return ProcessBuilder().build(request).plan_path


@pytest.fixture
def no_driver():
    """A machine without an NVIDIA driver."""
    from enginecache.errors import NoDeviceError
    from enginecache.host.devices import list_devices

    try:
        list_devices()
    except NoDeviceError:
        return
    pytest.skip("probe: a GPU is here")
