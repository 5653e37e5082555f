"""Write ``docs/python.md`` from the docstrings of the public names: ``python docs/make_python_reference.py``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import enginecache
from enginecache.errors import EngineCacheError

PATH = Path(__file__).with_name("python.md")

HEAD = """\
# Python reference

Written by `docs/make_python_reference.py` from the docstrings of the names that `import enginecache` exports.
How to use them in a server: [servers](servers.md). The errors, with their codes:
[troubleshooting](troubleshooting.md#error-codes).

"""

SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields", "Example", "Note")
_ITEM = re.compile(r"(?P<name>\*{0,2}\w+)(?: \([^)]*\))?: (?P<text>.*)", re.DOTALL)


def reference() -> str:
    """Return the whole page."""
    names = [name for name in sorted(enginecache.__all__) if not name.startswith("__")]
    things = [(name, getattr(enginecache, name)) for name in names]
    shown = [(name, thing) for name, thing in things if inspect.isclass(thing) and not _is_a_kind_of_error(thing)]
    return HEAD + "\n".join("\n".join(_class(name, thing)) for name, thing in shown)


def _is_a_kind_of_error(thing: type) -> bool:
    return issubclass(thing, EngineCacheError) and thing is not EngineCacheError


def _class(name: str, kind: type) -> Iterator[str]:
    yield f"## {name}\n"
    yield from _signature(name, kind)
    yield from _document(kind.__doc__)
    for member, value in _members(kind):
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        yield f"### {name}.{member}\n"
        if isinstance(value, property):
            yield "A property.\n"
        else:
            yield from _signature(f"{name}.{member}", function)
        yield from _document(inspect.getdoc(function))


def _members(kind: type) -> list[tuple[str, Any]]:
    """Return the public methods and properties, with those of bases in this package, in the order of their names."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] == "enginecache":
            found |= {
                name: value
                for name, value in vars(base).items()
                if not name.startswith("_")
                and (isinstance(value, property | classmethod | staticmethod) or inspect.isfunction(value))
            }
    return sorted(found.items())


def _signature(name: str, thing: Any) -> Iterator[str]:
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return
    # Annotations are kept as they are written, without their quotes, and defaults that are objects by their name.
    parameters = [_parameter(parameter) for parameter in _parameters(signature) if parameter != "self"]
    returned = _annotation(signature.return_annotation)
    arrow = f" -> {returned}" if returned and not inspect.isclass(thing) else ""
    one_line = f"{name}({', '.join(parameters)}){arrow}"
    yield "```text"
    yield one_line if len(one_line) <= 110 else f"{name}(\n    " + ",\n    ".join(parameters) + f",\n){arrow}"
    yield "```\n"


def _parameters(signature: inspect.Signature) -> list[Any]:
    parameters: list[Any] = []
    has_star = False
    for parameter in signature.parameters.values():
        if parameter.name in {"self", "cls"}:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            has_star = True
        if parameter.kind is parameter.KEYWORD_ONLY and not has_star:
            parameters.append("*")
            has_star = True
        parameters.append(parameter)
    return parameters


def _parameter(parameter: Any) -> str:
    if isinstance(parameter, str):
        return parameter
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    annotation = _annotation(parameter.annotation)
    text = f"{stars}{parameter.name}" + (f": {annotation}" if annotation else "")
    if parameter.default is inspect.Parameter.empty:
        return text
    default = parameter.default
    shown = default.__name__ if inspect.isfunction(default) or inspect.isclass(default) else repr(default)
    return f"{text} = {'...' if shown.startswith('<') else shown}"


def _annotation(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return text.strip("'\"")


def _document(text: str | None) -> Iterator[str]:
    """Turn a docstring in Google style into Markdown."""
    section, body = "", list[str]()
    for line in [*inspect.cleandoc(text or "").splitlines(), "End:"]:
        if line.rstrip(":") in {*SECTIONS, "End"} and line.endswith(":"):
            yield from _section(section, body)
            section, body = line.rstrip(":"), []
        else:
            body.append(line)


def _section(name: str, body: list[str]) -> Iterator[str]:
    text = inspect.cleandoc("\n".join(["", *body])).strip()
    if not text:
        return
    if name == "Example":
        yield f"Example:\n\n```text\n{re.sub(r' *# doctest: .*', '', text)}\n```\n"
        return
    if name:
        yield f"{name}:\n"
    if name in {"Args", "Attributes", "Raises"}:
        items = re.split(r"\n(?=\S)", text)
        yield "\n".join(f"- {_item(item)}" for item in items) + "\n"
    else:
        yield _plain(text) + "\n"


def _item(text: str) -> str:
    joined = " ".join(line.strip() for line in text.splitlines())
    match = _ITEM.fullmatch(joined)
    return _plain(joined) if match is None else f"`{match['name']}`: {_plain(match['text'])}"


def _plain(text: str) -> str:
    """Replace what reStructuredText has and Markdown has not: roles and doubled backticks."""
    return re.sub(r"``([^`]+)``", r"`\1`", re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text))


if __name__ == "__main__":
    PATH.write_text(reference(), encoding="utf-8")
