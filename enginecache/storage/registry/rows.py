"""Rows of the registry, as records."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import blake3

from enginecache.errors import OptionError, RegistryError
from enginecache.files.canonical import Fields, key_digest
from enginecache.host.targets import Reach
from enginecache.host.toolchain import Flavour

BuildState = Literal["running", "succeeded", "failed", "abandoned"]
MemoKind = Literal["model", "blob", "plugin"]
LoadOutcome = Literal["loaded", "refused", "bad"]

REPAIR_FIX = "Run `enginecache verify`; `enginecache verify --repair --yes` repairs what it finds."

_DIGEST = re.compile(r"[0-9a-f]{64}")


def damaged_registry(path: Path, why: object) -> RegistryError:
    """Return the error for a registry whose rows make no sense."""
    return RegistryError(f"the registry {path} is damaged: {why}", REPAIR_FIX)


@dataclass(frozen=True)
class EntryRecord:
    """One stored engine: a key and the blob that answers it.

    Attributes:
        key: 64 hex characters.
        key_json: The key's canonical text.
        key_version: Version of that text.
        model_digest: Digest of structure and weights together.
        model_name: File name that it was first seen under; for display.
        digest: Digest of the blob, 64 hex characters of BLAKE3.
        size_bytes: Size of the blob.
        backend: TensorRT flavour that built it.
        tensorrt_version: Version that the builder reported.
        compute_capabilities: What the plan reaches, such as ``("8.9",)``; ``8.0+`` is 8.0 and later.
        device_name: The device model that it was built on, or None.
        driver_version: Driver of that device, or None; provenance.
        build_id: The attempt that made it.
        build_seconds: How long that took.
        created_at: When it was published.
        timing_cache_digest: Digest of the timing cache that the build began with, or None; provenance.
        check_json: Result of the last check of its numbers, as :mod:`enginecache.quality.result` writes it; or None.
            Outside the seal: it changes, and names the plan that it is of.
        is_pinned: Whether it must stay.
        seal: What its row says that :attr:`right_seal` is; empty where it says nothing, None for what is no row.
    """

    key: str
    key_json: str = dataclasses.field(repr=False)
    key_version: int
    model_digest: str
    model_name: str
    digest: str
    size_bytes: int
    backend: Flavour
    tensorrt_version: str
    compute_capabilities: tuple[str, ...]
    device_name: str | None
    driver_version: str | None
    build_id: str
    build_seconds: float
    created_at: dt.datetime
    timing_cache_digest: str | None = None
    check_json: str | None = dataclasses.field(default=None, repr=False)
    is_pinned: bool = False
    seal: str | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def right_seal(self) -> str:
        """Return the digest of the row: it binds the key to the blob and the reach. Costs some 10 us.

        Two rows with each other's blobs, each of them whole, would serve each other's engines. It is no secret: it
        finds what a restored or edited registry, or a flipped bit, has mixed up, and no attacker. The key stands for
        its text, and the model's name is in a row that others share.
        """
        said = [getattr(self, name) for name in _SEALED]
        text = json.dumps([*said, self.created_at.isoformat()], separators=(",", ":"))
        return blake3.blake3(f"enginecache/entry/v1\n{text}".encode("ascii")).hexdigest()

    @property
    def is_as_written(self) -> bool:
        """True if its row has the right seal."""
        return self.seal is None or self.seal == self.right_seal

    @functools.cached_property
    def reach(self) -> Reach:
        """Return the GPUs that the plan runs on, by compute capability."""
        return Reach.from_texts(self.compute_capabilities)

    @functools.cached_property
    def fields(self) -> Fields:
        """Return the key as plain JSON values, which must not be changed."""
        fields: Fields = json.loads(self.key_json)
        return fields

    @property
    def is_adopted(self) -> bool:
        """True if another program built it; see :mod:`enginecache.exchange.adopt`."""
        return self.key_json.startswith('{"adopted":')  # the first field of a canonical text: a listing parses none

    @property
    def is_confirmed(self) -> bool:
        """True for an adopted engine whose last check ran it on a GPU and passed: it serves as one that was built."""
        check = self.check or {}
        return self.is_adopted and (check.get("verdict"), check.get("scope")) == ("passed", "engine")

    @property
    def check(self) -> Fields | None:
        """Result of the last check as plain JSON values; None where it is missing, damaged, or of another plan."""
        with contextlib.suppress(ValueError, RecursionError):
            found = None if self.check_json is None else json.loads(self.check_json)
            if isinstance(found, dict) and found.get("digest") == self.digest and _is_check(found):
                return found
        return None

    @property
    def flaw(self) -> str:
        """Return a defect that no row of enginecache's own has; empty for none. Costs some 30 us."""
        if self.key != key_digest(self.key_version, self.key_json):
            return "its key is not that of its text"
        if not self.is_as_written:
            return MIXED_UP
        try:
            model = self.fields["model"]
            is_known = all(_DIGEST.fullmatch(model[part]) for part in ("structure", "weights"))
        except (ValueError, KeyError, TypeError):
            is_known = False
        return "" if is_known else "its key names no model"

    def to_json(self) -> Fields:
        """Return plain JSON values, without the pin, which is the user's, and the row's seal."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["is_pinned"], fields["seal"]
        fields["created_at"] = self.created_at.isoformat()
        return fields

    @classmethod
    def from_json(cls, fields: Fields) -> EntryRecord:
        """Return the entry that :meth:`to_json` gave these fields of.

        Raises:
            ValueError: A field is missing, of another type, or not what it should be.
        """
        try:
            return cls.of_values({**fields, "created_at": dt.datetime.fromisoformat(fields["created_at"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    @classmethod
    def of_values(cls, values: Fields) -> EntryRecord:
        """Return the entry with these fields, each checked: they come from outside this process.

        Raises:
            ValueError: A field is not what it should be.
            TypeError: A field is missing, or there is one too many.
        """
        record = cls(**{**values, "compute_capabilities": tuple(values["compute_capabilities"])})
        for name, is_right in _FORMS.items():
            value = getattr(record, name)
            if not is_right(value):
                raise ValueError(f"{name} is {value!r:.100}")
        return record


def stored_time(text: str) -> dt.datetime:
    """Return the time that the registry stores as this string.

    Raises:
        ValueError: It is not a time.
        TypeError: It is not a string.
    """
    return dt.datetime.fromisoformat(text + "+00:00")


def time_text(time: dt.datetime) -> str:
    """Return a time as the registry stores it: the inverse of :func:`stored_time`."""
    return time.astimezone(dt.timezone.utc).replace(tzinfo=None).isoformat(" ", "microseconds")


MIXED_UP = "it does not belong to its engine as it was published"
"""For a row whose seal is not the right one."""

_SEALED = (
    "key",
    "key_version",
    "model_digest",
    "digest",
    "size_bytes",
    "backend",
    "tensorrt_version",
    "compute_capabilities",
    "device_name",
    "driver_version",
    "build_id",
    "build_seconds",
    "timing_cache_digest",
)


Form = Callable[[Any], bool]


def _text(pattern: str = "[^\ud800-\udfff]*") -> Form:  # half a character cannot be stored
    is_match = re.compile(pattern, re.DOTALL).fullmatch
    return lambda value: isinstance(value, str) and is_match(value) is not None


def _or_none(is_right: Form) -> Form:
    return lambda value: value is None or is_right(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_duration(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value) and value >= 0
    except OverflowError:  # an integer that is too large for a number of seconds
        return False


@functools.lru_cache
def _is_reach(value: tuple[Any, ...]) -> bool:
    try:
        return all(isinstance(text, str) for text in value) and bool(Reach.from_texts(value))
    except OptionError:
        return False


_FORMS: dict[str, Form] = {
    "key": _text(_DIGEST.pattern),
    "key_json": _text(),
    "key_version": _is_count,
    "model_digest": _text(_DIGEST.pattern),
    "model_name": _text(),
    "digest": _text(_DIGEST.pattern),
    "size_bytes": _is_count,
    "backend": get_args(Flavour).__contains__,
    "tensorrt_version": _text(),
    "compute_capabilities": _is_reach,
    "device_name": _or_none(_text()),
    "driver_version": _or_none(_text()),
    "build_id": _text("[0-9a-f]{32}"),
    "build_seconds": _is_duration,
    # Not the ends of the calendar: whoever adds to such a time, or moves it to another zone, leaves it.
    "created_at": lambda value: isinstance(value, dt.datetime) and value.tzinfo is not None and 1 < value.year < 9999,
    "timing_cache_digest": _or_none(_text(_DIGEST.pattern)),
    "check_json": _or_none(_text()),
    "seal": _or_none(_text()),
}


_CHECK_FORMS: dict[str, Form] = {
    "verdict": _text("passed|failed|uninformative"),
    "scope": _text("engine|graph"),
    "reference": _text(),
    "reason": _text(),
    "checked_at": _text(),
    "tolerance": _is_duration,
    "device": _or_none(_text()),
    "outputs": lambda value: isinstance(value, list) and all(map(_is_output, value)),
}
"""Of a check, as far as others read it than :mod:`enginecache.quality.result`."""


def _is_output(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and _is_duration(value.get("error"))


def _is_check(found: Fields) -> bool:
    return all(is_right(found.get(name)) for name, is_right in _CHECK_FORMS.items())


class Standing(NamedTuple):
    """The facts by which eviction decides about an entry.

    Attributes:
        last_used_at: Its publication is a use.
        others: As in :class:`EntryRecord`.
    """

    key: str
    digest: str
    model_name: str
    size_bytes: int
    backend: Flavour
    tensorrt_version: str
    compute_capabilities: tuple[str, ...]
    build_id: str
    build_seconds: float
    last_used_at: dt.datetime
    is_pinned: bool


@dataclass(frozen=True)
class ExaminedRow:
    """An entry's row as a check sees it.

    Attributes:
        key: As it is stored, whatever it is.
        digest: Of its blob, as it is stored, whatever it is.
        record: The entry; None where the row is none.
        problem: What is wrong with the row; empty for nothing.
    """

    key: str
    digest: str
    record: EntryRecord | None
    problem: str = ""


@dataclass(frozen=True)
class BuildRecord:
    """One attempt to build.

    Attributes:
        id: 32 hex characters; also the name of its log.
        key: What was asked.
        state: ``running`` until its outcome is known; ``abandoned`` when its process died first.
        started_at: When.
        host: Name of the host.
        pid: Process that waits for the builder.
        build_seconds: How long it took, or None.
        reason: Why it failed, or an empty text.
        is_lasting: Whether a failure would come again: it was TensorRT's word, or its crash. None where nobody said.
    """

    id: str
    key: str
    state: BuildState
    started_at: dt.datetime
    host: str
    pid: int
    build_seconds: float | None = None
    reason: str = ""
    is_lasting: bool | None = None


@dataclass(frozen=True)
class MissRecord:
    """A request that found no engine.

    Attributes:
        key: What was asked.
        reason: Code of why: ``absent``, ``differs``, ``corrupt``, ``set_aside``, ``rebuild``.
        nearest_key: The nearest entry then, or None.
        differing: Names of the fields in which it differed.
        count: How often.
        last_at: When last.
        model_name: File name of the model, where an engine of the key is stored or was set aside; else None.
        nearest_model: The same of the nearest entry, while it is stored.
    """

    key: str
    reason: str
    nearest_key: str | None
    differing: tuple[str, ...]
    count: int
    last_at: dt.datetime
    model_name: str | None = None
    nearest_model: str | None = None


@dataclass(frozen=True)
class SetAside:
    """An engine that was found damaged, and was not built anew since.

    Attributes:
        key: Of its entry, which was deleted.
        digest: Of its blob.
        model_name: File name of its model.
        reason: What was wrong with it.
        at: When it was set aside.
    """

    key: str
    digest: str
    model_name: str
    reason: str
    at: dt.datetime

    def __str__(self) -> str:
        return f"its engine was found damaged and set aside at {self.at:%Y-%m-%d %H:%M} UTC ({self.reason})"


@dataclass(frozen=True)
class LoadRecord:
    """The outcome of loading a blob.

    Attributes:
        digest: The blob.
        device: Class of the GPU, such as ``NVIDIA H100 80GB HBM3, 132 SMs``; empty for none.
        toolchain: Flavour and version of the TensorRT that loaded it.
        driver: Version of the NVIDIA driver; empty for none.
        outcome: ``loaded``; ``refused`` for a reason outside the plan; ``bad`` for a plan that was set aside.
        reason: TensorRT's own words; empty where it was loaded.
        at: When.
        boot: Id of the boot of the host that loaded it; empty where the kernel has none.
    """

    digest: str
    device: str
    toolchain: str
    driver: str
    outcome: LoadOutcome
    reason: str
    at: dt.datetime
    boot: str = ""


@dataclass(frozen=True)
class AnswerRecord:
    """A command line that was answered by a hit, for :mod:`enginecache.cli.fast_path`.

    Attributes:
        command: Digest of the command line.
        key: Of the entry that answers it.
        build_id: The attempt that made it: a rebuild is another answer.
        watched: What it rests on, as it looked.
        said: What went to standard error.
        printed: What went to standard output.
        seal: Digest of the others.
        siblings: For an entry of a wider reach than was asked, the entries of its model that it was chosen from.
    """

    command: str
    key: str
    build_id: str
    watched: bytes
    said: bytes
    printed: bytes
    seal: str
    siblings: str | None = None


@dataclass(frozen=True)
class InflationStep:
    """A step of eviction's inflation; see :mod:`enginecache.maintenance.eviction`.

    Attributes:
        at: When.
        value: In force from then on until the next step.
    """

    at: dt.datetime
    value: float


@dataclass(frozen=True)
class RegistryTotals:
    """Counts for ``stats``."""

    entries: int
    blobs: int
    size_bytes: int
    pinned: int
    builds_succeeded: int
    builds_failed: int
    build_seconds: float
    misses: int
