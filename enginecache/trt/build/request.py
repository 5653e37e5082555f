"""The contract of a builder: its request, its progress and its plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from enginecache.environment import Pairs
from enginecache.host.devices import Device
from enginecache.host.targets import Reach, Target
from enginecache.host.toolchain import Toolchain
from enginecache.key.options import BuildOptions
from enginecache.key.precision import Conversion
from enginecache.key.profiles import Profile
from enginecache.model import ModelIdentity, ModelSource


@dataclass(frozen=True)
class BuildRequest:
    """Everything that decides a plan, and the folder to work in.

    Attributes:
        source: The model's path or bytes.
        identity: The model as the key has it; its files are compared again when the plan is complete.
        profiles: In order; empty for a static model.
        options: Builder options.
        toolchain: The TensorRT of the key; compared with what is really loaded.
        target: What the plan must run on.
        device: The device to build on; None where no GPU takes part.
        work_dir: A private, empty folder of this build; the plan is written there.
        log_path: Where the log goes; created by the builder.
        conversion: What is done to the graph before TensorRT parses it; None for nothing.
        timing_cache: A timing cache to start from, or no bytes for a new one; None for a build without. Bytes of
            ``ITimingCache.serialize``.
        environment: Variables that the builder is given, as they were when the key was made; None for those of the
            process. See :mod:`enginecache.environment`.
    """

    source: ModelSource
    identity: ModelIdentity
    profiles: tuple[Profile, ...]
    options: BuildOptions
    toolchain: Toolchain
    target: Target
    device: Device | None
    work_dir: Path
    log_path: Path
    conversion: Conversion | None = None
    timing_cache: bytes | None = None
    environment: Pairs | None = None


@dataclass(frozen=True)
class BuildProgress:
    """One step of a build.

    Attributes:
        phase: TensorRT's name of the innermost running phase that counts its steps, such as ``Optimizing graph``;
            before it ``Starting``, and ``Converting the graph`` where that is done.
        step: The step of the phase that runs, from 1; None where it does not count.
        step_count: Number of steps of the phase; None where it does not count. The next phase begins at 1 again.
        elapsed_seconds: Since the builder started.
    """

    phase: str
    step: int | None
    step_count: int | None
    elapsed_seconds: float


ProgressCallback = Callable[[BuildProgress], None]


@dataclass(frozen=True)
class BuiltPlan:
    """A finished plan in the builder's own folder.

    Attributes:
        plan_path: The plan; the builder has closed it.
        build_seconds: From the start of the builder to the written plan.
        reach: The GPUs that the plan really runs on.
        loaded_version: Version that the loaded library reported.
        warnings: Lines that the user should see.
        timing_cache: The timing cache after the build; None for a build without.
        took_timing_cache: Whether it began with the one that it was given.
    """

    plan_path: Path
    build_seconds: float
    reach: Reach
    loaded_version: str
    warnings: tuple[str, ...] = field(default=())
    timing_cache: bytes | None = None
    took_timing_cache: bool = False


class Builder(Protocol):
    """A maker of plans. Safe to call from several threads at once."""

    def build(self, request: BuildRequest, progress: ProgressCallback | None = None) -> BuiltPlan:
        """Build the plan; block until it is complete.

        Raises:
            BuildError: TensorRT refused or failed; the reason is in the message and the log.
            BuilderCrashError: The builder process died.
            ModelChangedError: The model's files changed since ``request.identity`` was taken.
            ProfileError: TensorRT wants something of the profiles that the ONNX graph alone does not show.
            ToolchainError: Another TensorRT than ``request.toolchain`` was loaded, or none could be.
            TargetError: The loaded TensorRT cannot build for ``request.target``.
        """
        ...
