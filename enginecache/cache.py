"""EngineCache: the whole cache for a program. Wiring, and the order of steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from enginecache import environment
from enginecache.builders.base import Builder
from enginecache.builders.child import ProcessBuilder
from enginecache.config import Config, require_seconds
from enginecache.devices import current_device, find_device
from enginecache.entry import Candidate, Entry, Explanation, Outcome
from enginecache.environment import keyed, passed, snapshot
from enginecache.errors import (
    EngineCacheError,
    IntegrityError,
    LoadError,
    LoadRefusedError,
    NotCachedError,
    OptionError,
    ProfileError,
    RegistryError,
)
from enginecache.failures import KnownFailure, failure_in_force
from enginecache.hits import Name, RecentHits
from enginecache.key import EngineKey
from enginecache.loader import EngineLoader, TrialPolicy
from enginecache.lookup import Match, Miss
from enginecache.matching import Reason, older_driver
from enginecache.options import format_size
from enginecache.placement import Placement, place
from enginecache.precision import plan_conversion
from enginecache.profiles import resolve_profiles
from enginecache.publication import Publication, Resolved
from enginecache.registry.records import EntryRecord, utc_now
from enginecache.request import IF_UNLOADABLE, Ask, GetAsk, IfUnloadable, Model, Request
from enginecache.runtime_cache import EngineRuntimeCache, RuntimeCaches
from enginecache.runtimes.trial import ProcessTrial
from enginecache.store.space import require_writable
from enginecache.stored import StoredEngines
from enginecache.timing import TimingCaches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class EngineCache(StoredEngines):
    """A cache of TensorRT engines.

    Safe from threads and processes: ``get`` builds an engine at most once for a key, whoever asks. It holds no open
    file or connection between calls, so it may be carried across a fork.

    Example:
        >>> with EngineCache.open() as cache:                                    # doctest: +SKIP
        ...     entry = cache.get("model.onnx", dims={"batch": (1, 32, 64)})
        ...     engine = cache.load("model.onnx", dims={"batch": (1, 32, 64)})
    """

    def __init__(self, config: Config, *, builder: Builder | None = None, place: Callable[..., Any] = place) -> None:
        super().__init__(config)
        self._publication = Publication(
            self.root,
            self._registry,
            self._store,
            self._locks,
            ProcessBuilder(config.python) if builder is None else builder,
            TimingCaches(self.root, self._locks, python=config.python),
        )
        trial = ProcessTrial(config.python, also=config.pass_environment)
        self._loader = EngineLoader(self._registry, self._lookup.quarantine, trial=trial)
        self._place = place
        self._hits = RecentHits(self.root, self._registry, self._uses, frozenset(config.pass_environment))

    def get(self, model: Model, **ask: Unpack[GetAsk]) -> Entry:
        """The engine for exactly this request: a stored one, or one built now.

        Blocks while it builds, or while another process builds the same. What it returns is durable.

        Args:
            model: Path of an ONNX file, or a serialized ``ModelProto``.
            **ask: What else is asked, and how far to go for it: see :class:`~enginecache.request.GetAsk` and
                :class:`~enginecache.request.Ask`.

        Raises:
            InvalidInputError: The model, shapes or options are wrong, or the model changed while building.
            NotCachedError: ``offline``, and no stored engine serves the request.
            LockTimeoutError: Another process still builds.
            BuildError: TensorRT refused the model or failed; or it did so lately, and it is too soon to try again.
            BackendError: No TensorRT or GPU for what was asked.
            RegistryError: The registry cannot be used.
            StoreError: The folder cannot be used.
        """
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
        rebuild = ask.get("rebuild", False)
        if rebuild and ask.get("offline"):
            raise OptionError("offline and rebuild exclude each other", "Leave one of them out.")
        situation = None if name is None else self._hits.situation()
        resolved = self.resolve(request)
        # A rebuild is content with what another process has come to since it was asked for, engine or failure.
        outdated = self._attempts(resolved.key) if rebuild else frozenset[str]()
        found = Miss((_REBUILD,)) if rebuild else self._find(resolved.key)
        if isinstance(found, Match):
            entry = self._entry("hit", resolved, found.record, started, found.reasons, found.siblings)
            self._hits.keep(name, situation, resolved.identity, entry, resolved.environment)
            return entry
        compatible = self._compatible(resolved, found)
        if compatible is not None:
            return self._entry("compatible", resolved, compatible.record, started, compatible.verdict.reasons)
        if ask.get("offline"):
            self._note_miss(resolved.key, found)
            raise self._explained(found).error(resolved.key, self._failure(resolved.key))
        new = self._make_for(resolved, ask.get("made"))
        self._note_miss(resolved.key, found)
        self._raise_failure(resolved.key, outdated)  # before the lock too: it may be held by a long build
        require_writable(self.root)  # before the lock, which could not be taken either
        timeout_s = ask.get("timeout_s")
        timeout_s = self.config.timeout_s if timeout_s is None else timeout_s
        began_waiting = time.monotonic()
        is_published = None if rebuild else self._hits.watch_for(resolved.key.digest)
        # Who waited for an engine that is there need not wait for the others that did, one after another.
        with self._locks.hold(resolved.key.digest, timeout_s, ask.get("waiting"), is_published) as is_held:
            waited_s = time.monotonic() - began_waiting
            again = self._find(resolved.key)
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
        warned = tuple(
            Reason("warning", text) for text in (*resolved.warnings, *built.warnings, *self._enforce_limit())
        )
        return self._entry("built", resolved, record, started, (*found.reasons, *new, *warned))

    def load(
        self,
        model: Model,
        *,
        trial: TrialPolicy = "auto",
        trusted: bool = False,
        if_unloadable: IfUnloadable = "rebuild",
        **ask: Unpack[GetAsk],
    ) -> Any:
        """Like :meth:`get`, then deserialize the engine in this process, on the CUDA device that is current.

        A plan that TensorRT refuses or crashes on, though it should run here, is quarantined and built anew.

        Args:
            model: As for :meth:`get`.
            trial: Whether the plan is first loaded in a child process, which a crash cannot take further: ``auto``
                where it is not known to load here, ``always`` or ``never``. A trial costs its time and GPU memory.
            trusted: Whether a version-compatible plan that was not built here may run its own host code.
            if_unloadable: ``raise`` leaves it at the quarantine, and builds nothing.
            **ask: As for :meth:`get`.

        Returns:
            The ``ICudaEngine`` of the flavour that built it.

        Raises:
            EngineCacheError: As :meth:`get`.
            LoadRefusedError: TensorRT does not load it for a reason outside it, such as no driver, another GPU or too
                little memory. The plan stays.
            LoadError: The plan is bad, and was set aside; so was the one built in its place, or none was to be built.
        """
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
            self._lookup.set_aside(entry.record)
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

    def _compatible(self, resolved: Resolved, miss: Miss) -> Candidate | None:
        """The best stored engine that runs here and is not quite what was asked, if the caller takes such."""
        if resolved.accept != "compatible":
            return None
        good = (candidate for candidate in miss.candidates if candidate.verdict.level == "compatible")
        return next((candidate for candidate in good if self._lookup.whole(candidate)), None)

    def explain(self, model: Model, **ask: Unpack[Ask]) -> Explanation:
        """What :meth:`get` would do now, and why. Builds nothing.

        Raises:
            EngineCacheError: As :meth:`get`, without building.
        """
        self._look()
        resolved = self.resolve(Request.of(model, ask))
        found = self._lookup.find(resolved.key)
        miss = (
            self._explained(found)
            if isinstance(found, Miss)
            else Miss(found.reasons, self._lookup.candidates(resolved.key))
        )
        chosen = None if isinstance(found, Match) else self._compatible(resolved, miss)
        verdict: Literal["hit", "compatible", "miss"] = "compatible" if chosen is not None else "miss"
        reasons = (*miss.reasons, *(() if chosen is None else chosen.verdict.reasons))
        known = self._failure(resolved.key) if verdict == "miss" and isinstance(found, Miss) else None
        if known is not None:
            reasons = (*reasons, Reason("failed", f"{known.text}, but with --rebuild: {known.build.reason}"))
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
        """Look up everything the key is made of. The one place where a key is made.

        Raises:
            InvalidInputError: The model, shapes or options are wrong.
            BackendError: No TensorRT or GPU for what was asked.
        """
        config = self._current_config()
        source = dataclasses.replace(request.source, follows_links=config.follow_links)
        identity = self._memo.identify(source, force=request.verify_model)
        try:
            profiles = resolve_profiles(identity.inputs, request.shapes)
        except ProfileError as error:
            raise self._with_placement(error, request, config) from None
        placement = self._placement(request, config)
        options = dataclasses.replace(request.options, plugins=tuple(map(self._memo.plugin, request.plugins)))
        conversion = plan_conversion(options, placement.toolchain, identity)
        # Once, so that the key and the builder have the same values whatever another thread sets meanwhile.
        variables, also = snapshot(), config.pass_environment
        conditions = keyed(variables, also)
        key = EngineKey.of(identity, profiles, options, placement.toolchain, placement.target, conversion, conditions)
        return Resolved(
            source,
            identity,
            profiles,
            placement,
            key,
            (*options.warnings(), *environment.warnings(variables, also)),
            request.accept,
            passed(variables, also),
        )

    def _placement(self, request: Request, config: Config) -> Placement:
        placement: Placement = self._place(
            request.backend or config.backend,
            request.target,
            request.device,
            options=request.options,
            cuda_major=config.cuda_major,
        )
        return placement

    def _with_placement(self, error: ProfileError, request: Request, config: Config) -> ProfileError:
        """Return the error with what else stands in the way, so that it takes one round to learn of both."""
        try:
            self._placement(request, config)
        except EngineCacheError as other:
            return ProfileError(error.what, f"{error.fix}\nThen: {other.what}\n{other.fix}")
        return error

    def _current_config(self) -> Config:
        """The settings as they are now, where they were not given for good."""
        if self._settings is not None:
            config = self._settings.refresh()
            if config is not self.config:
                self.config = config
                self._hits = RecentHits(self.root, self._registry, self._uses, frozenset(config.pass_environment))
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

    def _enforce_limit(self) -> tuple[str, ...]:
        """Shrink the cache to its limit after a build; warnings. What was just built stays, and is not failed by it."""
        limit = self.config.max_size_bytes
        if limit is None:
            return ()
        try:
            plan = self._removal.enforce(limit)
        except EngineCacheError as error:
            return (f"the cache was not shrunk to its limit of {format_size(limit)}: {error.what}",)
        if plan is None or not plan.shortfall_bytes:
            return ()
        above = f"{format_size(plan.shortfall_bytes)} above its limit of {format_size(limit)}"
        return (f"the cache is {above}: the rest is pinned, in use, or was used just now",)

    def _find(self, key: EngineKey) -> Match | Miss:
        # The use is noted before the row is read: a prune that takes the row after this sees it, and leaves the blob.
        noted = key.digest if self._uses.last_used(key.digest) is not None else ""
        damaged: tuple[Reason, ...] = ()
        while True:
            if noted:
                self._uses.touch(noted)
            found = self._lookup.find(key)
            if isinstance(found, Miss):
                return dataclasses.replace(found, reasons=(*damaged, *found.reasons))
            if found.record.key == noted:
                return dataclasses.replace(found, reasons=(*found.reasons, *damaged))
            noted = found.record.key
            damaged += found.reasons[1:]

    def _entry(
        self,
        outcome: Outcome,
        resolved: Resolved,
        record: EntryRecord,
        started: float,
        reasons: Sequence[Reason],
        siblings: str | None = None,
    ) -> Entry:
        self._uses.touch(record.key)
        return Entry(
            outcome=outcome,
            path=self._store.path(record.digest),
            record=record,
            source=resolved.source,
            requested_key=resolved.key.digest,
            elapsed_seconds=time.monotonic() - started,
            plugins=resolved.key.options.plugins,
            loader=self._loader,
            siblings=siblings,
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

    def _note_miss(self, key: EngineKey, miss: Miss) -> None:
        nearest = miss.nearest
        differing = [] if nearest is None else [difference.field for difference in nearest.verdict.differing]
        nearest_key = None if nearest is None else nearest.record.key
        try:
            self._registry.record_miss(key.digest, miss.reasons[0].code, nearest_key, differing)
        except RegistryError:
            return  # a count; the build says soon enough that nothing can be written


def _request(name: Name | None, model: Model, ask: GetAsk) -> Request:
    """The request, of the values in its name where it has one."""
    return Request.of(model, ask) if name is None else Request.of(name.path, cast("Ask", name.ask()))


_REBUILD = Reason("rebuild", "a rebuild was asked for")
_WAITED = Reason("waited", "another process built it while this one waited")
