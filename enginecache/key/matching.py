"""Compare a request with stored engines: exact, compatible or refused, with reasons.

One function makes the verdict for ``get`` and ``explain`` alike, from plain key fields and the reach that the builder
recorded. A difference that is not known to be harmless is a refusal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, NamedTuple, get_args

from enginecache.files.canonical import Fields, canonical_json
from enginecache.host.devices import Device
from enginecache.host.targets import Reach
from enginecache.key.key import KEY_VERSION
from enginecache.key.options import HARDWARE_COMPATIBILITIES

Accept = Literal["exact", "compatible"]
Level = Literal["exact", "compatible", "refused"]
ACCEPTS: tuple[Accept, ...] = ("exact", "compatible")

_ABSENT = "(absent)"
_MIG = " MIG "
"""Part of the names that CUDA gives to MIG instances."""

_WEIGHTS = {
    "model": 100,
    "adopted": 50,
    "toolchain": 10,
    "target": 10,
    "profiles": 3,
    "options": 3,
    "conversion": 3,
    "environment": 3,
}
"""Distance that one differing field of a group adds: another model is farther away than any other difference."""

_NAMES = {
    "model.structure": "the graph differs (nodes, attributes, names, opsets or declared shapes)",
    "adopted": "the stored engine was adopted: another program built it",
    "model.weights": "the weights differ (contents of initializers or constants, or a form of them that readers take"
    " differently)",
    "model.value_info": "metadata differs (value_info: the types and shapes that an exporter noted inside the graph)",
}


ReasonCode = Literal[
    "absent",
    "adopted",
    "checked",
    "containing_profile",
    "corrupt",
    "differs",
    "exact",
    "failed",
    "new_cache",
    "older_driver",
    "other_device_model",
    "reach",
    "rebuild",
    "set_aside",
    "waited",
    "warning",
    "wider_reach",
]
REASON_CODES: tuple[ReasonCode, ...] = get_args(ReasonCode)
"""The codes of reasons; :class:`Reason` explains each."""


class Reason(NamedTuple):
    """Reason for an outcome or a verdict.

    The codes are ``exact`` (a stored engine has exactly this key), ``wider_reach`` (one serves that was built for more
    GPUs), ``containing_profile`` and ``other_device_model`` (a compatible one serves that was tuned for other shapes,
    or for another GPU model), ``adopted`` (one serves that another program built), ``waited`` (another process built it
    meanwhile), ``rebuild`` (a rebuild was asked for), ``checked`` (its numbers passed a check), ``absent`` (no engine
    of this model is stored), ``differs`` (in a field of the key), ``reach`` (it runs on other GPUs), ``corrupt`` (a
    damaged one was just quarantined) and ``set_aside`` (quarantined earlier), ``failed`` (a failed build is
    remembered), ``new_cache`` (this call created the folder), ``older_driver`` and ``warning`` (something to know about
    the engine).

    Attributes:
        code: Stable, for programs; one of :data:`REASON_CODES`.
        text: Human-readable; may change.
    """

    code: ReasonCode
    text: str


@dataclass(frozen=True)
class Difference:
    """One field that differs.

    Attributes:
        field: Its name, dotted: ``options.workspace_bytes``.
        asked: Value in the request; plain JSON.
        stored: Value in the stored entry; plain JSON.
    """

    field: str
    asked: Any
    stored: Any

    def __str__(self) -> str:
        if self.field in _NAMES:
            return f"{self.field}: {_NAMES[self.field]}"
        if self.field.startswith("environment."):
            return f"{self.field}: asked {_variable(self.asked)}, stored {_variable(self.stored)}"
        return f"{self.field}: asked {_shown(self.asked)}, stored {_shown(self.stored)}"


def _variable(value: Any) -> str:
    """Format a variable's value for a message: quoted, since it may be empty or contain any character."""
    return "not set" if value == _ABSENT else canonical_json(value)


def _shown(value: Any) -> str:
    """Format a field's value for a message: a range of shapes as the flags write it, ``none`` for nothing."""
    if isinstance(value, Mapping) and {"min", "opt", "max"} <= value.keys():
        return "..".join("x".join(str(size) for size in value[corner]) for corner in ("min", "opt", "max"))
    if value is None or value == []:
        return "none"
    if isinstance(value, list) and all(isinstance(item, list) for item in value):
        return ", ".join(".".join(map(str, item)) for item in value)
    return value if isinstance(value, str) else canonical_json(value)


@dataclass(frozen=True)
class Verdict:
    """Verdict on one stored engine for one request.

    Attributes:
        level: ``exact``: it is a hit, because the key is equal, or because a TensorRT-RTX plan reaches more GPUs than
            asked and is equal otherwise; ``compatible``: it runs, but differs from the request; ``refused``.
        reasons: For ``exact``, one of the two causes; for ``compatible``, each way in which it differs from the
            request; for ``refused``, each cause.
        differing: Every field that differs.
    """

    level: Level
    reasons: tuple[Reason, ...]
    differing: tuple[Difference, ...]

    @property
    def rank(self) -> tuple[int, bool, int, int]:
        """Smaller is better: the level, built before adopted, the number of relaxations, how far the keys are apart."""
        order: tuple[Level, ...] = ("exact", "compatible", "refused")
        is_adopted = any(reason.code == ADOPTED.code for reason in self.reasons)
        return order.index(self.level), is_adopted, len(self.reasons), distance(self.differing)


EXACT = Reason("exact", "a stored engine has exactly this key")
ADOPTED = Reason(
    "adopted", "it was adopted: another program built it, and no check on a GPU has shown that it is this model's"
)
CONFIRMED = Reason("adopted", "it was adopted: another program built it, and it passed its check on a GPU")
REBUILD = Reason("rebuild", "a rebuild was asked for")
WIDER_REACH: Literal["wider_reach"] = "wider_reach"


def judge(
    asked: Fields,
    needed: Reach,
    stored: Fields,
    reach: Reach,
    *,
    stored_version: int = KEY_VERSION,
    is_confirmed: bool = False,
) -> Verdict:
    """Decide whether a stored engine serves a request.

    Args:
        asked: The request's key fields.
        needed: The GPUs that the request's target stands for.
        stored: The entry's key fields; may be of another key version.
        reach: The GPUs that the stored plan runs on, as its builder recorded them.
        stored_version: The entry's key version. Equal fields of another version may not mean the same.
        is_confirmed: Whether an adopted engine has passed a check on a GPU; then it serves as one that was built here.
    """
    differing = differences(asked, stored)
    if is_confirmed and "adopted" in stored:
        built = {name: value for name, value in stored.items() if name != "adopted"}
        verdict = judge(asked, needed, built, reach, stored_version=stored_version)
        why = tuple(reason for reason in verdict.reasons if reason is not EXACT)
        return Verdict(verdict.level, why if verdict.level == "refused" else (CONFIRMED, *why), differing)
    relaxed: list[Reason] = []
    refused: list[Reason] = []
    if not reach.covers(needed):
        refused.append(Reason("reach", f"it runs on compute capability {reach}, and {needed} is asked for"))
    if stored_version != KEY_VERSION:
        refused.append(Reason("differs", f"key version: asked {KEY_VERSION}, stored {stored_version}"))
    if not refused and _is_wider_rtx(asked, needed, stored, differing):
        return Verdict("exact", (_wider(needed, stored, reach),), differing)
    if not differing:
        return Verdict("refused", tuple(refused), ()) if refused else Verdict("exact", (EXACT,), ())
    for difference in differing:
        group = _RULES.get(_rule_name(difference.field))
        relaxation = None if group is None else group(asked, stored)
        if relaxation is None:
            refused.append(Reason("differs", str(difference)))
        else:
            relaxed += [reason for reason in relaxation if reason not in relaxed]
    if refused:
        return Verdict("refused", tuple(refused), differing)
    return Verdict("compatible", tuple(relaxed), differing)


def _is_wider_rtx(asked: Fields, needed: Reach, stored: Fields, differing: Sequence[Difference]) -> bool:
    """Return whether a TensorRT-RTX plan differs from what is asked in being built for more GPUs, and in nothing else.

    Such a plan is not tuned for a device. The reach that its builder recorded was compared before; here the stored key
    has to say the same, so that neither is believed alone.
    """
    if [difference.field for difference in differing] != ["target.compute_capabilities"]:
        return False
    built_for = stored["target"]["compute_capabilities"]
    covers = built_for == "portable" or {tuple(one) for one in built_for} >= set(needed.compute_capabilities)
    return asked["toolchain"]["flavour"] == "tensorrt-rtx" and covers


def _wider(needed: Reach, stored: Fields, reach: Reach) -> Reason:
    built_for = "portable" if stored["target"]["compute_capabilities"] == "portable" else "several targets"
    text = (
        f"a stored engine covers compute capability {needed}: it was built for {built_for} ({reach}); what the wider "
        "reach costs in speed is not measured"
    )
    return Reason(WIDER_REACH, text)


def _rule_name(field: str) -> str:
    return "profiles" if field.startswith("profiles[") else field


def _wider_level(asked: Fields, stored: Fields) -> list[Reason] | None:
    """Accept a plan of a wider hardware compatibility: it runs wherever a narrower one would."""
    levels = HARDWARE_COMPATIBILITIES
    wanted, found = (fields["options"].get("hardware_compatibility") for fields in (asked, stored))
    if found not in levels or levels.index(found) < levels.index(wanted):
        return None
    return [Reason(WIDER_REACH, f"it was built with hardware compatibility {found}, which may be slower")]


def _wider_target(asked: Fields, stored: Fields) -> list[Reason] | None:
    """Accept a wider target. The caller has compared the reach itself."""
    shown = _target_text(stored["target"])
    return [Reason(WIDER_REACH, f"it was built for {shown}, not for {_target_text(asked['target'])} alone")]


def _target_text(target: Fields) -> str:
    capabilities = target["compute_capabilities"]
    if isinstance(capabilities, str):
        return capabilities
    return ", ".join(".".join(map(str, capability)) for capability in capabilities) + (
        " and later" if target.get("and_later") else ""
    )


def _other_device(asked: Fields, stored: Fields) -> list[Reason] | None:
    """Accept a plan that is tuned for another device model of the same compute capability: it runs, maybe slower.

    Refuse a plan that is tuned for more multiprocessors than the GPU has, and one for a whole GPU on a MIG instance or
    the other way round: TensorRT warns that such a plan may fail.
    """
    wanted, found = asked["target"]["device"], stored["target"].get("device")
    if wanted is None:
        return None  # a plan for every device model was asked, and this one is tuned for one
    if found is None:
        return []  # tuned for none: the wider level says so
    is_instance = [_MIG in device["name"] for device in (wanted, found)]
    if found["sm_count"] > wanted["sm_count"] or is_instance[0] != is_instance[1]:
        return None
    text = f"it was tuned for {found['name']} ({found['sm_count']} SMs), not for {wanted['name']}"
    return [Reason("other_device_model", f"{text} ({wanted['sm_count']} SMs)")]


def _containing_profiles(asked: Fields, stored: Fields) -> list[Reason] | None:
    """Accept profiles that contain the asked ones: each must lie within the stored one of the same index."""
    wanted, found = asked["profiles"], stored["profiles"]
    if len(wanted) != len(found) or not all(map(_contains, found, wanted)):
        return None
    return [Reason("containing_profile", "its profiles contain the asked ranges, and are tuned for other shapes")]


def _contains(outer: Fields, inner: Fields) -> bool:
    return outer.keys() == inner.keys() and all(_contains_range(outer[name], inner[name]) for name in inner)


def _contains_range(outer: Fields, inner: Fields) -> bool:
    if outer["kind"] != inner["kind"] or len(outer["min"]) != len(inner["min"]):
        return False
    return all(low <= asked for low, asked in zip(outer["min"], inner["min"], strict=True)) and all(
        high >= asked for high, asked in zip(outer["max"], inner["max"], strict=True)
    )


def _adopted(_asked: Fields, _stored: Fields) -> list[Reason] | None:
    """Accept a plan that another program built, though its weights and options are unknown here."""
    return [ADOPTED]


_RULES = {
    "adopted": _adopted,
    "options.hardware_compatibility": _wider_level,
    "target.compute_capabilities": _wider_target,
    "target.and_later": _wider_target,
    "target.device": _other_device,
    "target.device.name": _other_device,  # both are tuned for one
    "target.device.sm_count": _other_device,
    "profiles": _containing_profiles,
}
"""The fields in which a stored engine may differ and still serve. A rule refuses with None; other fields refuse."""


def older_driver(device: Device | None, built_under: str | None) -> tuple[Reason, ...]:
    """Return a reason if the driver is older than the one of the build: NVIDIA promises only the other direction."""
    here, then = _version(device.driver_version if device is not None else ""), _version(built_under or "")
    if not here or here >= then:
        return ()
    return (
        Reason("older_driver", f"it was built under driver {built_under}; the one here is older, and may refuse it"),
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def differences(asked: Fields, stored: Fields) -> tuple[Difference, ...]:
    """Return every field in which two keys differ, sorted by name.

    A field that only one of them has counts as different: a stored key may come from another release.
    """
    return tuple(sorted(_compare("", asked, stored), key=lambda difference: difference.field))


def _compare(name: str, asked: Any, stored: Any) -> Iterator[Difference]:
    if isinstance(asked, Mapping) and isinstance(stored, Mapping):
        for key in asked.keys() | stored.keys():
            yield from _compare(f"{name}.{key}" if name else key, asked.get(key, _ABSENT), stored.get(key, _ABSENT))
    elif name == "profiles" and isinstance(asked, list) and isinstance(stored, list):
        for index, (one, other) in enumerate(zip_longest(asked, stored, fillvalue=_ABSENT)):
            yield from _compare_profiles(f"profiles[{index}]", one, other)
    elif asked != stored:
        yield Difference(name, asked, stored)


def _compare_profiles(name: str, asked: Any, stored: Any) -> Iterator[Difference]:
    """Yield one difference for each input: its three shapes are one thing to the reader."""
    if not isinstance(asked, Mapping) or not isinstance(stored, Mapping):
        yield Difference(name, asked, stored)
        return
    for entry in asked.keys() | stored.keys():
        one, other = asked.get(entry, _ABSENT), stored.get(entry, _ABSENT)
        if one != other:
            yield Difference(f"{name}.{entry}", one, other)


def distance(differing: Iterable[Difference]) -> int:
    """Return the distance between two keys; 0 if they are equal."""
    total = 0
    for difference in differing:
        group = difference.field.split(".", 1)[0].split("[", 1)[0]
        total += _WEIGHTS.get(group, 1)
    return total


def is_same_model(differing: Sequence[Difference]) -> bool:
    """Return whether two keys share graph or weights; with neither, the stored engine is of another model."""
    return not {"model.structure", "model.weights"} <= {difference.field for difference in differing}
