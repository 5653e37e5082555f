"""enginecache: a cache of TensorRT engines, keyed by everything that decides them.

Importing this package loads neither TensorRT nor SQLAlchemy nor onnx; the names below load what they need.
"""

from __future__ import annotations

TYPE_CHECKING = False  # a type checker takes it for true; typing itself takes longer to load than a hit may take
if TYPE_CHECKING:
    from typing import Any

    from enginecache.cache import EngineCache
    from enginecache.config import Backend, Config, Shared
    from enginecache.entry import Candidate, Entry, Explanation
    from enginecache.errors import (
        AmbiguousKeyError,
        BackendError,
        BuilderCrashError,
        BuilderKilledError,
        BuildError,
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
    from enginecache.matching import REASON_CODES, Accept, Reason, ReasonCode, Verdict
    from enginecache.options import BuildOptions, HardwareCompatibility, Precision

__version__ = "0.1.0"

__all__ = [
    "REASON_CODES",
    "Accept",
    "AmbiguousKeyError",
    "Backend",
    "BackendError",
    "BuildError",
    "BuildOptions",
    "BuilderCrashError",
    "BuilderKilledError",
    "Candidate",
    "Config",
    "ConfigError",
    "ConfirmationError",
    "EngineCache",
    "EngineCacheError",
    "Entry",
    "Explanation",
    "HardwareCompatibility",
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
    "Candidate": "enginecache.entry",
    "Entry": "enginecache.entry",
    "Explanation": "enginecache.entry",
    "AmbiguousKeyError": "enginecache.errors",
    "BackendError": "enginecache.errors",
    "BuildError": "enginecache.errors",
    "BuilderCrashError": "enginecache.errors",
    "BuilderKilledError": "enginecache.errors",
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
    "REASON_CODES": "enginecache.matching",
    "Accept": "enginecache.matching",
    "Reason": "enginecache.matching",
    "ReasonCode": "enginecache.matching",
    "Verdict": "enginecache.matching",
    "BuildOptions": "enginecache.options",
    "HardwareCompatibility": "enginecache.options",
    "Precision": "enginecache.options",
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
