"""From an entry to an ``ICudaEngine``: first in a child process, then in this one, and what came of it remembered.

A plan that crashes TensorRT's deserializer crashes the child; the second loading, here, then does not happen. What is
remembered only saves work: a registry that cannot be read or written stops no loading.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from collections.abc import Callable, Sequence
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
from enginecache.files.units import utc_now
from enginecache.host.devices import Device, current_device
from enginecache.host.targets import DeviceModel
from enginecache.key.options import PluginLibrary
from enginecache.storage.registry.base import Registry
from enginecache.storage.registry.rows import EntryRecord, LoadOutcome, LoadRecord
from enginecache.trt.load.deserialize import deserialize
from enginecache.trt.load.request import Deserializer, Failure, LoadRequest, Trial, driver_of
from enginecache.trt.load.trial import ProcessTrial
from enginecache.trt.load.verdict import judge

TrialPolicy = Literal["auto", "never", "always"]
"""``auto``: in a child first, unless the blob was built or loaded here. ``never``: in this process alone, which a bad
plan may crash. ``always``: in a child first, also where it was refused or loaded before.
"""

TRIAL_POLICIES: tuple[TrialPolicy, ...] = get_args(TrialPolicy)

MAX_KEPT_LETTERS = 8000
"""Of TensorRT's lines, in one row."""

_LOGGER = logging.getLogger("enginecache")


def device_here() -> Device | None:
    """The GPU that is current in this thread, or None where there is none or it cannot be told."""
    try:
        return current_device()
    except NoDeviceError:
        return None


class EngineLoader:
    """Loads stored engines. Safe across threads and processes.

    Args:
        registry: Where outcomes are remembered.
        set_aside: Quarantines an entry's blob, although its bytes are whole, and forgets its entries; given the reason.
        find_device: Finds the GPU that TensorRT will use in this process.
        trial: Loads a plan in another process.
        deserialize: Loads a plan in this one.
    """

    def __init__(
        self,
        registry: Registry,
        set_aside: Callable[[EntryRecord, str], object],
        *,
        find_device: Callable[[], Device | None] = device_here,
        trial: Trial | None = None,
        deserialize: Deserializer = deserialize,
    ) -> None:
        self._registry = registry
        self._set_aside = set_aside
        self._find_device = find_device
        self._trial = ProcessTrial() if trial is None else trial
        self._deserialize = deserialize
        self._loaded: set[tuple[str, str, str]] = set()

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
            trusted: Whether host code in a version-compatible plan that was built elsewhere may run.
            trial: Whether it is loaded in a child process first.

        Returns:
            The ``ICudaEngine`` of the flavour's module.

        Raises:
            IntegrityError: The bytes do not have their digest, or cannot be read; TensorRT has not seen them.
            LoadError: TensorRT refused the plan, or crashed on it, where it should run; it was set aside.
            LoadRefusedError: It cannot be loaded here and now, for a reason outside it; it stays.
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
        device = self._find_device()
        place = None if device is None else (record.digest, device.device_class, driver_of(device))
        # What this process has loaded before is not asked of the registry.
        has_loaded = trial == "auto" and place in self._loaded
        known = None if has_loaded else self._recall(record, device)
        if known is not None and known.outcome != "loaded" and trial != "always":
            raise _failed_before(path, known)
        has_loaded = is_noted = has_loaded or (known is not None and known.outcome == "loaded")
        is_built_here = (not has_loaded or _is_version_compatible(record)) and self._is_built_on_this_host(record)
        request = _request(record, path, plugins, may_run_host_code=trusted or is_built_here)
        is_new = not has_loaded and (not is_built_here or device is None or record.device_name != device.name)
        if trial == "always" or (trial == "auto" and is_new):
            failure = self._trial(request, device)
            if failure is not None:
                raise self._judged(record, request, device, failure)
            has_loaded = True
        outcome = self._deserialize(request)
        if isinstance(outcome, Failure):
            raise self._judged_here(record, request, device, outcome, has_loaded=has_loaded)
        if not is_noted:  # a load of what is known writes nothing
            self._remember(record, device, "loaded", "")
        if place is not None:
            self._loaded.add(place)
        for line in outcome.warnings:
            _LOGGER.warning("TensorRT, loading %s: %s", record.model_name, line)
        return outcome.engine

    def _judged_here(
        self,
        record: EntryRecord,
        request: LoadRequest,
        device: Device | None,
        failure: Failure,
        *,
        has_loaded: bool,
    ) -> EngineCacheError:
        """A failure in this process, which much besides the plan may be to blame for: a fresh one has the last word."""
        if has_loaded:
            return self._judged(record, request, device, failure, has_loaded=True)
        again = self._trial(request, device)
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
        """What to raise, after a bad plan has been set aside and a lasting refusal remembered."""
        verdict = judge(request, device, failure, has_loaded=has_loaded)
        what = f"TensorRT did not load the engine {request.path}: {verdict.reason}"
        if verdict.is_lasting:
            self._remember(record, device, verdict.outcome, "\n".join((verdict.reason, *failure.lines)))
        if verdict.outcome == "refused":
            return LoadRefusedError(what, verdict.fix)
        try:
            self._set_aside(record, verdict.reason)
        except EngineCacheError as error:
            # The first error is the one to tell: what is bad stays so, whether or not it can be moved.
            return LoadError(what, f"It could not be set aside: {error}")
        return LoadError(what, verdict.fix)

    def _is_built_on_this_host(self, record: EntryRecord) -> bool:
        try:
            builds = self._registry.builds(record.key)
        except RegistryError:
            return False
        return any(build.id == record.build_id and build.host == platform.node() for build in builds)

    def _recall(self, record: EntryRecord, device: Device | None) -> LoadRecord | None:
        if device is None:  # what is not known cannot be found again
            return None
        with contextlib.suppress(RegistryError):
            return self._registry.find_load(record.digest, device.device_class, _toolchain(record), driver_of(device))
        return None

    def _remember(self, record: EntryRecord, device: Device | None, outcome: LoadOutcome, reason: str) -> None:
        if device is None:
            return
        text = reason.encode(errors="backslashreplace").decode()[:MAX_KEPT_LETTERS]
        row = LoadRecord(
            digest=record.digest,
            device=device.device_class,
            toolchain=_toolchain(record),
            driver=driver_of(device),
            outcome=outcome,
            reason=text,
            at=utc_now(),
        )
        with contextlib.suppress(RegistryError):
            self._registry.record_load(row)


def _is_missing(path: Path) -> bool:
    try:
        os.stat(path, follow_symlinks=False)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def _is_version_compatible(record: EntryRecord) -> bool:
    return bool(record.fields.get("options", {}).get("version_compatible"))


def _toolchain(record: EntryRecord) -> str:
    return f"{record.backend} {record.tensorrt_version}"


def _request(
    record: EntryRecord, path: Path, plugins: tuple[PluginLibrary, ...], *, may_run_host_code: bool
) -> LoadRequest:
    fields = record.fields
    device = fields.get("target", {}).get("device")
    is_version_compatible = _is_version_compatible(record)
    return LoadRequest(
        path=Path(os.path.abspath(path)),  # noqa: PTH100  # Path.resolve would follow links
        digest=record.digest,
        flavour=record.backend,
        version=record.tensorrt_version,
        reach=record.reach,
        tuned_for=None if device is None else str(DeviceModel(device["name"], device["sm_count"])),
        is_version_compatible=is_version_compatible,
        plugins=plugins,
        allows_host_code=is_version_compatible and may_run_host_code,
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
