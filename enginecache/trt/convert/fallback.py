"""A build of a converted graph, in which the nodes that TensorRT does not take in FP16 stay in FP32.

No table says which those are: TensorRT is asked, by parsing and building. A refusal that names a node is followed by
another conversion without that node. The same model, converter and TensorRT give the same graph.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from enginecache.errors import BuildError
from enginecache.trt.build.adapter import SerializedPlan
from enginecache.trt.build.explain import product
from enginecache.trt.build.logs import BuildLog
from enginecache.trt.build.request import BuildRequest
from enginecache.trt.convert.conversion import convert, nodes_in

MAX_ATTEMPTS = 12
"""Conversions of one build. A refused node stays in FP32; at the second one of an operator, all of that operator do."""

MAX_NAMED = 8


def build_converted(
    request: BuildRequest, log: BuildLog, build: Callable[[BuildRequest], SerializedPlan]
) -> SerializedPlan:
    """Convert the graph, where the request asks for it, and build; again with fewer nodes in FP16 where that fails.

    Args:
        request: With the pinned model as its source.
        log: Both write to it; what an attempt added to its errors and warnings is taken back before the next one.
        build: Builds a plan of a request.

    Raises:
        BuildError: The graph can be neither converted nor built; the message says which node stands in the way.
        EngineCacheError: As :func:`convert` and ``build``.
    """
    if request.conversion is None:
        return build(request)
    stays: dict[str, str] = {}
    for attempt in range(MAX_ATTEMPTS):
        errors, warnings = len(log.errors), len(log.warnings)
        converted = convert(request, log, frozenset(stays))
        try:
            plan = build(converted)
        except BuildError as error:
            if type(error) is not BuildError:  # a killed builder says nothing of the graph
                raise
            path = converted.source.path
            nodes, outer = nodes_in(path) if path is not None and request.conversion.precision == "fp16" else ({}, {})
            named = _named_nodes(nodes, log, errors)
            more = _next_to_stay(nodes, named, stays) or {n: op for n, op in outer.items() if n not in stays}
            if not more or attempt + 1 == MAX_ATTEMPTS or path is None:
                raise _refused(request, error, [name for name in named if name in stays]) from error
            log.write("I", f"another conversion: {_listed(more)} in FP32")
            stays.update(more)
            del log.errors[errors:], log.warnings[warnings:]
            shutil.rmtree(path.parent)
        else:
            return replace(plan, warnings=(*_explain(request, stays), *plan.warnings))
    raise AssertionError  # the last attempt returns or raises


def _named_nodes(nodes: Mapping[str, str], log: BuildLog, since: int) -> list[str]:
    """Return the nodes that TensorRT's errors name: those of the parser, else those in lines of the builder."""
    named = [name for name in log.refused_nodes if name in nodes]
    log.refused_nodes.clear()
    if not named:
        words = {word for line in log.errors[since:] for word in re.findall(r"[^\s'\"(),:\[\]]+", line)}
        named = [name for name in nodes if name in words]
    return named


def _next_to_stay(nodes: Mapping[str, str], named: Sequence[str], stays: Mapping[str, str]) -> dict[str, str]:
    """Return the nodes that are to stay in FP32 next, with their operators; none where that cannot help."""
    more = {name: nodes[name] for name in named if name not in stays}
    again = set(more.values()) & set(stays.values())
    return {**more, **{name: operator for name, operator in nodes.items() if operator in again and name not in stays}}


def _explain(request: BuildRequest, stays: Mapping[str, str]) -> tuple[str, ...]:
    if not stays:
        return ()
    return (f"{product(request)} does not take these nodes in FP16, and they stay in FP32: {_listed(stays)}",)


def _listed(nodes: Mapping[str, str]) -> str:
    shown = ", ".join(f"{name} ({operator})" for name, operator in list(nodes.items())[:MAX_NAMED])
    return shown if len(nodes) <= MAX_NAMED else f"{shown} and {len(nodes) - MAX_NAMED} more"


def _refused(request: BuildRequest, error: BuildError, in_fp32_too: Sequence[str]) -> BuildError:
    """Say in a refusal that the graph is a converted one: the one that the user has may build."""
    precision = request.conversion.precision if request.conversion is not None else ""
    what = f"{error.what} (the graph was converted to {precision} first"
    if in_fp32_too:
        return BuildError(f"{what}; {in_fp32_too[0]!r} was left in FP32, and refused in it too)", error.fix)
    return BuildError(f"{what})", f"{error.fix}\nIt may build without --{precision}: that was not tried.")
