"""enginecache: a cache of TensorRT engines, keyed by everything that decides them.

Importing this package loads neither TensorRT nor SQLAlchemy nor onnx; the names below load what they need.
"""

from __future__ import annotations

TYPE_CHECKING = False  # a type checker takes it for true; typing itself takes longer to load than a hit may take
if TYPE_CHECKING:
    from typing import Any

    from enginecache.cache import EngineCache
    from enginecache.config import Backend, Config, Shared
    from enginecache.errors import (
        AmbiguousKeyError,
        BackendError,
        BuilderCrashError,
        BuilderKilledError,
        BuildError,
        BundleError,
        CheckError,
        CheckUnavailableError,
        ConfigError,
        ConfirmationError,
        EngineCacheError,
        IntegrityError,
        InterpreterError,
        InvalidInputError,
        LoadError,
        LoadRefusedError,
        LockTimeoutError,
        ModelChangedError,
        ModelError,
        NoDeviceError,
        NotCachedError,
        OptionError,
        OutOfMemoryError,
        ProfileError,
        RegistryError,
        ResourceError,
        SchemaError,
        StoreError,
        TargetError,
        ToolchainError,
        UnexpectedError,
        UnsupportedOptionError,
    )
    from enginecache.exchange.adopt import Adopted
    from enginecache.exchange.inspection import Inspection
    from enginecache.exchange.transfer import Exported, Imported
    from enginecache.key.matching import REASON_CODES, Accept, Reason, ReasonCode, Verdict
    from enginecache.key.options import BuildOptions, HardwareCompatibility, Precision
    from enginecache.pipeline.results import Candidate, Entry, Explanation
    from enginecache.quality.check import CheckOptions
    from enginecache.quality.result import Check

__version__ = "0.1.0"

__all__ = [
    "REASON_CODES",
    "Accept",
    "Adopted",
    "AmbiguousKeyError",
    "Backend",
    "BackendError",
    "BuildError",
    "BuildOptions",
    "BuilderCrashError",
    "BuilderKilledError",
    "BundleError",
    "Candidate",
    "Check",
    "CheckError",
    "CheckOptions",
    "CheckUnavailableError",
    "Config",
    "ConfigError",
    "ConfirmationError",
    "EngineCache",
    "EngineCacheError",
    "Entry",
    "Explanation",
    "Exported",
    "HardwareCompatibility",
    "Imported",
    "Inspection",
    "IntegrityError",
    "InterpreterError",
    "InvalidInputError",
    "LoadError",
    "LoadRefusedError",
    "LockTimeoutError",
    "ModelChangedError",
    "ModelError",
    "NoDeviceError",
    "NotCachedError",
    "OptionError",
    "OutOfMemoryError",
    "Precision",
    "ProfileError",
    "Reason",
    "ReasonCode",
    "RegistryError",
    "ResourceError",
    "SchemaError",
    "Shared",
    "StoreError",
    "TargetError",
    "ToolchainError",
    "UnexpectedError",
    "UnsupportedOptionError",
    "Verdict",
    "__version__",
]

_HOMES = {
    "EngineCache": "enginecache.cache",
    "Backend": "enginecache.config",
    "Config": "enginecache.config",
    "Shared": "enginecache.config",
    "Candidate": "enginecache.pipeline.results",
    "Entry": "enginecache.pipeline.results",
    "Explanation": "enginecache.pipeline.results",
    "Adopted": "enginecache.exchange.adopt",
    "Inspection": "enginecache.exchange.inspection",
    "Exported": "enginecache.exchange.transfer",
    "Imported": "enginecache.exchange.transfer",
    "AmbiguousKeyError": "enginecache.errors",
    "BackendError": "enginecache.errors",
    "BuildError": "enginecache.errors",
    "BundleError": "enginecache.errors",
    "BuilderCrashError": "enginecache.errors",
    "BuilderKilledError": "enginecache.errors",
    "CheckError": "enginecache.errors",
    "CheckUnavailableError": "enginecache.errors",
    "ConfigError": "enginecache.errors",
    "ConfirmationError": "enginecache.errors",
    "EngineCacheError": "enginecache.errors",
    "IntegrityError": "enginecache.errors",
    "InterpreterError": "enginecache.errors",
    "InvalidInputError": "enginecache.errors",
    "LoadError": "enginecache.errors",
    "LoadRefusedError": "enginecache.errors",
    "LockTimeoutError": "enginecache.errors",
    "ModelChangedError": "enginecache.errors",
    "ModelError": "enginecache.errors",
    "NoDeviceError": "enginecache.errors",
    "NotCachedError": "enginecache.errors",
    "OptionError": "enginecache.errors",
    "OutOfMemoryError": "enginecache.errors",
    "ProfileError": "enginecache.errors",
    "RegistryError": "enginecache.errors",
    "ResourceError": "enginecache.errors",
    "SchemaError": "enginecache.errors",
    "StoreError": "enginecache.errors",
    "TargetError": "enginecache.errors",
    "ToolchainError": "enginecache.errors",
    "UnexpectedError": "enginecache.errors",
    "UnsupportedOptionError": "enginecache.errors",
    "REASON_CODES": "enginecache.key.matching",
    "Accept": "enginecache.key.matching",
    "Reason": "enginecache.key.matching",
    "ReasonCode": "enginecache.key.matching",
    "Check": "enginecache.quality.result",
    "CheckOptions": "enginecache.quality.check",
    "Verdict": "enginecache.key.matching",
    "BuildOptions": "enginecache.key.options",
    "HardwareCompatibility": "enginecache.key.options",
    "Precision": "enginecache.key.options",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for.

    Raises:
        AttributeError: There is no such name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
