"""EngineCache, the interface of a program to its cache: the order of the steps of one call."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enginecache.config import Backend, Config, Settings, Shared, chosen_settings, require_choice
from enginecache.errors import IntegrityError, LoadError, LoadRefusedError, NotCachedError
from enginecache.exchange.engines import PortableEngines
from enginecache.host.devices import current_device, find_device
from enginecache.key.matching import REBUILD, Accept, older_driver
from enginecache.key.options import HardwareCompatibility, Precision
from enginecache.key.shape_syntax import Corners
from enginecache.maintenance.inspect import Stored
from enginecache.pipeline.hit_cache import Name, RecentHits, request_of
from enginecache.pipeline.lookup import Lookup, Match, Miss
from enginecache.pipeline.model_memo import FileMemo
from enginecache.pipeline.placement import place
from enginecache.pipeline.request import IF_UNLOADABLE, GetAsk, IfUnloadable, Model, Policy, Request, given
from enginecache.pipeline.resolve import Resolved, resolve
from enginecache.pipeline.results import Entry, Explanation, failed_check
from enginecache.storage.locks import WaitingCallback
from enginecache.trt.build.request import Builder, ProgressCallback

if TYPE_CHECKING:
    from enginecache.exchange.adopt import Adopted
    from enginecache.pipeline.build_once import BuildOnce
    from enginecache.pipeline.load import EngineLoader, TrialPolicy
    from enginecache.pipeline.publish import Publication
    from enginecache.pipeline.runtime_cache import EngineRuntimeCache
    from enginecache.quality.check import CheckOptions
    from enginecache.quality.entries import EntryChecks
    from enginecache.quality.result import Check


class EngineCache(PortableEngines):
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

    Attributes:
        remembers_hits: Whether a hit is remembered for the next call with the same arguments. A program that asks once
            saves a few milliseconds without.
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
        self._memo = FileMemo(self._storage.reader)
        self._lookup = Lookup(self._storage)
        self._hits = RecentHits(self._storage, frozenset(self.config.pass_environment))
        self._builder = builder
        self._place = place
        self.remembers_hits = True

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
        check: bool | CheckOptions = False,
        require_check: bool = False,
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
            accept: ``compatible`` also takes a stored engine that runs here and is not exactly the requested one.
            verify_model: Read the model's files again, although they look unchanged.
            offline: Never build; a miss is an error.
            rebuild: Build even if an engine is stored or a failure is remembered, and replace it.
            timeout_s: Longest wait for another builder, in seconds; None takes the configuration's. The build itself
                has no limit.
            timing_cache: Begin the build with the timing cache that is kept for its kind, and add to it.
            check: Compare what the engine computes with ONNX Runtime, before it is published, or where a stored one was
                not checked; :class:`enginecache.CheckOptions` says how.
            require_check: Refuse an engine without a passed check. One that was not checked is checked first, and
                refused if ``offline``.
            progress: Called with each step of a build, from the calling thread.
            waiting: Called about once a second while another process builds.
            made: Called with the folder when a new cache is made there.

        Raises:
            InvalidInputError: The model, shapes or options are wrong, or the model changed while building.
            NotCachedError: ``offline``, and no stored engine serves the request.
            LockTimeoutError: Another process still builds.
            BuildError: TensorRT refused the model or failed; or did so lately, and is not tried again yet.
            BackendError: No TensorRT or GPU for what was asked.
            CheckError: The engine failed its check, and was not published; or a stored one did, and is marked.
            RegistryError: The registry cannot be used.
            StoreError: The folder cannot be used.
        """
        ask = given(locals(), _DEFAULTS)  # first: of nothing but the arguments
        started = time.monotonic()
        self._storage.look(self.config.shared)
        checks = self._checks(ask)
        name = None if checks else self._hits.name(model, ask)
        recent = self._hits.recall(name)
        if recent is not None:
            return recent.timed(time.monotonic() - started)
        return self._get(request_of(name, model, ask), Policy.of(ask), name, started, checks)

    def _get(
        self, request: Request, policy: Policy, name: Name | None, started: float, checks: EntryChecks | None = None
    ) -> Entry:
        """Resolve the request, look for its engine, and build it if need be.

        Args:
            request: What is asked; of ``name`` where there is one. Nothing here asks the caller's values again.
            policy: How far to go for it.
            name: What a hit is remembered under; None for not at all.
            started: When the call began.
            checks: Checks what the engine computes; None for no check.
        """
        before = self._hits.situation(name) if self.remembers_hits else None
        with self._storage.reader.connected():
            resolved = self._resolve(request)
            found = Miss((REBUILD,)) if policy.rebuild else self._lookup.serve(resolved.key, resolved.accept)
            if isinstance(found, Match) and checks is None:
                return self._hits.keep(name, before, resolved, self._entry(found, resolved, started))
            if isinstance(found, Miss) and policy.offline:
                raise self._lookup.offline_error(resolved, found)
        if isinstance(found, Miss):
            policy = policy if checks is None else checks.prepare(resolved, policy)
            found = self._builds.build_once(resolved, found, policy)
        if checks is not None:
            found = checks.require(found, resolved, offline=policy.offline)
        return self._entry(found, resolved, started)

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
        check: bool | CheckOptions = False,
        require_check: bool = False,
        progress: ProgressCallback | None = None,
        waiting: WaitingCallback | None = None,
        made: Callable[[Path], object] | None = None,
    ) -> Any:
        """Return the engine of :meth:`get`, deserialized in this process on the current CUDA device.

        A plan that TensorRT refuses or crashes on, though it should run here, is quarantined and built anew.

        Args:
            model: As for :meth:`get`, and so are all keywords that are not described here.
            trial: Whether the plan is first loaded in a child process, to which a crash is confined: ``auto`` (if it is
                not known to load here), ``always`` or ``never``. A trial costs its time and GPU memory.
            trusted: Whether a version-compatible plan may run its own host code in this process.
            if_unloadable: ``raise`` quarantines the plan and builds nothing; ``rebuild`` builds another.

        Returns:
            The ``ICudaEngine`` of the flavour that built it.

        Raises:
            EngineCacheError: As :meth:`get`.
            LoadRefusedError: TensorRT does not load it for a reason outside it, such as no driver, another GPU or too
                little memory. The plan stays.
            LoadError: The plan is bad, and was set aside; so was the one built in its place, if one was.
        """
        ask = given(locals(), _DEFAULTS)
        require_choice("if_unloadable", if_unloadable, IF_UNLOADABLE)
        # Once: what is built in its place must be of the same request, whatever other threads change meanwhile.
        started = time.monotonic()
        self._storage.look(self.config.shared)
        checks = self._checks(ask)
        name = None if checks else self._hits.name(model, ask)
        request, policy = request_of(name, model, ask), Policy.of(ask)
        entry = self._hits.recall(name) or self._get(request, policy, name, started, checks)
        try:
            return entry.load(trial=trial, trusted=trusted)
        except LoadRefusedError:
            if entry.outcome != "compatible" or if_unloadable == "raise":
                raise  # another plan of the same key would be refused as well
        except LoadError:
            if if_unloadable == "raise" or policy.offline:
                raise
        except (IntegrityError, NotCachedError):
            # Damage that moved no fingerprint: the medium's, not a program's. Or deleted since it was handed out.
            self._storage.set_aside(entry.record)
            if if_unloadable == "raise":
                raise
        exact, policy = dataclasses.replace(request, accept="exact"), dataclasses.replace(policy, rebuild=False)
        again = self._get(exact, policy, None, time.monotonic(), checks)
        return again.load(trial=trial, trusted=trusted)

    def runtime_cache(self, engine: Any, entry: Entry, device: int | None = None) -> EngineRuntimeCache:
        """Return the kernels that TensorRT-RTX compiles for an engine, kept per blob, GPU and driver.

        Args:
            engine: What ``entry.load()`` gave.
            entry: The entry.
            device: CUDA ordinal of the GPU that it is on; None takes the one that is current.

        Raises:
            NoDeviceError: There is no such GPU.
        """
        from enginecache.pipeline.runtime_cache import RuntimeCaches

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
        ask = given(locals(), _EXPLAIN_DEFAULTS)
        self._storage.look(self.config.shared)
        with self._storage.reader.connected():
            return self._lookup.explain(self._resolve(Request.of(model, ask)))

    def adopt(  # noqa: D417  the others are those of get
        self,
        plan: str | os.PathLike[str],
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
    ) -> Adopted:
        """Store a plan that another program built, as far as it can be verified. The file is left alone.

        It is marked as adopted. ``accept="compatible"`` takes it; it is a hit once a check on a GPU has passed.

        Args:
            plan: The file.
            model: As for :meth:`get`, and so are all keywords.

        Raises:
            InvalidInputError: It is no plan, is damaged or wrapped, or contradicts the request.
            BackendError: Another TensorRT built it than the one here.
            StoreError: It cannot be stored.
        """
        from enginecache.exchange.adopt import adopt_plan

        ask = given(locals(), _EXPLAIN_DEFAULTS)
        self._storage.look(self.config.shared)
        resolved = self._resolve(Request.of(model, ask))
        return adopt_plan(self._storage, resolved, Path(plan), make=self.make, shrink=self._shrink)

    def check(
        self,
        engine: Stored,
        model: Model,
        options: CheckOptions | None = None,
        *,
        base_dir: str | os.PathLike[str] | None = None,
        plugins: Sequence[str | os.PathLike[str]] = (),
    ) -> Check:
        """Compare what a stored engine computes with ONNX Runtime, and keep the result with it. Builds nothing.

        Args:
            engine: An entry, its row, or a key.
            model: The model that it was built from: the cache keeps engines, not models.
            options: Inputs and tolerance; None takes the defaults.
            base_dir: Folder of the external data, for model bytes.
            plugins: Paths of the libraries with TensorRT plugins that it was built with.

        Raises:
            ModelError: It was built from another model.
            NotCachedError: It is not stored.
            OptionError: The inputs or the tolerance do not fit the model.
            CheckUnavailableError: ONNX Runtime is not installed; or, where a GPU runs the engine, cuda-bindings.
        """
        request = Request.of(model, {"base_dir": base_dir, "plugins": plugins})
        source = dataclasses.replace(request.source, follows_links=self._current_config().follow_links)
        record = self.find_intact(self._record(engine).key)
        libraries = tuple(map(self._memo.plugin, request.plugins))
        _, found = self._entry_checks(options).check(record, source, self._memo.identify(source), libraries)
        return found

    def _checks(self, ask: GetAsk) -> EntryChecks | None:
        """Take the check from the keywords of a call; None if it asks for none."""
        check, requires = ask.pop("check", False), ask.pop("require_check", False)
        if check is False and not requires:
            return None
        return self._entry_checks(None if isinstance(check, bool) else check, requires=requires)

    def _entry_checks(self, options: CheckOptions | None, *, requires: bool = False) -> EntryChecks:
        from enginecache.quality.entries import EntryChecks

        return EntryChecks(self._storage, self.config, options, requires=requires)

    def _resolve(self, request: Request) -> Resolved:
        """Look up everything that the key is made of, with the settings as they are now."""
        return resolve(request, self._current_config(), self._memo, self._place)

    def _current_config(self) -> Config:
        """Return the settings as they are now, where they were not given for good."""
        if self._settings is not None:
            config = self._settings.refresh()
            if config is not self.config:
                self.config = config
                self._hits = RecentHits(self._storage, frozenset(config.pass_environment))
        return self.config

    def _entry(self, found: Match, resolved: Resolved, started: float) -> Entry:
        self._storage.last_used.touch(found.record.key)
        return Entry(
            outcome=found.outcome,
            path=self._storage.path(found.record),
            record=found.record,
            source=resolved.source,
            requested_key=resolved.key.digest,
            elapsed_seconds=time.monotonic() - started,
            plugins=resolved.key.options.plugins,
            loader=lambda: self._loader,
            siblings=found.siblings,
            files=resolved.files,
            reasons=(
                *found.reasons,
                *failed_check(found.record),
                *older_driver(resolved.placement.device, found.record.driver_version),
            ),
        )

    @functools.cached_property
    def _publication(self) -> Publication:
        from enginecache.pipeline.publish import Publication
        from enginecache.trt.build.process import ProcessBuilder

        return Publication(self._storage, self._builder or ProcessBuilder(self.config.python))

    @functools.cached_property
    def _builds(self) -> BuildOnce:
        from enginecache.pipeline.build_once import BuildOnce

        return BuildOnce(
            self._storage,
            self._lookup,
            self._publication,
            self._memo,
            watch_for=self._hits.watch_for,
            shrink=self._shrink,
        )

    @functools.cached_property
    def _loader(self) -> EngineLoader:
        from enginecache.pipeline.load import EngineLoader, Loading
        from enginecache.trt.load.trial import ProcessTrial

        trial = ProcessTrial(self.config.python, self.config.pass_environment)
        return EngineLoader(self._registry, self._storage.quarantine, Loading(trial))


_DEFAULTS = EngineCache.get.__kwdefaults__ or {}
_EXPLAIN_DEFAULTS = EngineCache.explain.__kwdefaults__ or {}
