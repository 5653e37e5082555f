"""From an entry to an ``ICudaEngine``: first in a child process, then in this one, and the result remembered.

A plan that crashes TensorRT's deserializer crashes the child; the second loading, here, then does not happen. What is
remembered only saves work: a registry that cannot be read or written stops no loading.

A result in the registry names the boot of the host that found it. That a plan was loaded counts in that boot alone: a
registry may be shared, or copied into an image, and a host name or ``/etc/machine-id`` is the same in all copies of an
image. So the first load after a reboot is a trial again. A lasting refusal is about the class of GPU, and counts on
every host.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from enginecache.errors import (
    EngineCacheError,
    IntegrityError,
    LoadError,
    LoadRefusedError,
    NoDeviceError,
    NotCachedError,
    OptionError,
    RegistryError,
    shown,
)
from enginecache.files.mounts import boot_id
from enginecache.files.units import utc_now
from enginecache.host.devices import Device, current_device
from enginecache.host.targets import DeviceModel
from enginecache.key.options import PluginLibrary
from enginecache.storage.registry.registry import Registry
from enginecache.storage.registry.rows import EntryRecord, LoadOutcome, LoadRecord
from enginecache.trt.load.deserialize import deserialize
from enginecache.trt.load.request import Deserializer, Failure, LoadRequest, Trial, driver_of
from enginecache.trt.load.trial import ProcessTrial
from enginecache.trt.load.verdict import judge

TrialPolicy = Literal["auto", "never", "always"]
"""``auto``: in a child first, unless this host has loaded the plan since it started. ``never``: in this process alone,
which a bad plan may crash. ``always``: in a child first, also where it was refused or loaded before.
"""

TRIAL_POLICIES: tuple[TrialPolicy, ...] = get_args(TrialPolicy)

MAX_KEPT_CHARACTERS = 8000
"""Of TensorRT's lines, in one row."""

_LOGGER = logging.getLogger("enginecache")


def device_here() -> Device | None:
    """Return the GPU that is current in this thread; None if there is none, or it cannot be found out."""
    try:
        return current_device()
    except NoDeviceError:
        return None


@dataclass(frozen=True)
class Loading:
    """The parts of a loading that need TensorRT or a GPU.

    Attributes:
        trial: Loads a plan in another process.
        deserializer: Loads a plan in this one.
        find_device: Finds the GPU that TensorRT will use in this process; None where there is none, or it is unknown.
    """

    trial: Trial = field(default_factory=ProcessTrial)
    deserializer: Deserializer = deserialize
    find_device: Callable[[], Device | None] = device_here


def first_step(known: LoadOutcome | None, policy: TrialPolicy) -> Literal["raise", "try", "load"]:
    """Decide what comes first. Pure.

    ======================  ======  =======  ========
    known of the plan here  auto    never    always
    ======================  ======  =======  ========
    nothing                 try     load     try
    loaded                  load    load     try
    refused, bad            raise   raise    try
    ======================  ======  =======  ========

    Args:
        known: Outcome of an earlier loading that counts here; None for nothing.
        policy: As the caller asks.

    Returns:
        ``raise``: the earlier failure again. ``try``: a child process loads the plan, then this one. ``load``: this
        process loads it.
    """
    if policy == "always":
        return "try"
    if known in {"refused", "bad"}:
        return "raise"
    return "load" if known == "loaded" or policy == "never" else "try"


class EngineLoader:
    """Loads stored engines. Safe across threads and processes.

    Args:
        registry: Where outcomes are remembered.
        set_aside: Quarantines an entry's blob, although its bytes are whole, and forgets its entries; given the reason.
        loading: What loads a plan, and on which GPU.
    """

    def __init__(
        self,
        registry: Registry,
        set_aside: Callable[[EntryRecord, str], object],
        loading: Loading,
    ) -> None:
        self._registry = registry
        self._set_aside = set_aside
        self._loading = loading
        self._loaded: set[tuple[str, str, str]] = set()
        """Plans that this process has loaded, with GPU and driver: the registry is not asked for them."""

    def load(
        self,
        record: EntryRecord,
        path: Path,
        *,
        plugins: Sequence[PluginLibrary] = (),
        trusted: bool = False,
        trial: TrialPolicy = "auto",
    ) -> Any:
        """Deserialize a stored engine in this process, on the CUDA device that is current.

        A trial costs the time of a second loading, and for that time the engine's memory on the GPU. What is found out
        about the blob on this class of GPU, with this TensorRT and driver, is remembered.

        Args:
            record: The entry.
            path: Its plan.
            plugins: Libraries of plugins that the plan needs.
            trusted: Whether host code in a version-compatible plan may run.
            trial: Whether it is loaded in a child process first.

        Returns:
            The ``ICudaEngine`` of the flavour's module.

        Raises:
            IntegrityError: The bytes do not have their digest, or cannot be read; TensorRT has not seen them.
            LoadError: TensorRT refused the plan, or crashed on it, where it should run; it was set aside.
            LoadRefusedError: It cannot be loaded here and now, and the plan is not to blame; it stays.
            NotCachedError: The plan was deleted since it was handed out.
        """
        if trial not in TRIAL_POLICIES:
            raise OptionError(f"trial: {shown(trial)} is not one of them", f"Give {', '.join(TRIAL_POLICIES)}.")
        try:
            return self._load(record, path, tuple(plugins), trusted=trusted, trial=trial)
        except IntegrityError as error:
            # Asked afterwards: an eviction may come at any time, also between the trial and the loading here.
            if not _is_missing(path):
                raise
            message = f"the engine {path} was deleted after it was handed out"
            raise NotCachedError(message, "Ask `enginecache get` for it again.") from error

    def _load(
        self, record: EntryRecord, path: Path, plugins: tuple[PluginLibrary, ...], *, trusted: bool, trial: TrialPolicy
    ) -> Any:
        device = self._loading.find_device()
        known = self._recall(record, device, trial)
        outcome = None if known is None else known.outcome
        step = first_step(outcome, trial)
        if known is not None and step == "raise":
            raise _failed_before(path, known)
        request = load_request(record, path, plugins, trusted=trusted)
        if step == "try":
            failure = self._loading.trial(request, device)
            if failure is not None:
                raise self._judged(record, request, device, failure)
        loaded = self._loading.deserializer(request)
        if isinstance(loaded, Failure):
            has_loaded = step == "try" or outcome == "loaded"
            raise self._judged_here(record, request, device, loaded, has_loaded=has_loaded)
        if outcome != "loaded":  # a load of what is known writes nothing
            self._remember(record, device, "loaded", "")
        if device is not None:
            self._loaded.add(_place(record, device))
        for line in loaded.warnings:
            _LOGGER.warning("TensorRT, loading %s: %s", record.model_name, line)
        return loaded.engine

    def _judged_here(
        self,
        record: EntryRecord,
        request: LoadRequest,
        device: Device | None,
        failure: Failure,
        *,
        has_loaded: bool,
    ) -> EngineCacheError:
        """Return what to raise for a failure in this process.

        Much besides the plan may be to blame for it, so a fresh process has the last word.
        """
        if has_loaded:
            return self._judged(record, request, device, failure, has_loaded=True)
        again = self._loading.trial(request, device)
        return self._judged(record, request, device, failure if again is None else again, has_loaded=again is None)

    def _judged(
        self,
        record: EntryRecord,
        request: LoadRequest,
        device: Device | None,
        failure: Failure,
        *,
        has_loaded: bool = False,
    ) -> EngineCacheError:
        """Return what to raise, after a bad plan has been set aside and a lasting refusal remembered."""
        verdict = judge(request, device, failure, has_loaded=has_loaded)
        what = f"TensorRT did not load the engine {request.path}: {verdict.reason}"
        if verdict.is_lasting:
            self._remember(record, device, verdict.outcome, "\n".join((verdict.reason, *failure.lines)))
        if verdict.outcome == "refused":
            return LoadRefusedError(what, verdict.fix)
        try:
            self._set_aside(record, verdict.reason)
        except EngineCacheError as error:
            # The first error is the one to report: what is bad stays so, whether or not it can be moved.
            return LoadError(what, f"It could not be set aside: {error}")
        return LoadError(what, verdict.fix)

    def _recall(self, record: EntryRecord, device: Device | None, trial: TrialPolicy) -> LoadRecord | None:
        """Return the result of an earlier loading that counts here."""
        if device is None:  # a GPU that is not known cannot be recognized
            return None
        if trial != "always" and _place(record, device) in self._loaded:
            return _result(record, device, "loaded", "")
        with contextlib.suppress(RegistryError):
            known = self._registry.find_load(record.digest, device.device_class, _toolchain(record), driver_of(device))
            if known is not None and (known.outcome != "loaded" or known.boot == boot_id() != ""):
                return known
        return None

    def _remember(self, record: EntryRecord, device: Device | None, outcome: LoadOutcome, reason: str) -> None:
        if device is None:
            return
        with contextlib.suppress(RegistryError):
            self._registry.record_load(_result(record, device, outcome, reason))


def _is_missing(path: Path) -> bool:
    try:
        os.stat(path, follow_symlinks=False)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def _place(record: EntryRecord, device: Device) -> tuple[str, str, str]:
    return record.digest, device.device_class, driver_of(device)


def _result(record: EntryRecord, device: Device, outcome: LoadOutcome, reason: str) -> LoadRecord:
    return LoadRecord(
        digest=record.digest,
        device=device.device_class,
        toolchain=_toolchain(record),
        driver=driver_of(device),
        outcome=outcome,
        reason=reason.encode(errors="backslashreplace").decode()[:MAX_KEPT_CHARACTERS],
        at=utc_now(),
        boot=boot_id(),
    )


def _toolchain(record: EntryRecord) -> str:
    return f"{record.backend} {record.tensorrt_version}"


def load_request(
    record: EntryRecord, path: Path, plugins: Sequence[PluginLibrary] = (), *, trusted: bool = False
) -> LoadRequest:
    """Return the request to load a stored plan.

    Args:
        record: Its entry.
        path: Where it is.
        plugins: Libraries of plugins that it needs.
        trusted: Whether a version-compatible plan may run its own host code.
    """
    fields = record.fields
    device = fields.get("target", {}).get("device")
    is_version_compatible = bool(fields.get("options", {}).get("version_compatible"))
    return LoadRequest(
        path=Path(os.path.abspath(path)),  # noqa: PTH100  # Path.resolve would follow links
        digest=record.digest,
        flavour=record.backend,
        version=record.tensorrt_version,
        reach=record.reach,
        tuned_for=None if device is None else str(DeviceModel(device["name"], device["sm_count"])),
        is_version_compatible=is_version_compatible,
        plugins=tuple(plugins),
        allows_host_code=is_version_compatible and trusted,
    )


def _failed_before(path: Path, known: LoadRecord) -> EngineCacheError:
    age_s = max((utc_now() - known.at).total_seconds(), 0.0)
    age = f"{age_s / 3600:.0f} h" if age_s >= 5400 else f"{age_s / 60:.0f} min"
    reason = known.reason.partition("\n")[0]
    message = f"TensorRT did not load the engine {path} {age} ago, on this class of GPU and this driver: {reason}"
    if known.outcome == "refused":
        return LoadRefusedError(message, "Load it with trial='always' to try it again; the engine is kept.")
    # Set aside then, and built again since, to the same bytes: building it once more would not help.
    fix = "TensorRT builds the same bytes again: try another release of it, or trial='always' to load it all the same."
    return LoadError(message, fix)
