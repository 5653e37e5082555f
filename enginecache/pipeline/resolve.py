"""Resolve a request: look up everything that its key is made of, and make the key."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from enginecache.config import Config
from enginecache.environment import Pairs, keyed, passed, snapshot, warnings
from enginecache.errors import EngineCacheError, ProfileError
from enginecache.files.fingerprint import Fingerprint
from enginecache.key.key import EngineKey
from enginecache.key.matching import Accept
from enginecache.key.precision import plan_conversion
from enginecache.key.profiles import Profile, resolve_profiles
from enginecache.model import ModelIdentity, ModelSource
from enginecache.pipeline.model_memo import FileMemo
from enginecache.pipeline.placement import Placement
from enginecache.pipeline.request import Request


@dataclass(frozen=True)
class Resolved:
    """A request with everything looked up that the key is made of.

    Attributes:
        source: The model.
        identity: Its digests and inputs.
        profiles: Canonical.
        placement: Who builds, for what.
        key: All of it.
        config: The settings that it was resolved with.
        warnings: What the caller should know before a build.
        accept: How far the caller goes.
        environment: Variables that the builder is given, read once with those of the key.
    """

    source: ModelSource
    identity: ModelIdentity
    profiles: tuple[Profile, ...]
    placement: Placement
    key: EngineKey
    config: Config
    warnings: tuple[str, ...] = ()
    accept: Accept = "exact"
    environment: Pairs = ()

    @property
    def files(self) -> tuple[tuple[str, Fingerprint], ...]:
        """Return the model's files, each with the fingerprint of its digest; empty for model bytes."""
        if self.source.path is None:
            return ()
        first, *others = self.identity.files
        external = ((str(self.source.path_of(file.location)), file.fingerprint) for file in others)
        return ((str(self.source.path), first.fingerprint), *external)


Place = Callable[..., Any]
"""Chooses who builds, for what: :func:`enginecache.pipeline.placement.place`."""


def resolve(request: Request, config: Config, memo: FileMemo, place: Place) -> Resolved:
    """Look up everything that the key is made of. The one place where a key is made.

    Args:
        request: What is asked.
        config: The settings as they are now.
        memo: Digests of files that have not changed.
        place: Chooses who builds, for what.

    Raises:
        InvalidInputError: The model, shapes or options are wrong.
        BackendError: No TensorRT or GPU for what was asked.
    """
    source = dataclasses.replace(request.source, follows_links=config.follow_links)
    identity = memo.identify(source, force=request.verify_model)
    try:
        profiles = resolve_profiles(identity.inputs, request.shapes)
    except ProfileError as error:
        raise _with_placement(error, request, config, place) from None
    placement = _placement(request, config, place)
    options = request.options
    if request.plugins:
        options = dataclasses.replace(options, plugins=tuple(map(memo.plugin, request.plugins)))
    conversion = plan_conversion(options, placement.toolchain, identity)
    # Once, so that the key and the builder have the same values whatever another thread sets meanwhile.
    variables, also = snapshot(), config.pass_environment
    key = EngineKey.of(
        identity, profiles, options, placement.toolchain, placement.target, conversion, keyed(variables, also)
    )
    return Resolved(
        source,
        identity,
        profiles,
        placement,
        key,
        config,
        (*options.warnings(), *warnings(variables, also)),
        request.accept,
        passed(variables, also),
    )


def _placement(request: Request, config: Config, place: Place) -> Placement:
    placement: Placement = place(
        request.backend or config.backend,
        request.target,
        request.device,
        options=request.options,
        cuda_major=config.cuda_major,
    )
    return placement


def _with_placement(error: ProfileError, request: Request, config: Config, place: Place) -> ProfileError:
    """Return the error with what else stands in the way, so that it takes one round to learn of both."""
    try:
        _placement(request, config, place)
    except EngineCacheError as other:
        return ProfileError(error.what, f"{error.fix}\nThen: {other.what}\n{other.fix}")
    return error
