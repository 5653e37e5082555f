"""Take a plan that another program built into the cache, marked as such.

Of a foreign plan can be verified what its header says, and that it has the names of the model's inputs. That its
weights, shapes and options are those that are asked for is its owner's word. So its key is not the request's: it has a
field more, ``adopted``, and an engine with it is never a hit, only compatible (:mod:`enginecache.key.matching`).
"""

from __future__ import annotations

import mmap
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, get_args

from enginecache.config import Config
from enginecache.errors import BackendError, InvalidInputError
from enginecache.exchange.foreign import ForeignFile, examine_file
from enginecache.exchange.headers import PlanHeader
from enginecache.exchange.loads_here import is_same_release, strip_command
from enginecache.files.canonical import canonical_json, key_digest
from enginecache.files.units import utc_now
from enginecache.host.targets import Reach
from enginecache.host.toolchain import PRODUCTS
from enginecache.key.key import KEY_VERSION
from enginecache.pipeline.placement import required_reach
from enginecache.pipeline.resolve import Resolved
from enginecache.storage.registry.rows import EntryRecord
from enginecache.storage.space import SLACK_BYTES, require_room
from enginecache.storage.storage import Storage

Fact = Literal[
    "size",
    "tensorrt_version",
    "compute_capabilities",
    "gpu",
    "input_names",
    "model",
    "profiles",
    "options",
    "precision",
]
FACTS: tuple[Fact, ...] = get_args(Fact)
"""Everything that a request asks of a plan; a header can show the first five."""


@dataclass(frozen=True)
class Adopted:
    """A foreign plan that is stored now.

    Attributes:
        record: Its row.
        is_new: Whether it was stored by this call. The same plan is adopted once for a request, and not at all where
            it is the engine that was built for it.
        verified: The facts that its header and bytes show.
        unverified: The others: its owner's word.
    """

    record: EntryRecord
    is_new: bool
    verified: tuple[Fact, ...]

    @property
    def unverified(self) -> tuple[Fact, ...]:
        """Return the facts that nothing here verifies."""
        return tuple(fact for fact in FACTS if fact not in self.verified)


def adopt_plan(
    storage: Storage,
    resolved: Resolved,
    path: Path,
    *,
    make: Callable[[], object],
    shrink: Callable[[Config, EntryRecord], object],
) -> Adopted:
    """Store a plan for a request, as far as it can be verified without loading it. The file is left alone.

    Args:
        storage: The folder.
        resolved: The request.
        path: The plan.
        make: Makes the folder where it is missing; called for a plan that its header does not rule out.
        shrink: Keeps the cache under its limit after that.

    Raises:
        InvalidInputError: It is no plan, is damaged or wrapped, contradicts the request, or cannot be read.
        BackendError: It is of another TensorRT than the one that is installed.
        StoreError: It cannot be stored.
        RegistryError: Its row cannot be committed.
    """
    found = examine_file(path, with_digest=False)
    header = _require_plan(found)
    verified, reach = _verified(found, header, resolved)
    make()
    require_room(storage.root, f"adopt {path.name}", found.size_bytes + SLACK_BYTES)
    staged = storage.blobs.stage(path)
    try:
        again = examine_file(staged.path, with_digest=False)
        if (again.header, again.size_bytes) != (header, found.size_bytes):
            raise InvalidInputError(f"{path} changed while it was read", "Run it again when nothing writes to it.")
        verified += _input_names(path, staged.path, resolved)
        built = storage.registry.find(resolved.key.digest)
        if built is not None and built.digest == staged.digest:
            return Adopted(built, is_new=False, verified=FACTS)  # a copy of the very engine
        ordered = tuple(fact for fact in FACTS if fact in verified)
        record = _record(resolved, header, reach, staged.digest, staged.size_bytes, ordered)
        taken = storage.admit({staged.digest: staged}, [record])
    finally:
        storage.blobs.discard(staged)
    if not taken:
        return Adopted(storage.registry.find(record.key) or record, is_new=False, verified=ordered)
    shrink(resolved.config, record)
    return Adopted(record, is_new=True, verified=ordered)


def _record(
    resolved: Resolved, header: PlanHeader, reach: Reach, digest: str, size_bytes: int, verified: tuple[Fact, ...]
) -> EntryRecord:
    fields = {**resolved.key.fields(), "adopted": {"digest": digest, "verified": list(verified)}}
    text = canonical_json(fields)
    name = resolved.source.name.encode(errors="backslashreplace").decode()
    return EntryRecord(
        key=key_digest(KEY_VERSION, text),
        key_json=text,
        key_version=KEY_VERSION,
        model_digest=resolved.identity.digest,
        model_name=name,
        digest=digest,
        size_bytes=size_bytes,
        backend=header.flavour,
        tensorrt_version=header.tensorrt_version or resolved.placement.toolchain.version,
        compute_capabilities=reach.to_texts(),
        device_name=None,  # it is not in the file
        driver_version=None,
        build_id=uuid.uuid4().hex,
        build_seconds=0.0,
        created_at=utc_now(),
    )


def _require_plan(found: ForeignFile) -> PlanHeader:
    """Return the header of a whole plan without a wrapper.

    Raises:
        InvalidInputError: It is no such file.
    """
    path = found.path
    if found.wrapper is not None:
        command = strip_command(found)
        fix = f"Take the plan out: {command}\nThen adopt stripped.plan." if command and found.header else ""
        raise InvalidInputError(f"{path} is not a plan, but a file of {found.wrapper.program}", fix or _NO_PLAN)
    if found.is_damaged:
        raise InvalidInputError(f"{path} is damaged: {'; '.join(note.text for note in found.notes)}", _BUILD_AGAIN)
    if found.kind == "ep_context":
        inside = "it holds the plan" if found.contexts[0].path is None else f"the plan is {found.contexts[0].path}"
        raise InvalidInputError(f"{path} is a context model of ONNX Runtime ({inside})", _NO_PLAN)
    if found.kind != "plan" or found.header is None:
        what = "; ".join(note.text for note in found.notes) or f"it is {found.kind}"
        raise InvalidInputError(f"{path} is not a plan of TensorRT: {what}", _NO_PLAN)
    if found.header.doubt or found.header.declared_size_bytes is None:
        why = found.header.doubt or "its header does not say its size"
        raise InvalidInputError(f"{path} cannot be adopted: {why}", _BUILD_AGAIN)
    return found.header


_NO_PLAN = (
    "Name a file with a plan alone, as trtexec --saveEngine writes it; `enginecache inspect` says what a file is."
)
_BUILD_AGAIN = "Get the file again, or let `enginecache get` build the engine."


def _verified(found: ForeignFile, header: PlanHeader, resolved: Resolved) -> tuple[list[Fact], Reach]:
    """Compare a header with the request; return the facts that it shows, and the GPUs that it runs on.

    Raises:
        InvalidInputError: It is for other GPUs.
        BackendError: Another TensorRT built it.
    """
    toolchain, target = resolved.placement.toolchain, resolved.placement.target
    product = PRODUCTS[header.flavour]
    if header.flavour != toolchain.flavour:
        fix = f"Add --backend {header.flavour}, which must be installed."
        raise BackendError(f"{found.path} is a plan of {product}, and {PRODUCTS[toolchain.flavour]} was chosen", fix)
    version = header.tensorrt_version or ""
    if not is_same_release(version, toolchain.version):
        fix = f"Adopt it where {product} {version} is installed, or let `enginecache get` build the engine."
        message = f"{found.path} was built by {product} {version}, and {toolchain.version} is installed"
        raise BackendError(message, fix)
    needed = required_reach(target)
    verified: list[Fact] = ["size", "tensorrt_version"]
    if header.reach is not None:
        if not header.reach.covers(needed):
            _wrong_gpus(found, str(header.reach), str(needed), f" Or name its own with --target {_targets(header)}.")
        return [*verified, "compute_capabilities"], header.reach
    built = header.built_on
    if built is None:
        return verified, needed
    device = resolved.placement.device
    if not needed.covers_one(built.compute_capability):
        _wrong_gpus(found, str(built.compute_capability), str(needed), "")
    if target.device_model is not None and built.sm_count != target.device_model.sm_count:
        _wrong_gpus(found, str(built), str(target.device_model), "")
    is_tuned_here = device is not None and target.device_model is not None
    return [*verified, "compute_capabilities", *(("gpu",) if is_tuned_here else ())], needed


def _wrong_gpus(found: ForeignFile, its: str, asked: str, more: str) -> NoReturn:
    message = f"{found.path} is for other GPUs: its header says {its}, and {asked} is asked for"
    raise InvalidInputError(message, f"Adopt it for the GPUs that it was built for.{more}")


def _targets(header: PlanHeader) -> str:
    return " --target ".join(c.sm for c in header.reach.compute_capabilities) if header.reach is not None else ""


def _input_names(path: Path, staged: Path, resolved: Resolved) -> list[Fact]:
    """Look for the names of the model's inputs, which plans have in the clear.

    Source: 66 plans of TensorRT-RTX 1.4 to 1.7 and three of TensorRT 8.6.0, 2026.

    Raises:
        InvalidInputError: None of them is there: it is another model's plan.
    """
    names = [one.name for one in resolved.identity.inputs]
    with staged.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        there = [name for name in names if data.find(name.encode("utf-8", "surrogatepass")) >= 0]
    if names and not there:
        shown = ", ".join(names[:4])
        message = f"{path} is a plan of another model: it has none of the inputs of {resolved.source.name} ({shown})"
        raise InvalidInputError(message, "Name the model that it was built from.")
    return ["input_names"] if there == names and names else []
