"""Options that a flavour of TensorRT accepts but ignores, or cannot honour. Its bindings do not report them."""

from __future__ import annotations

from enginecache.errors import UnsupportedOptionError
from enginecache.host.toolchain import PRODUCTS, Flavour
from enginecache.key.options import BuildOptions

IGNORED_OPTIONS: dict[Flavour, frozenset[str]] = {
    "tensorrt": frozenset(),
    # Source: levels 0, 1, 3, 4 and 5 give the same bytes for light_resnet50 on TensorRT-RTX 1.7.1, 2026-11.
    "tensorrt-rtx": frozenset({"optimization_level"}),
}
"""Fields of ``BuildOptions`` that a flavour accepts and ignores."""

_UNSUPPORTED_OPTIONS: dict[Flavour, dict[str, tuple[str, str, str]]] = {
    "tensorrt": {},
    "tensorrt-rtx": {
        # Source: TensorRT-RTX 1.7.1 takes the level, warns and builds the same plan; 2026-11.
        "hardware_compatibility": (
            "no hardware compatibility levels",
            "its plans run on every GPU of the compute capabilities that they are built for",
            "Name each one with --target, or use --target portable.",
        ),
        # Source: the build fails without a lean runtime, which its packages do not ship, 1.7.1, 2026-11; NVIDIA's
        # documentation of TensorRT-RTX: engines do not carry over between any two of its releases.
        "version_compatible": (
            "no version-compatible plans",
            "its plans do not carry over from one release to another",
            "Leave --version-compatible out: enginecache builds anew for each release.",
        ),
    },
}
"""Fields that a flavour accepts but does not support: the missing feature, the reason, and an alternative."""


def check_options(flavour: Flavour, options: BuildOptions) -> None:
    """Refuse options that the flavour is known not to support, before anything is started.

    Raises:
        UnsupportedOptionError: It lacks a feature that an option asks for.
    """
    defaults = BuildOptions()
    for name, (lacks, why, instead) in _UNSUPPORTED_OPTIONS[flavour].items():
        if getattr(options, name) != getattr(defaults, name):
            message = f"{PRODUCTS[flavour]} has {lacks}: {why}"
            raise UnsupportedOptionError(message, instead)
