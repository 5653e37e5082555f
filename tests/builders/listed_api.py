"""A TensorRT module with exactly the names of one release's bindings, for releases that cannot run here.

The names come from ``data/api-*.json``. What a name does is by hand below, for the few that the adapter may use; a
listed name without a behaviour fails the test when it is touched, and a name that is not listed raises
``AttributeError`` as the real bindings do.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field
from pathlib import Path

DATA = Path(__file__).parent / "data"
RELEASES = ("tensorrt-8.6.1", "tensorrt-10.0.1", "tensorrt-10.16.1.11", "tensorrt-11.4.0.106", "tensorrt_rtx-1.7.1.116")

# Source: NvInfer.h and NvInferRuntime.h, TensorRT 8.6 to 11.4; ComputeCapability as printed by TensorRT-RTX 1.7.1.
ENUM_VALUES = {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1, "WORKSPACE": 0, "SM75": 75, "SM80": 80, "SM86": 86, "SM89": 89}
SEVERITIES = {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4}


@dataclass
class Script:
    """What the module is to do, and what was done with it.

    Attributes:
        inputs: ``(name, dims, is_shape_tensor)`` of the network's inputs.
        parser_errors: Behaviours of one ParserError each: member to value.
        logged: ``(severity, text)`` logged while parsing.
        plan: What the build gives; None for a failure.
        calls: ``Class.member`` with its arguments, in order.
        absent: ``Class.member`` that was asked for and is not listed.
    """

    inputs: list = field(default_factory=list)
    parser_errors: list = field(default_factory=list)
    logged: list = field(default_factory=list)
    plan: bytes | None = b"vtrt plan"
    calls: list = field(default_factory=list)
    absent: set = field(default_factory=set)

    def names(self):
        return {name for name, _ in self.calls}

    def arguments(self, name):
        return [arguments for called, arguments in self.calls if called == name]


def listed_module(release: str, script: Script):
    """The module object, with nothing but what ``release`` lists."""
    record = json.loads((DATA / f"api-{release}.json").read_text())
    members = record["classes"]
    module = _Listed("module", [*members, "__version__"], script)
    factory = _Factory(script, members)
    behaviours = {"Builder": factory.builder, "OnnxParser": factory.parser}
    for name, listed in members.items():
        if "value" in listed:
            constants = {
                member: ENUM_VALUES.get(member, 100 + i) for i, member in enumerate(listed) if member.isupper()
            }
            module.define(name, enum.IntEnum(name, constants))
        elif name in {"ILogger", "IProgressMonitor"}:
            module.define(name, _base_class(name, listed))
        elif name in behaviours:
            module.define(name, behaviours[name])
    module.define("__version__", record["version"])
    return module


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

        def called(*arguments):
            script.calls.append((f"{class_name}.{name}", arguments))
            return behaviour(*arguments)

        return called

    def __setattr__(self, name, value):
        class_name, listed, script, behaviours = self._state
        if name not in listed:
            raise AttributeError(f"{class_name} has no {name}")
        script.calls.append((f"{class_name}.{name}", (value,)))
        behaviours[name] = value


class _Factory:
    """Makes the objects that the adapter asks for, each with the names that its class lists."""

    def __init__(self, script, members):
        self.script = script
        self.members = members

    def new(self, class_name, behaviours):
        listed = self.members[class_name]
        return _Listed(class_name, listed, self.script, {k: v for k, v in behaviours.items() if k in listed})

    def builder(self, _logger):
        behaviours = {
            "create_network": self.network,
            "create_builder_config": self.config,
            "create_optimization_profile": self.profile,
            "build_serialized_network": self.build,
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
        profiles = []
        behaviours = {
            "add_optimization_profile": lambda profile: profiles.append(profile) or len(profiles) - 1,
            "set_memory_pool_limit": lambda pool, size: None,
            "set_compute_capability": lambda capability, index: True,
        }
        return self.new("IBuilderConfig", behaviours)

    def build(self, _network, config):
        monitor = config._state[3].get("progress_monitor")
        if monitor is not None:
            monitor.phase_start("Building engine", None, 2)
            monitor.step_complete("Building engine", 0)
            monitor.phase_finish("Building engine")
        return self.script.plan
