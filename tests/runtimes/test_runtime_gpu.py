"""On a GPU host: a real plan for another GPU than the one here."""

from __future__ import annotations

import pytest
from load_requests import request_for

from enginecache.errors import NoDeviceError
from enginecache.host.devices import current_device
from enginecache.host.targets import ComputeCapability
from enginecache.trt.load.deserialize import deserialize
from enginecache.trt.load.trial import ProcessTrial
from enginecache.trt.load.verdict import judge


def probe():
    try:
        return current_device()
    except NoDeviceError:
        return None


DEVICE = probe()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.rtx,
    pytest.mark.skipif(DEVICE is None, reason="probe: current_device finds no GPU"),
    pytest.mark.skipif(
        DEVICE is not None and DEVICE.compute_capability == ComputeCapability(8, 9), reason="probe: the GPU here is 8.9"
    ),
]


@pytest.mark.parametrize(
    "load", [lambda request: ProcessTrial()(request, DEVICE), deserialize], ids=["in a child", "here"]
)
def test_plan_for_another_gpu_is_refused_with_tensorrts_own_reason(rtx_plan, load):
    request = request_for(rtx_plan)
    verdict = judge(request, DEVICE, load(request))
    assert (verdict.outcome, verdict.is_lasting) == ("refused", True)
    assert "UNSUPPORTED_CC" in verdict.reason
    assert f"compute capability {DEVICE.compute_capability}" in verdict.reason
