"""A TensorRT module with exactly the names that one release lists, for releases that cannot run here.

What the runtime does is by hand below. A name that is not listed raises ``AttributeError``, as the real bindings do,
and is noted; a listed name without a behaviour fails the test.
"""

from __future__ import annotations

import enum
import json
import threading
from pathlib import Path

from load_requests import scripted

from enginecache.trt.load import deserialize as module
from enginecache.trt.load.deserialize import deserialize

RELEASES = json.loads((Path(__file__).parent / "data" / "api-runtime.json").read_text())
SOURCE = RELEASES.pop("source")
SEVERITIES = {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4}
# Source: TensorRT-RTX 1.7.1, the members' values.
DIAGNOSTICS = (
    *("VERSION_MISMATCH", "UNSUPPORTED_CC", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME", "INSUFFICIENT_GPU_MEMORY"),
    *("MALFORMED_ENGINE", "CUDA_ERROR"),
)


class Listed:
    """An object with the listed names and no others; what is set and called is noted."""

    def __init__(self, class_name, listed, notes, behaviours):
        self.__dict__["_state"] = (class_name, frozenset(listed), notes, behaviours)

    def __getattr__(self, name):
        class_name, listed, notes, behaviours = self._state
        if name not in listed:
            notes.absent.add(f"{class_name}.{name}")
            raise AttributeError(f"{class_name} has no {name}")
        behaviour = behaviours[name]
        if not callable(behaviour) or isinstance(behaviour, type):
            return behaviour

        def called(*arguments):
            notes.calls.append((name, *arguments))
            return behaviour(*arguments)

        return called

    def __setattr__(self, name, value):
        _, listed, notes, _ = self._state
        assert name in listed
        notes.calls.append((name, value))


class ListedRelease:
    """A release in TensorRT's place, and what its runtime says and does.

    Attributes:
        engine: What deserializing gives, or the exception that it raises.
        logged: ``(severity, text)`` logged meanwhile.
        validity: What the header check gives: a name, and the names of what it finds.
        given: What was deserialized: bytes and the type that held them.
        calls: Methods with their arguments, and attributes with what they were set to, in order.
        absent: Names that were asked for and are not listed.
    """

    def __init__(self, monkeypatch, release):
        record = RELEASES[release]
        self.engine, self.logged, self.validity = "an engine", [], ("VALID", ())
        self.given, self.calls, self.absent = [], [], set()
        self.flavour = "tensorrt-rtx" if "rtx" in release else "tensorrt"
        self.version = record["version"]
        self._classes = record["classes"]
        self._logger = None
        self.behaviours = {
            "__version__": self.version,
            "ILogger": type("ILogger", (), SEVERITIES),
            "Runtime": self.make_runtime,
            "init_libnvinfer_plugins": lambda logger, namespace: True,
            "get_plugin_registry": self._registry,
            "EngineValidity": enum.IntEnum("EngineValidity", {"VALID": 0, "SUBOPTIMAL": 1, "INVALID": 2}),
            "EngineInvalidityDiagnostics": enum.IntEnum(
                "Diagnostics", {name: 1 << bit for bit, name in enumerate(DIAGNOSTICS)}
            ),
        }
        names = [*record["functions"], *record["classes"], "__version__"]
        self.trt = Listed("module", names, self, self.behaviours)
        monkeypatch.setattr(module, "load_module", lambda _: self.trt)
        monkeypatch.setattr(module, "library_version", lambda _: None)
        monkeypatch.setattr(module, "_RUNTIMES", {})

    def arguments(self, name):
        return [arguments for called, *arguments in self.calls if called == name]

    def make_runtime(self, logger):
        self._logger = logger
        registry = self._registry()
        behaviours = {
            "deserialize_cuda_engine": self._deserialize,
            "get_plugin_registry": lambda: registry,
            "get_engine_validity": self._check,
            "engine_header_size": 4,
        }
        return self._new("Runtime", behaviours)

    def _registry(self):
        behaviours = {"load_library": self._load_library, "all_creators": (), "plugin_creator_list": ()}
        return self._new("IPluginRegistry", behaviours)

    def _new(self, class_name, behaviours):
        return Listed(class_name, self._classes[class_name], self, behaviours)

    def _load_library(self, path):
        if "broken" in path:
            self.say("ERROR", f"cannot load {path}")

    def _check(self, header):
        self.say("ERROR", "said by the header check")
        assert header == b"a pl"
        name, found = self.validity
        members = self.behaviours["EngineInvalidityDiagnostics"]
        return self.behaviours["EngineValidity"][name], sum(members[member] for member in found)

    def _deserialize(self, plan):
        self.given.append((bytes(plan), type(plan).__name__))
        for severity, text in self.logged:
            self.say(severity, text)
        if isinstance(self.engine, Exception):
            raise self.engine
        return self.engine

    def say(self, severity, text):
        """Log a line from a thread of its own, as TensorRT may."""
        thread = threading.Thread(target=self._logger.log, args=(SEVERITIES[severity], text))
        thread.start()
        thread.join()

    def load(self, folder, **changes):
        return deserialize(scripted(folder, "a plan", flavour=self.flavour, version=self.version, **changes))
