"""enginecache: a cache of TensorRT engines, keyed by everything that decides them.

Importing this package loads neither TensorRT nor SQLAlchemy nor onnx; the names below load what they need.
"""

from __future__ import annotations

TYPE_CHECKING = False  # a type checker takes it for true; typing itself takes longer to load than a hit may take
if TYPE_CHECKING:
    from typing import Any

    from enginecache.cache import EngineCache
    from enginecache.config import Config
    from enginecache.entry import Entry, Explanation
    from enginecache.errors import EngineCacheError
    from enginecache.matching import Reason, Verdict

__version__ = "0.1.0"

__all__ = ["Config", "EngineCache", "EngineCacheError", "Entry", "Explanation", "Reason", "Verdict", "__version__"]

_HOMES = {
    "Config": "enginecache.config",
    "EngineCache": "enginecache.cache",
    "EngineCacheError": "enginecache.errors",
    "Entry": "enginecache.entry",
    "Explanation": "enginecache.entry",
    "Reason": "enginecache.matching",
    "Verdict": "enginecache.matching",
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
