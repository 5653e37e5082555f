"""The key: everything that decides a plan, as canonical JSON and its digest.

A field belongs in the key when another value of it could make another plan, or make the plan wrong for the caller. Not
in the key: paths, names, times, working folder, host, user, device ordinal, UUID, memory size, driver version, cache
settings, Python version, order of mappings, None against omitted.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from enginecache.files.canonical import Fields, canonical_json, key_digest
from enginecache.host.targets import Target
from enginecache.host.toolchain import Toolchain
from enginecache.key.options import BuildOptions
from enginecache.key.precision import Conversion
from enginecache.key.profiles import Profile
from enginecache.model import ModelIdentity

KEY_VERSION = 3
"""Version of the key; raised when the canonical text of any request changes. Other versions are clean misses."""


@dataclass(frozen=True)
class EngineKey:
    """Key of one request.

    Attributes:
        model_structure: Digest of the graph without the tensors' contents.
        model_weights: Digest of the tensors' contents.
        profiles: In the order of their index in TensorRT's runtime API.
        options: Builder options; only their keyed fields count.
        toolchain: TensorRT flavour, version, CUDA major and platform.
        target: The GPUs that the plan must run on.
        conversion: Conversion of the graph before the build; None for none.
        environment: Variables that reach the builder and can change a plan, as (name, value), sorted.
        model_value_info: Digest of the types and shapes noted inside the graph; empty if there are none, or if nothing
            is converted: a converter reads them, TensorRT does not.
    """

    model_structure: str
    model_weights: str
    profiles: tuple[Profile, ...]
    options: BuildOptions
    toolchain: Toolchain
    target: Target
    conversion: Conversion | None = None
    environment: tuple[tuple[str, str], ...] = ()
    model_value_info: str = ""

    @classmethod
    def of(
        cls,
        identity: ModelIdentity,
        profiles: tuple[Profile, ...],
        options: BuildOptions,
        toolchain: Toolchain,
        target: Target,
        conversion: Conversion | None = None,
        environment: tuple[tuple[str, str], ...] = (),
    ) -> EngineKey:
        """Make the key from the parts of a request."""
        return cls(
            identity.structure,
            identity.weights,
            profiles,
            options,
            toolchain,
            target,
            conversion,
            environment,
            "" if conversion is None else identity.value_info,
        )

    def fields(self) -> Fields:
        """Return the key as plain JSON values: strings, integers, booleans, None, lists and mappings; no floats."""
        return {
            "model": {
                "structure": self.model_structure,
                "weights": self.model_weights,
                "value_info": self.model_value_info,
            },
            "profiles": [_profile_fields(profile) for profile in self.profiles],
            "options": self.options.keyed(),
            "conversion": None if self.conversion is None else self.conversion.fields(),
            "toolchain": {
                "flavour": self.toolchain.flavour,
                "version": self.toolchain.version,
                "cuda_major": self.toolchain.cuda_major,
                "os": self.toolchain.os,
                "cpu": self.toolchain.cpu,
            },
            "target": _target_fields(self.target),
            "environment": dict(self.environment),
        }

    @functools.cached_property
    def text(self) -> str:
        """Return the canonical text: JSON with sorted keys, no spaces, ASCII, defaults written out."""
        return canonical_json(self.fields())

    @functools.cached_property
    def digest(self) -> str:
        """Return the name of the key: 64 hex characters of BLAKE3 over the version line and the canonical text."""
        return key_digest(KEY_VERSION, self.text)


def _profile_fields(profile: Profile) -> Fields:
    return {
        name: {
            "kind": "values" if shapes.is_values else "shape",
            "min": list(shapes.minimum),
            "opt": list(shapes.optimum),
            "max": list(shapes.maximum),
        }
        for name, shapes in profile.ranges
    }


def _target_fields(target: Target) -> Fields:
    device = target.device_model
    return {
        "compute_capabilities": "portable" if target.is_portable else [list(c) for c in target.compute_capabilities],
        "and_later": target.and_later,
        "device": None if device is None else {"name": device.name, "sm_count": device.sm_count},
    }


def is_key_form(fields: object) -> bool:
    """Return whether values from outside have the form that :meth:`EngineKey.fields` gives, with ``adopted`` or not."""
    if not isinstance(fields, dict) or set(fields) - {"adopted"} != _FIELDS:
        return False
    options, target, profiles = fields["options"], fields["target"], fields["profiles"]
    return (
        _are_texts(fields["model"], _PARTS)
        and isinstance(fields.get("adopted", {}), dict)
        and isinstance(fields["conversion"], dict | None)
        and isinstance(fields["toolchain"], dict)
        and _are_texts(fields["environment"])
        and isinstance(options, dict)
        and options.keys() == _OPTIONS.keys()
        and all(isinstance(options[name], list) == isinstance(_OPTIONS[name], list) for name in _OPTIONS)
        and isinstance(profiles, list)
        and all(isinstance(profile, dict) and all(map(_is_range, profile.values())) for profile in profiles)
        and isinstance(target, dict)
        and target.keys() == {"compute_capabilities", "and_later", "device"}
        and _is_target(target["compute_capabilities"])
        and (target["device"] is None or _is_device(target["device"]))
    )


_FIELDS = {"model", "profiles", "options", "conversion", "toolchain", "target", "environment"}
_PARTS = {"structure", "weights", "value_info"}
_OPTIONS = BuildOptions().keyed()


def _are_texts(values: Any, names: Collection[str] | None = None) -> bool:
    is_mapping = isinstance(values, dict) and all(isinstance(value, str) for value in values.values())
    return is_mapping and (names is None or set(values) == names)


def _is_range(shapes: Any) -> bool:
    return (
        isinstance(shapes, dict)
        and shapes.get("kind") in ("shape", "values")
        and all(_are_numbers(shapes.get(corner)) for corner in ("min", "opt", "max"))
        and len({len(shapes[corner]) for corner in ("min", "opt", "max")}) == 1
    )


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _is_target(value: Any) -> bool:
    return value == "portable" or (
        isinstance(value, list) and all(_are_numbers(one) and len(one) == 2 for one in value)
    )


def _is_device(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and type(value.get("sm_count")) is int
