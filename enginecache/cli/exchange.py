"""``inspect``, ``adopt``, ``export`` and ``import``: files from elsewhere, and for elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enginecache.cli.inspect import engine_json, stored_facts
from enginecache.cli.output import Column, count, print_facts, print_json, print_line, print_path, print_rows, say, warn
from enginecache.cli.parameters import (
    Asked,
    Dir,
    Json,
    asking_about_a_file,
    complete_key,
    existing_config,
    open_cache,
    open_portable,
    path_value,
)
from enginecache.config import Config
from enginecache.errors import OptionError, RegistryError, StoreError
from enginecache.files.os_errors import shell_path
from enginecache.files.units import format_size
from enginecache.pipeline.results import SCHEMA

if TYPE_CHECKING:
    from enginecache.exchange.engines import PortableEngines
    from enginecache.exchange.inspection import Inspection
    from enginecache.storage.registry.rows import EntryRecord

_UNREADABLE, _DAMAGED, _DOES_NOT_LOAD = 2, 4, 3
_COLUMNS = (Column("key", "key"), Column("model"), Column("size", "size"), Column("status", "word"))


def inspect(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Engine files.", show_default=False)],
    loads_here: Annotated[
        bool, typer.Option("--loads-here", help="Exit 3 if one would not load here, as far as its header shows.")
    ] = False,
    no_digest: Annotated[
        bool, typer.Option("--no-digest", help="Read only a few pages of each file; no entry of the cache is found.")
    ] = False,
    json: Json = False,
    dir: Dir = None,
) -> None:
    """Say what engine files are, of any program.

    By their bytes, without TensorRT or a GPU: TensorRT version and GPUs as the header has them, damage that shows
    in the size, what another program wrapped around the plan, and the entry of the cache with the same bytes. A
    header can rule a load out, and never promises one. Nothing is unpickled. The digest takes reading the whole
    file, the rest a few pages.

    Exit code: 2 if a file cannot be read, else 4 if one is damaged, else 3 with --loads-here if one would not load.

    On a pipe a line for each, of tab-separated values: path, kind, backend, version, compute capabilities, bytes,
    bytes that the header declares, complete, wrapper, digest, key of the entry, whether it loads here, why.

    \b
    Examples:
      enginecache inspect model.engine
      enginecache inspect *.engine --loads-here --json
    """
    from enginecache.exchange.inspection import inspect_file
    from enginecache.exchange.loads_here import Host

    paths = [path_value("FILE", name) for name in files]
    cache = _cache_to_look_in(dir)
    host = Host.here(Config.load(dir=dir).cuda_major)
    found = [
        inspect_file(path, host, None, with_digest=not no_digest)
        if cache is None
        else cache.inspect(path, with_digest=not no_digest, host=host)
        for path in paths
    ]
    if json:
        print_json([item.to_json(_entry_json(cache, item.record)) for item in found])
    elif sys.stdout.isatty():
        for index, item in enumerate(found):
            print_line("") if index else None
            print_facts(_facts(cache, item))
    else:
        print_rows((), [_row(item) for item in found])
    for item in found:
        if item.error is not None:
            say(*f"error: {item.error}".splitlines())
    code = _exit_code(found, loads_here=loads_here)
    if code:
        raise typer.Exit(code)


def _cache_to_look_in(folder: str | None) -> PortableEngines | None:
    """Open the cache, where it can be: what a file is does not depend on it."""
    from enginecache.exchange.engines import PortableEngines

    try:
        cache = PortableEngines(existing_config(folder))
    except (RegistryError, StoreError) as error:
        warn(f"the cache was not looked in: {error.what}")
        return None
    return cache if cache.root.is_made else None


def _exit_code(found: list[Inspection], *, loads_here: bool) -> int:
    if any(item.error is not None for item in found):
        return _UNREADABLE
    if any(item.is_damaged for item in found):
        return _DAMAGED
    return _DOES_NOT_LOAD if loads_here and any(item.loads_here.verdict == "no" for item in found) else 0


def _entry_json(cache: PortableEngines | None, record: EntryRecord | None) -> dict[str, Any] | None:
    return None if cache is None or record is None else engine_json(cache, cache.with_last_use(record))


def _row(item: Inspection) -> list[Any]:
    shown = item.to_json(None)
    reasons = "; ".join(reason.text for reason in item.loads_here.reasons)
    names = ("path", "kind", "backend", "tensorrt_version", "compute_capabilities", "size_bytes", "declared_size_bytes")
    more = [shown[name] for name in ("is_complete", "wrapper", "digest")]
    key = None if item.record is None else item.record.key
    return [*(shown[name] for name in names), *more, key, item.loads_here.verdict, reasons]


def _facts(cache: PortableEngines | None, item: Inspection) -> list[tuple[str, Any]]:
    """Return what a terminal shows of a file: what is empty, and what the size says twice, is left out."""
    shown = item.to_json(None)
    names = ("path", "kind", "backend", "tensorrt_version", "compute_capabilities", "cuda_version", "size_bytes")
    facts: list[tuple[str, Any]] = [(name, shown[name]) for name in names]
    if shown["declared_size_bytes"] not in {None, shown["plan_size_bytes"]}:
        facts.append(("declared_size_bytes", shown["declared_size_bytes"]))
    header = None if item.file is None else item.file.header
    facts += [] if header is None or header.built_on is None else [("built_on", str(header.built_on))]
    facts += [("wrapper", shown["wrapper"]), *((f"wrapper.{name}", at) for name, at in shown["wrapper_facts"].items())]
    for index, context in enumerate(shown["ep_context"]):
        facts += [(f"ep_context[{index}].{name}", value) for name, value in context.items()]
    why = [reason["text"] for reason in shown["loads_here"]["reasons"]]
    facts += [("note", note["text"]) for note in shown["notes"] if note["text"] not in why]
    facts += [("digest", shown["digest"]), ("loads_here", shown["loads_here"]["verdict"])]
    facts += [("why", text) for text in why]
    if cache is not None and item.record is not None:
        facts += [(f"entry.{name}", value) for name, value in stored_facts(cache, item.record)]
    return [fact for fact in facts if fact[1] is not None and fact[1] not in ("", [])]


@asking_about_a_file
def adopt(
    asked: Asked,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The plan.", show_default=False)],
    json: Json = False,
) -> None:
    """Take another program's plan into the cache.

    For a model and its options. What its header shows is compared with the request: size, TensorRT version, GPUs;
    and the names of the model's inputs must be in it. That it has this model's weights, shapes and options is your
    word. So it is marked as adopted, and never a hit: `get --accept compatible` takes it until a check on a GPU has
    passed. The file is left alone.

    \b
    Examples:
      enginecache adopt old.engine --model model.onnx --dim batch=1:32:64
      enginecache adopt old.engine --model model.onnx --target sm_89 --json
    """
    cache = open_cache(asked.dir)
    adopted = cache.adopt(path_value("FILE", file), asked.path, **asked.ask())
    record = adopted.record
    what = "adopted" if adopted.is_new else "was adopted before"
    say(f"{what}: {record.key[:12]}; verified: {', '.join(adopted.verified)}; not: {', '.join(adopted.unverified)}")
    if record.is_adopted and not record.is_confirmed:
        how = f"enginecache check {record.key[:12]} --model {shell_path(asked.path)}"
        say(f"until a check on a GPU has passed (`{how}`), only --accept compatible takes it")
    if json:
        shown = engine_json(cache, cache.with_last_use(record))
        known = {"verified": list(adopted.verified), "unverified": list(adopted.unverified)}
        print_json({"schema": SCHEMA, **shown, "is_new": adopted.is_new, **known})
    else:
        print_path(cache.path(record))


def export(
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY...", help="Keys, or their first characters.", autocompletion=complete_key),
    ] = None,
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE", help="The bundle to write.", show_default=False)
    ] = "",
    every: Annotated[bool, typer.Option("--all", help="Export every engine of the cache.")] = False,
    json: Json = False,
    dir: Dir = None,
) -> None:
    """Write stored engines to one file, for `import`.

    A bundle is a tar file with the engines and their records, for another host or an image. The same engines give
    the same bytes. Each plan is compared with its digest on the way. A file that is there is replaced only if it is
    a bundle. The path is printed.

    \b
    Examples:
      enginecache export 3f9a 77c0 -o engines.tar
      enginecache export --all -o engines.tar
    """
    if bool(keys) == every:
        raise OptionError(
            "export takes keys, or --all", "Name engines by their keys, from `enginecache ls`, or give --all."
        )
    cache = open_portable(dir)
    target = path_value("-o", output)
    engines = [used.record for used in cache.entries()] if every else [cache.find(key) for key in keys or ()]
    done = cache.export(engines, target)
    say(f"exported {count(len(done.records), 'engine')} ({format_size(done.size_bytes)})")
    if json:
        entries = [engine_json(cache, cache.with_last_use(record)) for record in done.records]
        print_json({"schema": SCHEMA, "path": str(done.path), "size_bytes": done.size_bytes, "entries": entries})
    else:
        print_path(done.path)


def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The bundle.", show_default=False)],
    json: Json = False,
    dir: Dir = None,
) -> None:
    """Take the engines of a bundle into the cache.

    The cache is made if there is none. All of the bundle is verified before anything is stored: what is wrong
    anywhere in it refuses the whole. It is taken whole or not at all, also if the power fails, and replaces no
    engine that is stored. Import only what you trust: to load an engine is to run code, and a bundle is not signed.

    A line for each engine: key, model, bytes, and imported; there (the same was stored before); or kept (another
    engine was stored under the key, and stays).

    \b
    Examples:
      enginecache import engines.tar
      enginecache import engines.tar --dir /opt/engines
    """
    from enginecache.exchange.engines import PortableEngines

    cache = PortableEngines(Config.load(dir=dir))
    path = path_value("FILE", file)
    is_new = not cache.root.is_made
    result = cache.import_bundle(path)
    if is_new:
        say(f"made a new cache in {cache.root.path}")
    groups = (("imported", result.taken), ("there", result.present), ("kept", result.kept))
    say(", ".join(f"{len(records)} {status}" for status, records in groups))
    for text in result.warnings:
        warn(text)
    if json:
        print_json(
            {
                "schema": SCHEMA,
                "dir": str(cache.root.path),
                **{status: [record.key for record in records] for status, records in groups},
            }
        )
        return
    rows = [[one.key, one.model_name, one.size_bytes, status] for status, records in groups for one in records]
    print_rows(_COLUMNS, sorted(rows))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(inspect)
    app.command()(adopt)
    app.command()(export)
    app.command("import")(import_)
