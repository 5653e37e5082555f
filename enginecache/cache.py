"""EngineCache: the whole cache for a program. Wiring, and the order of steps."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from enginecache.config import Backend, Config, Settings, Shared, chosen_settings, require_seconds
from enginecache.errors import (
    IntegrityError,
    LoadError,
    LoadRefusedError,
    NotCachedError,
    OptionError,
)
from enginecache.files.fingerprint import Fingerprint
from enginecache.files.units import utc_now
from enginecache.host.devices import current_device, find_device
from enginecache.key.key import EngineKey
from enginecache.key.matching import Accept, Reason, older_driver
from enginecache.key.options import HardwareCompatibility, Precision
from enginecache.key.shape_syntax import Corners
from enginecache.maintenance.inspect import StoredEngines
from enginecache.pipeline.failures import KnownFailure, failure_in_force
from enginecache.pipeline.hit_cache import Name, RecentHits
from enginecache.pipeline.load import EngineLoader, Loading, TrialPolicy
from enginecache.pipeline.lookup import Lookup, Match, Miss
from enginecache.pipeline.model_memo import FileMemo
from enginecache.pipeline.placement import place
from enginecache.pipeline.publish import Publication, Resolved
from enginecache.pipeline.request import IF_UNLOADABLE, Ask, GetAsk, IfUnloadable, Model, Request
from enginecache.pipeline.resolve import resolve
from enginecache.pipeline.results import Entry, Explanation, Outcome
from enginecache.pipeline.runtime_cache import EngineRuntimeCache, RuntimeCaches
from enginecache.storage.locks import WaitingCallback
from enginecache.storage.registry.rows import EntryRecord
from enginecache.storage.space import require_writable
from enginecache.trt.build.process import ProcessBuilder
from enginecache.trt.build.request import Builder, ProgressCallback
from enginecache.trt.load.trial import ProcessTrial


class EngineCache(StoredEngines):
    """A cache of TensorRT engines.

    Safe from threads and processes: ``get`` builds an engine at most once for a key, whoever asks. It holds no open
    file or connection between calls, so it may be carried across a fork. A server opens it once and keeps it.
    ``EngineCache(...)`` takes what :meth:`open` takes.

    Example:
        >>> cache = EngineCache("/var/cache/engines")                            # doctest: +SKIP
        ... entry = cache.get("model.onnx", dims={"batch": (1, 32, 64)})
        ... engine = cache.load("model.onnx", dims={"batch": (1, 32, 64)})

    Args:
        builder: Builds the engines in place of the default, a child process.
        place: Chooses who builds, for what.
    """

    def __init__(
        self,
        dir: str | os.PathLike[str] | Config | Settings | None = None,  # noqa: A002  the setting's name
        *,
        shared: Shared | None = None,
        backend: Backend | None = None,
        timeout_s: float | None = None,
        max_size_bytes: int | None = None,
        keep_recent_s: float | None = None,
        grace_s: float | None = None,
        failure_ttl_s: float | None = None,
        cuda_major: int | None = None,
        pass_environment: Sequence[str] | None = None,
        follow_links: bool | None = None,
        python: str | os.PathLike[str] | None = None,
        builder: Builder | None = None,
        place: Callable[..., Any] = place,
    ) -> None:
        given = {
            "shared": shared,
            "backend": backend,
            "timeout_s": timeout_s,
            "max_size_bytes": max_size_bytes,
            "keep_recent_s": keep_recent_s,
            "grace_s": grace_s,
            "failure_ttl_s": failure_ttl_s,
            "cuda_major": cuda_major,
            "pass_environment": pass_environment,
            "follow_links": follow_links,
            "python": python,
        }
        super().__init__(dir if isinstance(dir, Settings) else chosen_settings(dir, given))
        config = self.config
        self._memo = FileMemo(self._registry)
        self._lookup = Lookup(self._storage)
        self._publication = Publication(self._storage, ProcessBuilder(config.python) if builder is None else builder)
        loading = Loading(ProcessTrial(config.python, config.pass_environment))
        self._loader = EngineLoader(self._registry, self._storage.quarantine, loading)
        self._place = place
        self._hits = RecentHits(self._storage, frozenset(config.pass_environment))

    def get(
        self,
        model: Model,
        *,
        base_dir: str | os.PathLike[str] | None = None,
        profiles: Sequence[Mapping[str, Corners]] = (),
        dims: Mapping[str, tuple[int, int, int] | int] | None = None,
        workspace_bytes: int | None = None,
        optimization_level: int | None = None,
        precision: Precision | Sequence[Precision] = (),
        convert_io: bool = False,
        hardware_compatibility: HardwareCompatibility = "none",
        version_compatible: bool = False,
        strip_plan: bool = False,
        builder_flags: Sequence[str] = (),
        plugins: Sequence[str | os.PathLike[str]] = (),
        backend: Backend | None = None,
        target: str | Sequence[str] | None = None,
        device: int | None = None,
        accept: Accept = "exact",
        verify_model: bool = False,
        offline: bool = False,
        rebuild: bool = False,
        timeout_s: float | None = None,
        timing_cache: bool = True,
        progress: ProgressCallback | None = None,
        waiting: WaitingCallback | None = None,
        made: Callable[[Path], object] | None = None,
    ) -> Entry:
        """Return the engine for exactly this request: a stored one, or one built now.

        Blocks while it builds, or while another process builds the same. What it returns is durable. An exception
        from a callback ends the build and is raised.

        Args:
            model: Path of an ONNX file, or a serialized ``ModelProto``.
            base_dir: Folder of the external data, for model bytes.
            profiles: One mapping for each optimization profile, from an input's name to its (minimum, optimum, maximum)
                shapes, such as ``((1, 3, 32, 32), (32, 3, 32, 32), (64, 3, 32, 32))``; for a shape tensor, to values.
            dims: From the name of an ONNX dimension to (minimum, optimum, maximum), or to one fixed size:
                ``{"batch": (1, 32, 64), "height": 320}``. Makes one profile.
            workspace_bytes: Limit of the workspace in bytes; None leaves TensorRT's default.
            optimization_level: From 0 (fastest build) to 5 (fastest engine); None is TensorRT's default, 3.
            precision: ``fp16``, ``bf16``, ``int8``, ``fp8``, or several; none is FP32.
            convert_io: When the graph is converted to FP16 or BF16, convert its inputs and outputs too.
            hardware_compatibility: ``none`` (this GPU model only), ``same_compute_capability`` or ``ampere_plus``.
            version_compatible: Build a plan that later TensorRT releases of the same major version load.
            strip_plan: Leave the weights out of the plan; it must be refitted.
            builder_flags: Names of further builder flags; ``TF32=OFF`` clears one.
            plugins: Paths of libraries with TensorRT plugins.
            backend: ``auto``, ``tensorrt`` or ``tensorrt-rtx``; None takes the configuration's.
            target: Compute capability to build for, ``sm_89`` or ``8.9``; ``portable``; or several. None takes the
                device's.
            device: CUDA ordinal; None takes the GPU that CUDA would use.
            accept: ``compatible`` also takes a stored engine that runs here and is not quite what was asked.
            verify_model: Read the model's files even if nothing about them has changed since they were read.
            offline: Never build; a miss is an error.
            rebuild: Build even if an engine is stored or a failure is remembered, and replace it.
            timeout_s: Longest wait for another builder, in seconds; None takes the configuration's. The build itself
                has no limit.
            timing_cache: Begin the build with the timing cache that is kept for its kind, and add to it.
            progress: Called with each step of a build, from the calling thread.
            waiting: Called about once a second while another process builds.
            made: Called with the folder when a new cache is made there.

        Raises:
            InvalidInputError: The model, shapes or options are wrong, or the model changed while building.
            NotCachedError: ``offline``, and no stored engine serves the request.
            LockTimeoutError: Another process still builds.
            BuildError: TensorRT refused the model or failed; or it did so lately, and it is too soon to try again.
            BackendError: No TensorRT or GPU for what was asked.
            RegistryError: The registry cannot be used.
            StoreError: The folder cannot be used.
        """
        ask = _given(locals(), _DEFAULTS)  # first: of nothing but the arguments
        started = time.monotonic()
        self._look()
        name = self._hits.name(model, ask)
        recent = self._hits.recall(name)
        if recent is not None:
            return recent.timed(time.monotonic() - started)
        return self._get(_request(name, model, ask), ask, name, started)

    def _get(self, request: Request, ask: GetAsk, name: Name | None, started: float) -> Entry:
        """The long way of :meth:`get`.

        Args:
            request: What is asked; of ``name`` where there is one. Nothing here asks the caller's values again.
            ask: How far to go for it.
            name: What a hit is remembered under; None for not at all.
            started: When the call began.
        """
        require_seconds("timeout_s", ask.get("timeout_s"))
        for callback in ("progress", "waiting", "made"):
            if ask.get(callback) is not None and not callable(ask.get(callback)):
                raise OptionError(f"{callback} cannot be called", "Give a function, or None.")
        rebuild = ask.get("rebuild", False)
        if rebuild and ask.get("offline"):
            raise OptionError("offline and rebuild exclude each other", "Leave one of them out.")
        situation = None if name is None else self._hits.situation()
        with self._registry.connected():
            resolved = self.resolve(request)
            # A rebuild is content with what another process has come to since it was asked for, engine or failure.
            outdated = self._attempts(resolved.key) if rebuild else frozenset[str]()
            found = Miss((_REBUILD,)) if rebuild else self._lookup.find_in_use(resolved.key)
            if isinstance(found, Match):
                entry = self._entry("hit", resolved, found.record, started, found.reasons, found.siblings)
                self._hits.keep(name, situation, resolved.identity, entry, resolved.environment)
                return entry
            compatible = self._lookup.compatible(found, resolved.accept)
            if compatible is not None:
                return self._entry("compatible", resolved, compatible.record, started, compatible.verdict.reasons)
            if ask.get("offline"):
                self._lookup.note_miss(resolved.key, found)
                raise self._explained(found).error(resolved.key, self._failure(resolved.key))
        new = self._make_for(resolved, ask.get("made"))
        self._lookup.note_miss(resolved.key, found)
        self._raise_failure(resolved.key, outdated)  # before the lock too: it may be held by a long build
        require_writable(self.root)  # before the lock, which could not be taken either
        timeout_s = ask.get("timeout_s")
        timeout_s = self.config.timeout_s if timeout_s is None else timeout_s
        began_waiting = time.monotonic()
        is_published = None if rebuild else self._hits.watch_for(resolved.key.digest)
        # Who waited for an engine that is there need not wait for the others that did, one after another.
        with self._storage.locks.hold(resolved.key.digest, timeout_s, ask.get("waiting"), is_published) as is_held:
            waited_s = time.monotonic() - began_waiting
            again = self._lookup.find_in_use(resolved.key)
            is_new = isinstance(again, Match) and again.record.build_id not in outdated
            if isinstance(again, Match) and is_new and (again.is_exact or not rebuild):
                why = (*(() if again.is_exact else again.reasons), *found.reasons)
                return self._entry("hit", resolved, again.record, started, (_WAITED, *why))
            if not is_held:
                return self._get(request, ask, name, started)  # it was there, and was deleted again
            self._raise_failure(resolved.key, outdated)
            record, built = self._publication.build(
                resolved,
                ask.get("progress"),
                timeout_s=None if timeout_s is None else max(timeout_s - waited_s, 0.0),
                waiting=ask.get("waiting"),
                uses_timing_cache=ask.get("timing_cache", True),
            )
        config = self.config
        above = self._removal.enforce_limit(config.max_size_bytes, config.keep_recent_s, built=record.digest)
        warned = (Reason("warning", text) for text in (*resolved.warnings, *built.warnings, *above))
        return self._entry("built", resolved, record, started, (*found.reasons, *new, *warned))

    def load(  # noqa: D417  the others are those of get
        self,
        model: Model,
        *,
        trial: TrialPolicy = "auto",
        trusted: bool = False,
        if_unloadable: IfUnloadable = "rebuild",
        base_dir: str | os.PathLike[str] | None = None,
        profiles: Sequence[Mapping[str, Corners]] = (),
        dims: Mapping[str, tuple[int, int, int] | int] | None = None,
        workspace_bytes: int | None = None,
        optimization_level: int | None = None,
        precision: Precision | Sequence[Precision] = (),
        convert_io: bool = False,
        hardware_compatibility: HardwareCompatibility = "none",
        version_compatible: bool = False,
        strip_plan: bool = False,
        builder_flags: Sequence[str] = (),
        plugins: Sequence[str | os.PathLike[str]] = (),
        backend: Backend | None = None,
        target: str | Sequence[str] | None = None,
        device: int | None = None,
        accept: Accept = "exact",
        verify_model: bool = False,
        offline: bool = False,
        rebuild: bool = False,
        timeout_s: float | None = None,
        timing_cache: bool = True,
        progress: ProgressCallback | None = None,
        waiting: WaitingCallback | None = None,
        made: Callable[[Path], object] | None = None,
    ) -> Any:
        """Like :meth:`get`, then deserialize the engine in this process, on the CUDA device that is current.

        A plan that TensorRT refuses or crashes on, though it should run here, is quarantined and built anew.

        Args:
            model: As for :meth:`get`, and so are all keywords that are not described here.
            trial: Whether the plan is first loaded in a child process, which a crash cannot take further: ``auto``
                where it is not known to load here, ``always`` or ``never``. A trial costs its time and GPU memory.
            trusted: Whether a version-compatible plan may run its own host code in this process.
            if_unloadable: ``raise`` leaves it at the quarantine, and builds nothing.

        Returns:
            The ``ICudaEngine`` of the flavour that built it.

        Raises:
            EngineCacheError: As :meth:`get`.
            LoadRefusedError: TensorRT does not load it for a reason outside it, such as no driver, another GPU or too
                little memory. The plan stays.
            LoadError: The plan is bad, and was set aside; so was the one built in its place, or none was to be built.
        """
        ask = _given(locals(), _DEFAULTS)
        if if_unloadable not in IF_UNLOADABLE:
            raise OptionError(f"if_unloadable: {if_unloadable!r}", f"Give one of {', '.join(IF_UNLOADABLE)}.")
        # Once: what is built in its place must be of the same request, whatever other threads change meanwhile.
        started = time.monotonic()
        name = self._hits.name(model, ask)
        request = _request(name, model, ask)
        entry = self._hits.recall(name) or self._get(request, ask, name, started)
        try:
            return entry.load(trial=trial, trusted=trusted)
        except LoadRefusedError:
            if entry.outcome != "compatible" or if_unloadable == "raise":
                raise  # another plan of the same key would be refused as well
        except LoadError:
            if if_unloadable == "raise" or ask.get("offline"):
                raise
        except (IntegrityError, NotCachedError):
            # Damage that moved no fingerprint: the medium's, not a program's. Or deleted since it was handed out.
            self._storage.set_aside(entry.record)
            if if_unloadable == "raise":
                raise
        ask["rebuild"] = False
        again = self._get(dataclasses.replace(request, accept="exact"), ask, None, time.monotonic())
        return again.load(trial=trial, trusted=trusted)

    def runtime_cache(self, engine: Any, entry: Entry, device: int | None = None) -> EngineRuntimeCache:
        """The kernels that TensorRT-RTX compiles for an engine, kept per blob, GPU and driver.

        Args:
            engine: What ``entry.load()`` gave.
            entry: The entry.
            device: CUDA ordinal of the GPU that it is on; None takes the one that is current.

        Raises:
            NoDeviceError: There is no such GPU.
        """
        found = current_device() if device is None else find_device(device)
        return RuntimeCaches(self.root).of(engine, entry.record, found)

    def explain(
        self,
        model: Model,
        *,
        base_dir: str | os.PathLike[str] | None = None,
        profiles: Sequence[Mapping[str, Corners]] = (),
        dims: Mapping[str, tuple[int, int, int] | int] | None = None,
        workspace_bytes: int | None = None,
        optimization_level: int | None = None,
        precision: Precision | Sequence[Precision] = (),
        convert_io: bool = False,
        hardware_compatibility: HardwareCompatibility = "none",
        version_compatible: bool = False,
        strip_plan: bool = False,
        builder_flags: Sequence[str] = (),
        plugins: Sequence[str | os.PathLike[str]] = (),
        backend: Backend | None = None,
        target: str | Sequence[str] | None = None,
        device: int | None = None,
        accept: Accept = "exact",
        verify_model: bool = False,
    ) -> Explanation:
        """Return what :meth:`get` would do now for the same model and keywords, and why. Builds nothing.

        Raises:
            EngineCacheError: As :meth:`get`, without building.
        """
        ask = _given(locals(), _EXPLAIN_DEFAULTS)
        self._look()
        with self._registry.connected():
            resolved = self.resolve(Request.of(model, ask))
            found = self._lookup.find(resolved.key)
            miss = (
                self._explained(found)
                if isinstance(found, Miss)
                else Miss(found.reasons, self._lookup.candidates(resolved.key))
            )
            chosen = None if isinstance(found, Match) else self._lookup.compatible(miss, resolved.accept)
            verdict: Literal["hit", "compatible", "miss"] = "compatible" if chosen is not None else "miss"
            reasons = (*miss.reasons, *(() if chosen is None else chosen.verdict.reasons))
            known = self._failure(resolved.key) if verdict == "miss" and isinstance(found, Miss) else None
            if known is not None:
                reasons = (*reasons, Reason("failed", f"{known.text} (--rebuild overrides this): {known.build.reason}"))
            last = next(iter(self._registry.builds(resolved.key.digest, limit=1)), None)
            failed = last if last is not None and last.state == "failed" else None
        return Explanation(
            verdict="hit" if isinstance(found, Match) else verdict,
            requested_key=resolved.key.digest,
            fields=resolved.key.fields(),
            reasons=(*reasons, *(Reason("warning", text) for text in resolved.warnings)),
            entry=found.record if isinstance(found, Match) else None if chosen is None else chosen.record,
            candidates=miss.candidates,
            failure="" if failed is None else failed.reason,
            failure_log=None if failed is None else self._publication.log_path(failed.id),
        )

    def resolve(self, request: Request) -> Resolved:
        """Look up everything that the key is made of, with the settings as they are now.

        Raises:
            InvalidInputError: The model, shapes or options are wrong.
            BackendError: No TensorRT or GPU for what was asked.
        """
        return resolve(request, self._current_config(), self._memo, self._place)

    def _current_config(self) -> Config:
        """The settings as they are now, where they were not given for good."""
        if self._settings is not None:
            config = self._settings.refresh()
            if config is not self.config:
                self.config = config
                self._hits = RecentHits(self._storage, frozenset(config.pass_environment))
        return self.config

    def _explained(self, miss: Miss) -> Miss:
        """A miss with the plainest reason where there is no cache: its folder may be mistyped, or not mounted."""
        if self.root.is_made:
            return miss
        return Miss(
            (Reason("absent", f"no engine of this model is stored: there is no cache in {self.root.path} yet"),)
        )

    def _make_for(self, resolved: Resolved, made: Callable[[Path], object] | None) -> tuple[Reason, ...]:
        """Make what is missing of the cache before the first engine is stored; the reason that says so."""
        if not self.make():
            return ()
        self._memo.keep(resolved.source, resolved.identity)  # there was no place for it when it was found out
        if made is not None:
            made(self.root.path)
        return (Reason("new_cache", f"made a new cache in {self.root.path}"),)

    def _entry(
        self,
        outcome: Outcome,
        resolved: Resolved,
        record: EntryRecord,
        started: float,
        reasons: Sequence[Reason],
        siblings: str | None = None,
    ) -> Entry:
        self._storage.last_used.touch(record.key)
        return Entry(
            outcome=outcome,
            path=self._storage.path(record),
            record=record,
            source=resolved.source,
            requested_key=resolved.key.digest,
            elapsed_seconds=time.monotonic() - started,
            plugins=resolved.key.options.plugins,
            loader=self._loader,
            siblings=siblings,
            files=_files_of(resolved),
            reasons=(*reasons, *older_driver(resolved.placement.device, record.driver_version)),
        )

    def _failure(self, key: EngineKey) -> KnownFailure | None:
        return failure_in_force(self._registry.attempts_since_success(key.digest), utc_now(), self.config.failure_ttl_s)

    def _raise_failure(self, key: EngineKey, outdated: frozenset[str]) -> None:
        failure = self._failure(key)
        if failure is not None and failure.build.id not in outdated:
            raise failure.error(self.log_path(failure.build))

    def _attempts(self, key: EngineKey) -> frozenset[str]:
        """The attempts that the entry and the failure in force are of, as far as there are such."""
        record, failure = self._registry.find(key.digest), self._failure(key)
        stored = () if record is None else (record.build_id,)
        return frozenset((*stored, *(() if failure is None else (failure.build.id,))))


_DEFAULTS = EngineCache.get.__kwdefaults__ or {}
_EXPLAIN_DEFAULTS = EngineCache.explain.__kwdefaults__ or {}


def _files_of(resolved: Resolved) -> tuple[tuple[str, Fingerprint], ...]:
    source = resolved.source
    if source.path is None:
        return ()
    first, *others = resolved.identity.files
    external = ((str(source.path_of(file.location)), file.fingerprint) for file in others)
    return ((str(source.path), first.fingerprint), *external)


def _given(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> GetAsk:
    """Return those of a call's keywords that are not the defaults; a cached hit is named in microseconds."""
    return cast("GetAsk", {name: values[name] for name, default in defaults.items() if values[name] is not default})


def _request(name: Name | None, model: Model, ask: GetAsk) -> Request:
    """The request, of the values in its name where it has one."""
    return Request.of(model, ask) if name is None else Request.of(name.path, cast("Ask", name.ask()))


_REBUILD = Reason("rebuild", "a rebuild was asked for")
_WAITED = Reason("waited", "another process built it while this one waited")
