"""A builder for counting, hanging and failing, and the placement that goes with it. For what a real one cannot show."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from enginecache.cache import EngineCache
from enginecache.config import Config
from enginecache.host.devices import Device
from enginecache.host.targets import ComputeCapability, Target
from enginecache.host.toolchain import Toolchain
from enginecache.pipeline.placement import Placement, required_reach
from enginecache.trt.build.request import BuildProgress, BuildRequest, BuiltPlan, ProgressCallback

TOOLCHAIN = Toolchain("tensorrt-rtx", "1.7.1.116", 13, "linux", "x86_64")
SM_89 = ComputeCapability(8, 9)
H100 = Device(
    ordinal=0,
    name="NVIDIA H100 80GB HBM3",
    compute_capability=ComputeCapability(9, 0),
    sm_count=132,
    memory_bytes=85_017_493_504,
    uuid="GPU-00000000-0000-0000-0000-000000000001",
    pci_bus_id="00000000:17:00.0",
    driver_version="580.65.06",
    cuda_driver_version=(13, 0),
)


class FakeBuilder:
    """Writes a plan that depends on everything in the request, and counts.

    Args:
        seconds: How long a build takes.
        before: Called with the request in the middle of a build; may raise.
        size_bytes: Size of the plan.
    """

    def __init__(
        self,
        seconds: float = 0.0,
        before: Callable[[BuildRequest], None] | None = None,
        size_bytes: int = 4096,
    ) -> None:
        self.seconds = seconds
        self.before = before
        self.size_bytes = size_bytes
        self.requests: list[BuildRequest] = []
        self._guard = threading.Lock()

    @property
    def count(self) -> int:
        return len(self.requests)

    def build(self, request: BuildRequest, progress: ProgressCallback | None = None) -> BuiltPlan:
        with self._guard:
            self.requests.append(request)
        request.log_path.write_text("a fake build\n", encoding="utf-8")
        if progress is not None:
            progress(BuildProgress("Building engine", 3, 6, 0.0))
        time.sleep(self.seconds)
        if self.before is not None:
            self.before(request)
        seed = repr((request.identity.digest, request.profiles, request.options, request.toolchain, request.target))
        block = hashlib.sha256(seed.encode()).digest()
        plan = request.work_dir / "plan"
        plan.write_bytes((b"vtrt" + block * (self.size_bytes // 32 + 1))[: self.size_bytes])
        return BuiltPlan(
            plan_path=plan,
            build_seconds=max(self.seconds, 0.001),
            reach=required_reach(request.target),
            loaded_version=request.toolchain.version,
        )


class ConstantBuilder(FakeBuilder):
    """Builds the same bytes whatever is asked."""

    def build(self, request: BuildRequest, progress: ProgressCallback | None = None) -> BuiltPlan:
        """Like its base, with other bytes."""
        built = super().build(request, progress)
        built.plan_path.write_bytes(b"the same plan")
        return built


def fake_place(
    backend: str = "auto",
    target: Target | None = None,
    device_ordinal: int | None = None,
    *,
    toolchain: Toolchain = TOOLCHAIN,
    device: Device | None = None,
    **_: Any,
) -> Placement:
    """TensorRT-RTX of a fixed version, for sm_89 unless a target is named."""
    return Placement(toolchain, target or Target((SM_89,)), device, ("given by the test",))


def place_with(**given: Any) -> Callable[..., Placement]:
    """A placement with another toolchain or device."""
    return lambda *args, **kwargs: fake_place(*args, **{**kwargs, **given})


def fake_cache(
    folder: Path, builder: FakeBuilder | None = None, place: Any = fake_place, **settings: Any
) -> EngineCache:
    """A cache whose builder counts instead of building."""
    config = replace(Config(dir=folder), **settings)
    return EngineCache(config, builder=builder or FakeBuilder(), place=place)
