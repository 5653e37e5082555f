"""Errors made of TensorRT's error lines: what happened, why, and what to do.

Lines as TensorRT-RTX 1.7.1 (which shares TensorRT 11's parser and builder) writes them, read off real builds in
2026-11. A line that is not known here is passed on as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from enginecache.errors import (
    BuilderKilledError,
    BuildError,
    EngineCacheError,
    NoDeviceError,
    ProfileError,
    UnsupportedOptionError,
)
from enginecache.files.os_errors import explain_threads
from enginecache.files.units import format_size
from enginecache.host.toolchain import PRODUCTS
from enginecache.key.advice import rename
from enginecache.key.profiles import describe_inputs
from enginecache.key.shape_syntax import quote_shape
from enginecache.trt.build.request import BuildRequest
from enginecache.trt.messages import NO_DRIVER, clean_lines

_UNSUPPORTED = re.compile(r"Plugin not found|No importer registered|UNSUPPORTED_NODE\b|is not supported")
_NO_PLUGIN = "Plugin not found"
_OPERATOR = re.compile(r'While parsing node number (?P<index>\d+) \[(?P<operator>\S+) -> "')


@dataclass(frozen=True)
class ParserProblem:
    """One error of the ONNX parser.

    Attributes:
        index: The node's place in the graph; negative where the parser does not say.
        node: The node's name; empty where the release does not say or the node has none.
        operator: Its operator; empty where the release does not say.
        text: The description.
    """

    index: int
    node: str
    operator: str
    text: str

    @property
    def place(self) -> str:
        """Return the node for a message: ``node 'conv1' (Conv)``."""
        if not self.node and self.index < 0:
            return f"operator {self.operator}" if self.operator else ""
        name = f"node {self.node!r}" if self.node else f"node number {self.index}"
        return f"{name} ({self.operator})" if self.operator else name


@dataclass(frozen=True)
class _Context:
    """The material of a reason: the request, the line that matched, and the match in it."""

    request: BuildRequest
    line: str
    match: re.Match[str]

    @property
    def refusal(self) -> str:
        return _refusal(self.request)


def product(request: BuildRequest) -> str:
    """Return the name of the TensorRT that builds, such as ``TensorRT-RTX 1.7.1.116``."""
    return f"{PRODUCTS[request.toolchain.flavour]} {request.toolchain.version}"


def explain_parsing(request: BuildRequest, problems: Sequence[ParserProblem], lines: Sequence[str]) -> EngineCacheError:
    """Return the error for a model that the parser did not take.

    Args:
        request: The build.
        problems: What the parser reported; may be empty after an internal assertion.
        lines: Error lines of the log.
    """
    cleaned = clean_lines([*(line for problem in problems for line in problem.text.splitlines()), *lines])
    known = _find_known(request, cleaned)
    if known is not None:
        return known
    if not problems:
        reason = cleaned[0] if cleaned else "it gave no reason"
        return BuildError(f"{_refusal(request)} while parsing it, without naming a node: {reason}", _SIMPLIFY)
    problem = _with_operator(problems[0], lines)
    others = f" (and {len(problems) - 1} more, in the log)" if len(problems) > 1 else ""
    if _UNSUPPORTED.search(problem.text):
        what = (
            f"{_refusal(request)}: it has no operator {problem.operator or 'of this kind'} as {problem.place} uses it"
        )
        unsupported = clean_lines([problem.text])[:1]
        fix = _name_plugin(request, problem) if _NO_PLUGIN in problem.text else _REPLACE
        return BuildError(f"{what}: {unsupported[0] if unsupported else problem.text}{others}", fix)
    reason_lines = clean_lines([problem.text])
    reason = "; ".join(reason_lines[:2]) or "no reason given"
    place = f" at {problem.place}" if problem.place else ""
    return BuildError(f"{_refusal(request)}{place}: {reason}{others}", _LOOK_AT_NODE)


def _name_plugin(request: BuildRequest, problem: ParserProblem) -> str:
    """Return advice for a node that is no operator: TensorRT then looks for a plugin of the same name."""
    plugin = f"the plugin {problem.operator}" if problem.operator else "the plugin"
    names = ", ".join(library.path.name for library in request.options.plugins)
    if names:
        first = f"None of {names} has {plugin}: compare its name, version and namespace with the node's attributes."
    else:
        first = f"If {plugin} is in a library of plugins, name that: --plugin FILE."
    return f"{first}\n{_REPLACE}"


def _with_operator(problem: ParserProblem, lines: Sequence[str]) -> ParserProblem:
    """Fill in the operator from the log: before 10.0 the parser's error does not have it. Source: API lists, 8.6.1."""
    for line in lines:
        match = _OPERATOR.search(line)
        if match and not problem.operator and int(match["index"]) == problem.index:
            return ParserProblem(problem.index, problem.node, match["operator"], problem.text)
    return problem


def explain_build(request: BuildRequest, lines: Sequence[str]) -> EngineCacheError:
    """Return the error for a model that was parsed and gave no plan.

    Args:
        request: The build.
        lines: Error lines of the log.
    """
    cleaned = clean_lines(lines)
    known = _find_known(request, cleaned)
    if known is not None:
        return known
    reason = cleaned[0] if cleaned else "it gave no reason"
    return BuildError(f"{_refusal(request)}: {reason}", _SIMPLIFY)


def _refusal(request: BuildRequest) -> str:
    return f"{product(request)} refused {request.source.name}"


def _find_known(request: BuildRequest, lines: Sequence[str]) -> EngineCacheError | None:
    for pattern, explain in _KNOWN:
        for line in lines:
            match = pattern.search(line)
            error = explain(_Context(request, line, match)) if match else None
            if error is not None:
                return error
    return None


def _out_of_memory(context: _Context) -> EngineCacheError:
    limit = context.request.options.workspace_bytes
    what = f"{product(context.request)} ran out of memory: {context.line}"
    asked = re.search(r"Requested size was (\d+) bytes", context.line)
    if limit is not None and asked is not None and int(asked[1]) > limit:
        what += f", and --workspace allows a layer {format_size(limit)}"
        return BuilderKilledError(what, "Raise --workspace, such as --workspace 1GiB, or leave it out.")
    fix = "Free memory on this host and its GPU, or lower --workspace, and try again."
    return BuilderKilledError(what, fix)


def _no_driver(context: _Context) -> EngineCacheError:
    fix = "Build on a host with an NVIDIA GPU and driver, or for a named --target with --backend tensorrt-rtx."
    return NoDeviceError(f"{product(context.request)} found no usable GPU: {context.line}", fix)


def _no_profile(context: _Context) -> EngineCacheError:
    what = f"{context.refusal}: it has dynamic inputs or shape tensors, and no shapes were given"
    return ProfileError(what, describe_inputs(context.request.identity.inputs))


def _shared_dimension_name(context: _Context) -> EngineCacheError:
    name = context.match["name"]
    inputs = [str(entry) for entry in context.request.identity.inputs if name in entry.dims]
    where = f" in {', '.join(inputs)}" if inputs else ""
    what = (
        f"{context.refusal}: several dimensions have the one name {name!r}{where}, and the profile gives them "
        "different sizes"
    )
    return ProfileError(what, rename(name))


def _bad_corner(context: _Context) -> EngineCacheError:
    index, corner = int(context.match["index"]), context.match["corner"]
    names = {
        "kMIN": ("minimum", "--min-shapes"),
        "kOPT": ("optimum", "--opt-shapes"),
        "kMAX": ("maximum", "--max-shapes"),
    }
    word, flag = names[corner]
    what = f"{context.refusal}: the {word} shapes of profile {index} do not fit the graph: {context.match['reason']}"
    shapes = _corner(context.request, index, corner)
    fix = f"Change {flag} (or --dim) so that the node above can work; profile {index} had {flag} {shapes}."
    return BuildError(what, fix)


def _corner(request: BuildRequest, index: int, corner: str) -> str:
    if index >= len(request.profiles):
        return "none"
    field = {"kMIN": "minimum", "kOPT": "optimum", "kMAX": "maximum"}[corner]
    return ",".join(quote_shape(name, getattr(shapes, field)) for name, shapes in request.profiles[index].ranges)


def _too_small(context: _Context) -> EngineCacheError:
    fix = "Give larger --min-shapes and --opt-shapes (or --dim), or export the model with a larger input."
    return BuildError(f"{context.refusal}: the input is too small for a layer: {context.line}", fix)


def _no_tactic(context: _Context) -> EngineCacheError:
    limit = context.request.options.workspace_bytes
    fix = (
        "Raise --workspace, such as --workspace 1GiB, or leave it out."
        if limit is not None
        else "Try another --opt-level or TensorRT release; the log names the layer."
    )
    return BuildError(f"{context.refusal}: {context.line}", fix)


def _no_fp32(context: _Context) -> EngineCacheError:
    """Return the error for Turing, which computes matrices in FP16 alone.

    Source: TensorRT-RTX 1.7.1, built for sm_75 both ways, 2026-11.
    """
    what = f"{context.refusal}: {context.line}"
    if context.request.conversion is None:
        return BuildError(f"{what}, and FP16 is: see --fp16", "Build it in FP16: add --fp16.")
    precision = context.request.conversion.precision
    fix = (
        f"This node stayed in FP32 (the log names those that do) and cannot be computed on that GPU: give a model that "
        f"is {precision} throughout, or name a later --target."
    )
    return BuildError(what, fix)


def _no_lean_runtime(context: _Context) -> EngineCacheError:
    what = f"{product(context.request)} puts its lean runtime into a version compatible plan, and cannot load it"
    fix = (
        "Install the lean runtime of this TensorRT (packages tensorrt-lean, libnvinfer-lean), add --builder-flag "
        "EXCLUDE_LEAN_RUNTIME, or leave --version-compatible out."
    )
    return UnsupportedOptionError(f"{what}: {context.line}", fix)


def _no_refitting(context: _Context) -> EngineCacheError | None:
    """Return the error for a plan for refitting: it is compiled with CUDA's own calls, and needs a GPU."""
    options = context.request.options
    asked = ["--strip-plan"] if options.strip_plan else []
    asked += [f"--builder-flag {flag}" for flag in options.builder_flags if re.fullmatch(r"REFIT(?:_\w+)?", flag)]
    if not asked:
        return None
    names = " and ".join(asked)
    what = f"{product(context.request)} calls CUDA while it builds a plan with {names}, and that failed"
    fix = f"Build on a host with a GPU and its driver (`enginecache doctor` shows both), or leave {names} out."
    return UnsupportedOptionError(f"{what}: {context.line}", fix)


def _assertion(context: _Context) -> EngineCacheError:
    what = f"{context.refusal}: an internal check of TensorRT failed; the model may not be the cause"
    return BuildError(f"{what}: {context.line}", _SIMPLIFY)


def _out_of_threads(context: _Context) -> EngineCacheError:
    why, fix = explain_threads()
    return BuilderKilledError(f"{product(context.request)} could not start a thread: {why}", fix)


_REPLACE = (
    "Replace the operator in the graph, or fold it where its inputs are constant: "
    "`polygraphy surgeon sanitize MODEL --fold-constants -o OUT`."
)
_LOOK_AT_NODE = "Look at this node: its attributes, and the shapes that reach it (`enginecache explain MODEL`)."
_SIMPLIFY = (
    "Check the file with `onnx.checker`, fold its constants (`polygraphy surgeon sanitize MODEL --fold-constants -o "
    "OUT`), or try another TensorRT release."
)

_KNOWN: tuple[tuple[re.Pattern[str], Callable[[_Context], EngineCacheError | None]], ...] = (
    (
        re.compile(r"out of memory|OutOfMemory|bad_alloc|cudaError 2:|cudaErrorMemoryAllocation", re.IGNORECASE),
        _out_of_memory,
    ),
    (re.compile(r"Resource temporarily unavailable|pthread_create"), _out_of_threads),
    (re.compile(r"^(?P<name>.*): Input dimensions with this name have different"), _shared_dimension_name),
    (re.compile(r"Dimensions with name (?P<name>.*) must be equal"), _shared_dimension_name),
    (
        re.compile(
            r"(?P<corner>kMIN|kOPT|kMAX) values for profile (?P<index>\d+) violate shape constraints:? ?(?P<reason>.*)"
        ),
        _bad_corner,
    ),
    (re.compile(r"no optimization profile has been defined"), _no_profile),
    (re.compile(r"Unable to load library: libnvinfer_lean"), _no_lean_runtime),
    (re.compile(r"CHECK\(status == CUDA_SUCCESS\) failed"), _no_refitting),
    (re.compile(r"image size is smaller than filter size|is smaller than the (?:kernel|window)"), _too_small),
    (re.compile(r"Cannot compile operation .* FP32 \S+ is not supported"), _no_fp32),
    (re.compile(r"no tactics to implement|Could not find any implementation for node"), _no_tactic),
    (re.compile(r"Assertion .* failed|Internal Error:? .*assert", re.IGNORECASE), _assertion),
    (NO_DRIVER, _no_driver),
)
"""In order: the first pattern that any line has wins, so a cause stands before its consequences. None passes it on."""
