"""Every call of TensorRT's builder, for ``tensorrt`` 8.6 to 11.4 and for ``tensorrt_rtx``.

Releases differ in what they have: that is asked with ``hasattr``, never read off a version. What a flavour has but
ignores, or cannot do, cannot be asked: that stands in :mod:`enginecache.key.support`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from enginecache.errors import NoDeviceError, ProfileError, TargetError, ToolchainError
from enginecache.host.targets import ComputeCapability, Reach, Target
from enginecache.host.toolchain import PORTABLE_COMPUTE_CAPABILITIES
from enginecache.key.options import BuildOptions
from enginecache.key.profiles import Profile, ShapeRange, format_range
from enginecache.key.support import IGNORED_OPTIONS, check_options
from enginecache.trt.build.explain import ParserProblem, explain_build, explain_parsing, product
from enginecache.trt.build.inputs import check_profiles, describe_renaming, network_inputs
from enginecache.trt.build.logs import BuildLog, make_logger, shown_warnings
from enginecache.trt.build.phases import PhaseReporter, Report, make_monitor
from enginecache.trt.build.plugins import load_plugins
from enginecache.trt.build.request import BuildRequest
from enginecache.trt.build.settings import apply_options, attach_timing_cache, timing_cache_of
from enginecache.trt.messages import clean_line, clean_lines


@dataclass(frozen=True)
class SerializedPlan:
    """A plan as TensorRT gives it back.

    Attributes:
        memory: An ``IHostMemory``: read it through ``memoryview``, without a copy.
        reach: The GPUs that the plan runs on.
        warnings: Lines that the user should see.
        timing_cache: The timing cache after the build; None where none was asked for.
        took_timing_cache: Whether the build began with the one that it was given.
    """

    memory: Any
    reach: Reach
    warnings: tuple[str, ...] = field(default=())
    timing_cache: bytes | None = None
    took_timing_cache: bool = False


def build_plan(
    trt: Any,
    request: BuildRequest,
    log: BuildLog,
    report: Report,
    after_parsing: Callable[[], None] = lambda: None,
) -> SerializedPlan:
    """Build one plan with the TensorRT module ``trt``. Blocks; call it once a process.

    TensorRT keeps the first logger that a process gives it, so a second build's lines would go to the first one's log.

    Args:
        trt: ``tensorrt`` or ``tensorrt_rtx``.
        request: What to build.
        log: Where TensorRT's lines go.
        report: Called with the phases, where the release has a progress monitor.
        after_parsing: Called when TensorRT has read the model's files, before it builds.

    Raises:
        BuildError: TensorRT refused the model, or gave no plan.
        ProfileError: The profiles lack something that only TensorRT knows of.
        TargetError: This TensorRT cannot build for the target.
        UnsupportedOptionError: It lacks what an option asks for, or does not take it.
        OptionError: A library of plugins is not the one that the key names.
        NoDeviceError: This TensorRT builds on a GPU, and finds none.
        ToolchainError: TensorRT gave no builder.
    """
    check_options(request.toolchain.flavour, request.options)
    logger = make_logger(trt, log)
    builder = _make_builder(trt, logger, request, log)
    config = builder.create_builder_config()
    # First what needs no model: an impossible target is reported at once, not after minutes of parsing.
    reach = _set_target(trt, config, request)
    left_out = apply_options(trt, builder, config, request, log)
    refusal = "" if request.timing_cache is None else attach_timing_cache(config, request.timing_cache, log)
    if refusal:
        left_out += (f"{product(request)} does not take the timing cache, and began with an empty one: {refusal}",)
    load_plugins(trt, builder, logger, request, log)
    network = builder.create_network(_network_flags(trt))
    # The parser owns the weights that the network points to, so it is kept until the plan is there.
    parser = trt.OnnxParser(network, logger)
    _parse(parser, request, log)
    after_parsing()
    model_inputs = request.identity.inputs
    inputs = network_inputs(network, model_inputs)
    check_profiles(inputs, request.profiles, model_inputs)
    trt_names = {entry.name: entry.trt_name for entry in inputs}
    for index, profile in enumerate(request.profiles):
        _add_profile(builder, config, index, profile, trt_names, log)
    if hasattr(trt, "IProgressMonitor"):
        monitor = make_monitor(trt, PhaseReporter(report))  # alive in this frame: nothing says that the config keeps it
        config.progress_monitor = monitor
    memory = builder.build_serialized_network(network, config)
    if memory is None:
        raise explain_build(request, log.errors)
    timing_cache = None if request.timing_cache is None else timing_cache_of(config)
    warnings = (*left_out, *describe_renaming(inputs), *_warnings(request, log))
    return SerializedPlan(memory, reach, warnings, timing_cache, bool(request.timing_cache) and not refusal)


def _make_builder(trt: Any, logger: Any, request: BuildRequest, log: BuildLog) -> Any:
    try:
        return trt.Builder(logger)
    except (TypeError, RuntimeError) as error:
        # pybind11 turns the null pointer of a failed factory into a TypeError.
        lines = clean_lines(log.errors)
        message = f"{product(request)} gave no builder: {lines[0] if lines else error}"
        raise ToolchainError(
            message, "`enginecache doctor` shows the driver, the GPUs and what each TensorRT needs."
        ) from error


def _network_flags(trt: Any) -> int:
    """Return EXPLICIT_BATCH where it exists: 8.6 needs it, 10 has it without effect, 11 and RTX know nothing else."""
    flags = trt.NetworkDefinitionCreationFlag
    return 1 << int(flags.EXPLICIT_BATCH) if hasattr(flags, "EXPLICIT_BATCH") else 0


def _parse(parser: Any, request: BuildRequest, log: BuildLog) -> None:
    source = request.source
    if source.data is None:
        is_parsed = parser.parse_from_file(_native(str(source.path)))
    else:
        # The path is never opened: its folder is where external data is looked for. Without one TensorRT takes the
        # process's current folder.
        folder = source.base_dir or request.work_dir
        is_parsed = parser.parse(source.data, _native(str(folder / "model.onnx")))
    problems = [_parser_problem(parser.get_error(index)) for index in range(parser.num_errors)]
    if not is_parsed or problems:
        log.refused_nodes += [problem.node for problem in problems if problem.node]
        raise explain_parsing(request, problems, log.errors)


def _native(path: str) -> str | bytes:
    """Return a path as pybind11 takes it: names that are not UTF-8 must come as bytes."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return path


def _parser_problem(error: Any) -> ParserProblem:
    node = error.node_name() if hasattr(error, "node_name") else ""
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    return ParserProblem(error.node(), node or "", operator or "", error.desc() or "")


def _add_profile(
    builder: Any, config: Any, index: int, profile: Profile, trt_names: Mapping[str, str], log: BuildLog
) -> None:
    trt_profile = builder.create_optimization_profile()
    for name, shapes in profile.ranges:
        set_range = trt_profile.set_shape_input if shapes.is_values else trt_profile.set_shape
        try:
            set_range(trt_names[name], shapes.minimum, shapes.optimum, shapes.maximum)
        except (ValueError, TypeError, RuntimeError) as error:
            raise _bad_range(index, name, shapes, clean_lines(log.errors)[:1] or [str(error)]) from error
    if config.add_optimization_profile(trt_profile) != index:
        reason = "; ".join(clean_lines(log.errors)[:1]) or "no reason given"
        message = f"TensorRT does not take profile {index} ({profile}): {reason}"
        raise ProfileError(message, "Give minimum <= optimum <= maximum for every input, in the ranks of the model.")


def _bad_range(index: int, name: str, shapes: ShapeRange, reasons: list[str]) -> ProfileError:
    what = "values" if shapes.is_values else "shapes"
    message = (
        f"TensorRT does not take the {what} {format_range(shapes)} for input {name!r} in profile {index}: {reasons[0]}"
    )
    return ProfileError(message, "Give minimum <= optimum <= maximum, in the rank of the model's input.")


def _set_target(trt: Any, config: Any, request: BuildRequest) -> Reach:
    """Set what the plan must run on, and return what it will reach."""
    wanted = request.target.compute_capabilities
    if not hasattr(config, "set_compute_capability"):
        return _device_target(request, wanted)
    if request.target.is_portable:
        return Reach(PORTABLE_COMPUTE_CAPABILITIES)
    buildable = _buildable(trt)
    for capability in wanted:
        if capability not in buildable:
            have = ", ".join(str(known) for known in sorted(buildable))
            message = f"{product(request)} cannot build for compute capability {capability}; it can for {have}"
            fix = (
                "Name one of these with --target, use --target portable, or build with --backend tensorrt on that GPU."
            )
            raise TargetError(message, fix)
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        if not config.set_compute_capability(buildable[capability], index):
            message = f"{product(request)} does not take compute capability {capability} among {request.target}"
            raise TargetError(message, "Build for each target on its own, or use --target portable.")
    return Reach(wanted)


def _buildable(trt: Any) -> dict[ComputeCapability, Any]:
    """Return the members ``SM89`` and so on of the enumeration, by their compute capability."""
    members = [name for name in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d{2,3}", name)]
    return {ComputeCapability.parse(name[2:]): getattr(trt.ComputeCapability, name) for name in members}


def _device_target(request: BuildRequest, wanted: tuple[ComputeCapability, ...]) -> Reach:
    """Return the reach of TensorRT's plan; it builds for the GPU that it builds on, so the target must be that one."""
    if request.device is None:
        message = f"{product(request)} builds on the GPU that the engine is for, and none was given"
        raise NoDeviceError(message, "Run on a host with that GPU, or name a --target with --backend tensorrt-rtx.")
    here = request.device.compute_capability
    reach = Reach(wanted, request.target.and_later)
    if not reach.covers_one(here) or len(wanted) > 1:
        name = request.device.name
        message = f"{product(request)} builds for the GPU that it runs on ({name}, {here}), not for {request.target}"
        raise TargetError(message, _elsewhere(request.target))
    return reach


def _elsewhere(target: Target) -> str:
    if target.and_later:
        first = target.compute_capabilities[-1]
        return f"Build on a GPU of compute capability {first} or later, or leave --hardware-compatibility out."
    return "Build on that GPU, or with --backend tensorrt-rtx."


def _warnings(request: BuildRequest, log: BuildLog) -> tuple[str, ...]:
    options, defaults = request.options.keyed(), BuildOptions().keyed()
    ignored = [
        f"{product(request)} ignores the {name.replace('_', ' ')}"
        for name in sorted(IGNORED_OPTIONS[request.toolchain.flavour])
        if options.get(name) != defaults.get(name)
    ]
    return (*ignored, *shown_warnings([clean_line(line) for line in log.warnings]))
