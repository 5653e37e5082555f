"""A TensorRT module with exactly the names of one release's bindings, for releases that cannot run here.

The names come from ``data/api-*.json``. What a name does is by hand below, for the few that the adapter may use; a
listed name without a behaviour fails the test when it is touched, and a name that is not listed raises
``AttributeError`` as the real bindings do.
"""

from __future__ import annotations

import enum
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import builder_models as models

from enginecache.host.toolchain import Toolchain
from enginecache.key.options import BuildOptions
from enginecache.model import ModelIdentity, ModelInput, ModelSource
from enginecache.trt.build.adapter import build_plan
from enginecache.trt.build.logs import BuildLog
from enginecache.trt.build.request import BuildRequest

DATA = Path(__file__).parent / "data"
RELEASES = ("tensorrt-8.6.1", "tensorrt-10.0.1", "tensorrt-10.16.1.11", "tensorrt-11.4.0.106", "tensorrt_rtx-1.7.1.116")

ALWAYS_ASKED = {
    "tensorrt-8.6.1": {"module.IProgressMonitor", "IBuilderConfig.set_compute_capability"},
    "tensorrt-10.0.1": {"IBuilderConfig.set_compute_capability"},
    "tensorrt-10.16.1.11": {"IBuilderConfig.set_compute_capability"},
    "tensorrt-11.4.0.106": {
        "IBuilderConfig.set_compute_capability",
        "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
        "BuilderFlag.FP16",
    },
    "tensorrt_rtx-1.7.1.116": {"NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "BuilderFlag.FP16"},
}
"""Names that every build asks for and does not find, by release."""

STATIC = [("x", (1, 4), False)]
"""The network's inputs for a request without profiles."""

INPUTS = (ModelInput("s", "INT64", (2,)), ModelInput("x", "FLOAT", ("n", 4)))

# Source: NvInfer.h and NvInferRuntime.h, TensorRT 8.6 to 11.4; ComputeCapability as printed by TensorRT-RTX 1.7.1.
ENUM_VALUES = {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1, "WORKSPACE": 0, "SM75": 75, "SM80": 80, "SM86": 86, "SM89": 89}
SEVERITIES = {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4}


@dataclass
class Script:
    """Script for the module, and a record of the calls that it received.

    Attributes:
        inputs: ``(name, dims, is_shape_tensor)`` of the network's inputs.
        parser_errors: Behaviours of one ParserError each: member to value.
        logged: ``(severity, text)`` logged while parsing.
        plan: What the build gives; None for a failure.
        fast: What the builder says of fast FP16 and INT8.
        refusals: What is not taken, and the error that is logged then: a builder flag or member of the config by its
            name, a timing cache or plugin library by what :meth:`refused` is asked for.
        calls: ``Class.member`` with its arguments, in order; keywords as pairs.
        absent: ``Class.member`` that was asked for and is not listed.
    """

    inputs: list = field(default_factory=list)
    parser_errors: list = field(default_factory=list)
    logged: list = field(default_factory=list)
    plan: bytes | None = b"vtrt plan"
    fast: bool = True
    refusals: dict = field(default_factory=dict)
    calls: list = field(default_factory=list)
    absent: set = field(default_factory=set)
    logger: object = None

    def names(self):
        return {name for name, _ in self.calls}

    def arguments(self, name):
        return [arguments for called, arguments in self.calls if called == name]

    def flags(self, member="set_flag"):
        return {flag.name for (flag,) in self.arguments(f"IBuilderConfig.{member}")}

    def refused(self, name, severity="ERROR"):
        """Return whether ``name`` is refused; TensorRT only logs it."""
        if name in self.refusals:
            self.logger.log(SEVERITIES[severity], self.refusals[name])
        return name in self.refusals


def listed_module(release: str, script: Script):
    """The module object, with nothing but what ``release`` lists."""
    record = json.loads((DATA / f"api-{release}.json").read_text())
    members = record["classes"]
    module = _Listed("module", [*members, *record["functions"], "__version__"], script)
    factory = _Factory(script, members)
    behaviours = {"Builder": factory.builder, "OnnxParser": factory.parser}
    for name, listed in members.items():
        if "value" in listed:
            module.define(name, _enumeration(name, listed, script))
        elif name in {"ILogger", "IProgressMonitor"}:
            module.define(name, _base_class(name, listed))
        elif name in behaviours:
            module.define(name, behaviours[name])
    module.define("init_libnvinfer_plugins", factory.init_plugins)
    module.define("get_plugin_registry", factory.registry)
    module.define("__version__", record["version"])
    return module


def _enumeration(name, listed, script):
    """An enumeration that notes which of its members were asked for and are not there."""

    class Noting(enum.EnumMeta):
        def __getattribute__(cls, member):
            try:
                return super().__getattribute__(member)
            except AttributeError:
                if member not in cls.__members__ and member.isupper():
                    script.absent.add(f"{name}.{member}")
                raise

    class Base(enum.IntEnum, metaclass=Noting):
        pass

    constants = {member: ENUM_VALUES.get(member, 100 + i) for i, member in enumerate(listed) if member.isupper()}
    return Base(name, constants)


def _base_class(name, listed):
    """A class for Python code to derive from, as pybind11's trampolines are."""
    constants = {member: value for member, value in SEVERITIES.items() if member in listed}
    return type(name, (), constants)


class _Listed:
    """An object with the listed names and no others; every touch is noted."""

    def __init__(self, class_name, listed, script, behaviours=None):
        object.__setattr__(self, "_state", (class_name, frozenset(listed), script, dict(behaviours or {})))

    def define(self, name, value):
        self._state[3][name] = value

    def __getattr__(self, name):
        class_name, listed, script, behaviours = self._state
        if name not in listed:
            script.absent.add(f"{class_name}.{name}")
            raise AttributeError(f"{class_name} has no {name}")
        if name not in behaviours:
            raise AssertionError(f"{class_name}.{name} is listed, and no behaviour is written for it")
        behaviour = behaviours[name]
        if not callable(behaviour) or isinstance(behaviour, type) or class_name == "module":
            return behaviour

        def called(*arguments, **keywords):
            script.calls.append((f"{class_name}.{name}", (*arguments, *keywords.items())))
            return behaviour(*arguments, **keywords)

        return called

    def __setattr__(self, name, value):
        class_name, listed, script, behaviours = self._state
        if name not in listed:
            raise AttributeError(f"{class_name} has no {name}")
        script.calls.append((f"{class_name}.{name}", (value,)))
        if not script.refused(name):
            behaviours[name] = value


class _Factory:
    """Makes the objects that the adapter asks for, each with the names that its class lists."""

    def __init__(self, script, members):
        self.script = script
        self.members = members

    def new(self, class_name, behaviours):
        listed = self.members[class_name]
        return _Listed(class_name, listed, self.script, {k: v for k, v in behaviours.items() if k in listed})

    def init_plugins(self, logger, namespace):
        self.script.calls.append(("module.init_libnvinfer_plugins", (logger, namespace)))
        return True

    def registry(self):
        def load_library(_path):
            return None if self.script.refused("library") else object()

        return self.new(
            "IPluginRegistry", {"load_library": load_library, "all_creators": [], "plugin_creator_list": []}
        )

    def builder(self, logger):
        self.script.logger = logger
        behaviours = {
            "create_network": self.network,
            "create_builder_config": self.config,
            "create_optimization_profile": self.profile,
            "build_serialized_network": self.build,
            "get_plugin_registry": self.registry,
            "platform_has_fast_fp16": self.script.fast,
            "platform_has_fast_int8": self.script.fast,
        }
        return self.new("Builder", behaviours)

    def network(self, *_flags):
        names = ("name", "shape", "is_shape_tensor")
        inputs = [self.new("ITensor", dict(zip(names, entry, strict=True))) for entry in self.script.inputs]
        return self.new("INetworkDefinition", {"num_inputs": len(inputs), "get_input": inputs.__getitem__})

    def parser(self, _network, logger):
        def parse(*_):
            for severity, text in self.script.logged:
                logger.log(SEVERITIES[severity], text)
            return not self.script.parser_errors

        errors = [self.new("ParserError", entry) for entry in self.script.parser_errors]
        reading = {"parse": parse, "parse_from_file": parse}
        return self.new("OnnxParser", {**reading, "num_errors": len(errors), "get_error": errors.__getitem__})

    def profile(self):
        return self.new("IOptimizationProfile", {"set_shape": lambda *_: None, "set_shape_input": lambda *_: None})

    def config(self):
        profiles, flags, caches = [], {"TF32"}, []

        def set_flag(flag):
            if not self.script.refused(flag.name):
                flags.add(flag.name)

        def set_timing_cache(cache, *, ignore_mismatch):
            assert ignore_mismatch is False
            is_foreign = cache.serialize() != b"empty" and self.script.refused("foreign timing cache", "WARNING")
            caches.extend([] if is_foreign else [cache])
            return not is_foreign

        behaviours = {
            "add_optimization_profile": lambda profile: profiles.append(profile) or len(profiles) - 1,
            "set_memory_pool_limit": lambda pool, size: None,
            "set_compute_capability": lambda capability, index: True,
            "set_flag": set_flag,
            "clear_flag": lambda flag: flags.discard(flag.name),
            "get_flag": lambda flag: flag.name in flags,
            "create_timing_cache": self.timing_cache,
            "set_timing_cache": set_timing_cache,
            "get_timing_cache": lambda: caches[-1] if caches else None,
        }
        return self.new("IBuilderConfig", behaviours)

    def timing_cache(self, data):
        """As the real one does, an empty cache of damaged bytes, and the reason in the log alone."""
        if data and self.script.refused("null timing cache"):
            return None
        content = [b"empty" if not data or self.script.refused("damaged timing cache", "WARNING") else data]

        return self.new("ITimingCache", {"serialize": lambda: b"+".join(content)})

    def build(self, _network, config):
        monitor = config._state[3].get("progress_monitor")
        if monitor is not None:
            monitor.phase_start("Building engine", None, 2)
            monitor.step_complete("Building engine", 0)
            monitor.phase_finish("Building engine")
        return self.script.plan


def is_rtx(release):
    return release.startswith("tensorrt_rtx")


def a_request(tmp_path, release, **changes):
    flavour = "tensorrt-rtx" if is_rtx(release) else "tensorrt"
    fields = {
        "source": ModelSource.of(tmp_path / "model.onnx"),
        "identity": ModelIdentity("0" * 64, "1" * 64, "2" * 64, INPUTS, (), is_settled=True),
        "profiles": (),
        "options": BuildOptions(),
        "toolchain": Toolchain(flavour, release.partition("-")[2], 13, "linux", "x86_64"),
        "target": models.SM89,
        "device": None if is_rtx(release) else models.ADA,
        "work_dir": tmp_path / "work",
        "log_path": tmp_path / "log",
    }
    return BuildRequest(**{**fields, **changes})


def run(release, request, script, reports=None):
    reports = [] if reports is None else reports
    log = BuildLog(io.StringIO())
    return build_plan(listed_module(release, script), request, log, lambda *report: reports.append(report))
