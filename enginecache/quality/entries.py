"""Checks of the cache's engines: of a new one before it is published, and of stored ones."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from enginecache.config import Config
from enginecache.errors import CheckError, ModelError, NotCachedError, OptionError, RegistryError, StoreError
from enginecache.files.os_errors import describe_os_error
from enginecache.host.devices import Device
from enginecache.host.targets import Target
from enginecache.host.toolchain import Toolchain
from enginecache.key.matching import Reason
from enginecache.key.options import BuildOptions, PluginLibrary
from enginecache.key.precision import Conversion
from enginecache.key.profiles import Profile, ShapeRange
from enginecache.model import ModelIdentity, ModelSource
from enginecache.pipeline.load import device_here, load_request
from enginecache.pipeline.lookup import Match
from enginecache.pipeline.placement import required_reach
from enginecache.pipeline.publish import device_lock
from enginecache.pipeline.request import Policy
from enginecache.pipeline.resolve import Resolved
from enginecache.quality.check import Checker, CheckOptions, Subject, plan_points, require_packages
from enginecache.quality.result import Check
from enginecache.storage.blobs import StagedBlob
from enginecache.storage.registry.rows import EntryRecord
from enginecache.storage.storage import Storage
from enginecache.trt.build.codec import CONVERTED_NAME, CONVERTED_WEIGHTS_NAME
from enginecache.trt.build.request import BuildRequest, BuiltPlan
from enginecache.trt.load.request import LoadRequest

_NO_FOLDER = Path("/")
"""Nothing is written there: the check has a folder of its own."""

_REBUILD = "Build it again with --rebuild and --check, or check it again with `enginecache check`."
_NOT_PUBLISHED = "Nothing was published."
_NO_PLACE = "no folder for the arrays of a check can be made"


def stored_check(record: EntryRecord) -> Check | None:
    """Return the result of the last check of an entry; None if there was none, or its plan is another by now."""
    return Check.from_text(record.check_json, record.digest)


class EntryChecks:
    """Checks for one call. Safe across threads and processes.

    Args:
        storage: Where results are kept.
        config: The settings: the interpreter of child processes, and the longest wait for a GPU.
        options: Inputs and tolerance; None takes the defaults.
        requires: Whether an engine without a passed check is refused.
        checker: Makes the checks; default: in child processes.
        find_device: Finds the GPU that is current here.
    """

    def __init__(
        self,
        storage: Storage,
        config: Config,
        options: CheckOptions | None = None,
        *,
        requires: bool = False,
        checker: Checker | None = None,
        find_device: Callable[[], Device | None] = device_here,
    ) -> None:
        self._storage = storage
        self._timeout_s = config.timeout_s
        self._checker = Checker(config.python, config.pass_environment) if checker is None else checker
        self._options = CheckOptions.of(options)
        self._requires = requires
        self._find_device = find_device

    def prepare(self, resolved: Resolved, policy: Policy) -> Policy:
        """Return the policy of a build that is checked; refuse what no check could do, before an engine is built.

        Raises:
            OptionError: The inputs or the tolerance do not fit the model.
            CheckUnavailableError: A package is missing.
        """
        plan_points(self._options, resolved.identity.inputs, resolved.profiles)
        device = resolved.placement.device or self._find_device()
        is_run = device is not None and required_reach(resolved.key.target).covers_one(device.compute_capability)
        require_packages(device if is_run else None)
        return replace(policy, examine=self.examine)

    def examine(self, request: BuildRequest, built: BuiltPlan, staged: StagedBlob) -> str:
        """Check a plan that is not published yet.

        Returns:
            The result, for the entry's row.

        Raises:
            CheckError: It failed.
        """
        plan = LoadRequest(
            path=staged.path,
            digest=staged.digest,
            flavour=request.toolchain.flavour,
            version=built.loaded_version,
            reach=built.reach,
            tuned_for=None if request.target.device_model is None else str(request.target.device_model),
            is_version_compatible=request.options.version_compatible,
            plugins=request.options.plugins,
            allows_host_code=request.options.version_compatible,  # it was built a moment ago
        )
        subject = Subject(request, plan, self._device_for(plan, request.device), _converted(request.work_dir))
        folder = request.work_dir / "check"
        try:
            folder.mkdir()
            folder.chmod(self._storage.root.folder_mode)
        except OSError as error:
            raise StoreError(*describe_os_error(error, _NO_PLACE, folder, in_cache=True)) from error
        check = self._checker.check(subject, self._options, folder)
        if check.verdict == "failed":
            what = f"the engine of {request.source.name} {check}"
            raise CheckError(what, f"{_NOT_PUBLISHED} {_advice(check, request.options)}", check.to_json())
        return check.to_text()

    def require(self, found: Match, resolved: Resolved, *, offline: bool) -> Match:
        """Return a stored engine that was checked as far as the call asks for; checked now where it was not.

        Raises:
            CheckError: It failed its check; or a passed one is required, and nothing was shown.
            NotCachedError: A passed check is required, there is none, and the call must do no work.
        """
        record, check = found.record, stored_check(found.record)
        if check is None or not self._is_enough(check, record, found):
            if offline and self._requires:
                why = "was not checked" if check is None or check.verdict == "passed" else str(check)
                why += " with these inputs or this tolerance" if self._options != CheckOptions() else ""
                what = f"the stored engine {record.key[:12]} {why}"
                fix = "Leave --offline out, or check it where it was built: `enginecache check` with the same options."
                raise NotCachedError(what, fix)
            plugins, device = resolved.key.options.plugins, resolved.placement.device
            record, check = self.check(record, resolved.source, resolved.identity, plugins, device)
        if check.verdict == "failed" or (check.verdict != "passed" and self._requires):
            what = f"the stored engine {record.key[:12]} {check}"
            raise CheckError(what, _REBUILD if check.verdict == "failed" else "", check.to_json())
        reason = (
            Reason("checked", str(check)) if check.verdict == "passed" else Reason("warning", f"this engine {check}")
        )
        return replace(found, record=record, reasons=(*found.reasons, reason))

    def _is_enough(self, check: Check, record: EntryRecord, found: Match) -> bool:
        """Return whether a stored result answers the call, so that nothing is computed.

        Not where other inputs or another tolerance are asked for, or where a GPU is here and none was at the last time.
        """
        if found.outcome == "built":
            return True  # checked a moment ago
        if check.verdict == "uninformative" or self._options != CheckOptions():
            return False
        is_further = check.scope == "graph" and self._device_for(load_request(record, Path("/")), None) is not None
        return self._requires or not is_further

    def check(
        self,
        record: EntryRecord,
        source: ModelSource,
        identity: ModelIdentity,
        plugins: Sequence[PluginLibrary] = (),
        device: Device | None = None,
    ) -> tuple[EntryRecord, Check]:
        """Check a stored engine, and keep the result with it, unless the last one shows more.

        Args:
            record: The entry.
            source: The model that it was built from.
            identity: The model's digests and inputs.
            plugins: Libraries of plugins that the plan needs.
            device: The GPU to run it on; None takes the one that is current.

        Returns:
            The entry with the result, and the result.

        Raises:
            ModelError: It was built from another model.
            OptionError: The inputs or the tolerance do not fit the model, or it was built with other plugins.
            CheckUnavailableError: A package is missing.
        """
        if plugins and {plugin.digest for plugin in plugins} != set(record.fields["options"]["plugins"]):
            message = f"the engine {record.key[:12]} was built with other plugin libraries than these"
            raise OptionError(message, "Give the very libraries that it was built with, with --plugin.")
        if not _is_of(record, identity):
            what = f"the engine {record.key[:12]} was built from another model ({record.model_name}) than {source.name}"
            raise ModelError(what, "Name the model that it was built from.")
        plan = load_request(record, self._storage.path(record), plugins)
        build = _build_of(record, source, identity, plugins)
        device = self._device_for(plan, device)
        with self._device_held(plan, device), self._folder() as folder:
            check = self._checker.check(Subject(build, plan, device), self._options, folder)
        # The answer is known, and a cache that is read-only cannot keep it.
        with contextlib.suppress(StoreError, RegistryError):
            current = self._storage.registry.find(record.key)
            if (
                current is not None
                and current.build_id == record.build_id
                and _shows_less(check, stored_check(current))
            ):
                return current, check
            record = self._storage.record_check(record, check.to_text())
        return record, check

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        """Make a folder for arrays: in the cache, where a prune deletes what a crash left; else the system's."""
        with contextlib.ExitStack() as held:
            try:
                inside = tempfile.TemporaryDirectory(prefix="check-", dir=self._storage.root.tmp)
                Path(inside.name).chmod(self._storage.root.folder_mode)  # for a prune by another user of the group
            except OSError:  # read-only
                try:
                    inside = tempfile.TemporaryDirectory(prefix="enginecache-check-")
                except OSError as error:
                    raise StoreError(*describe_os_error(error, _NO_PLACE, tempfile.gettempdir())) from error
            yield Path(held.enter_context(inside))

    @contextlib.contextmanager
    def _device_held(self, plan: LoadRequest, device: Device | None) -> Iterator[None]:
        """Hold the GPU's lock: a build that measures tactics would be disturbed. TensorRT-RTX measures none."""
        with contextlib.ExitStack() as held:
            if device is not None and plan.flavour == "tensorrt":
                with contextlib.suppress(StoreError):  # a folder that is read-only has no locks, and no builds
                    held.enter_context(self._storage.locks.hold(device_lock(device), self._timeout_s))
            yield

    def _device_for(self, plan: LoadRequest, device: Device | None) -> Device | None:
        """Return the GPU to run the plan on: the chosen one, else that which is here, if the plan reaches it."""
        found = self._find_device() if device is None else device
        return found if found is not None and plan.reach.covers_one(found.compute_capability) else None


def _shows_less(check: Check, known: Check | None) -> bool:
    """Return whether a result must not replace the one that is known: a graph is no engine, and no verdict is none."""
    return known is not None and check.weight < known.weight


def _is_of(record: EntryRecord, identity: ModelIdentity) -> bool:
    """Return whether an entry was built from a model, by its key: notes in the graph count where it was converted."""
    model = record.fields["model"]
    known = (model["structure"], model["weights"], model.get("value_info") or identity.value_info)
    return known == (identity.structure, identity.weights, identity.value_info)


def _converted(work_dir: Path) -> Path | None:
    folder = work_dir / CONVERTED_NAME
    found = [path for path in folder.glob("*") if path.name != CONVERTED_WEIGHTS_NAME] if folder.is_dir() else []
    return found[0] if len(found) == 1 else None


def _advice(check: Check, options: BuildOptions) -> str:
    lower = [f"--{name}" for name in options.precision]
    without = f"Leave {' and '.join(lower)} out, or give" if lower else "Give"
    return (
        f"{without} inputs that the model is made for (--inputs, --input-range), or another tolerance with --max-error "
        f"if an error of {check.largest_error:.2g} will do."
    )


def _build_of(
    record: EntryRecord, source: ModelSource, identity: ModelIdentity, plugins: Sequence[PluginLibrary]
) -> BuildRequest:
    """Return the request that an entry was built from, as far as a check needs it."""
    fields = record.fields
    options, conversion = fields["options"], fields["conversion"]
    try:
        return BuildRequest(
            source=source,
            identity=identity,
            profiles=tuple(map(_profile, fields["profiles"])),
            options=BuildOptions(
                precision=tuple(options["precision"]),
                strip_plan=options["strip_plan"],
                builder_flags=tuple(options["builder_flags"]),
                plugins=tuple(plugins),
            ),
            toolchain=Toolchain(**fields["toolchain"]),
            target=Target(record.reach.compute_capabilities),
            device=None,
            work_dir=_NO_FOLDER,
            log_path=_NO_FOLDER,
            conversion=None if conversion is None else Conversion(**conversion),
        )
    except (KeyError, TypeError) as error:
        what = f"the key of the engine {record.key[:12]} is of another release of enginecache: {error}"
        raise OptionError(what, "Build it again, and check the new engine.") from error


def _profile(fields: dict[str, Any]) -> Profile:
    ranges = (
        (name, ShapeRange(tuple(f["min"]), tuple(f["opt"]), tuple(f["max"]), is_values=f["kind"] == "values"))
        for name, f in fields.items()
    )
    return Profile(tuple(sorted(ranges)))
