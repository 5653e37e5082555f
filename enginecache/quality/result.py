"""The result of a check: a verdict, how far the check went, and the numbers. Plain JSON values, kept with the entry."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from enginecache.files.canonical import canonical_json

Scope = Literal["engine", "graph"]
"""``engine``: the engine ran on a GPU. ``graph``: the converted graph was computed on the CPU, and no engine ran."""

CheckVerdict = Literal["passed", "failed", "uninformative"]
"""``uninformative``: nothing was shown, neither that the numbers are right nor that they are wrong."""


@dataclass(frozen=True)
class OutputNumbers:
    """One output at one point, against the reference. Errors are of the elements that are finite in both.

    Attributes:
        name: Name in the model.
        error: The number that decides: the largest absolute error, divided by the largest absolute value of the
            reference, or by 1 where that is larger and the output is of probabilities; undivided where it is 0. For
            integers and booleans the share of elements that differ.
        max_abs_error: The largest absolute error.
        max_rel_error: The largest error of an element, divided by that element of the reference; None where all are 0.
        cosine: Cosine of the angle between the two as vectors; None where one of them is 0.
        nan: NaNs that the reference does not have in their place.
        inf: Infinities that the reference does not have in their place.
        unlike: Elements that are finite in one of the two alone, or not finite in another way.
        problem: Why there are no numbers, such as another shape; empty where there are.
    """

    name: str
    error: float = 0.0
    max_abs_error: float = 0.0
    max_rel_error: float | None = None
    cosine: float | None = None
    nan: int = 0
    inf: int = 0
    unlike: int = 0
    problem: str = ""

    def is_within(self, tolerance: float) -> bool:
        """Return whether it is as near to the reference as it must be."""
        return not self.problem and not self.unlike and self.error <= tolerance

    def __str__(self) -> str:
        if self.problem:
            return f"output {self.name}: {self.problem}"
        if self.unlike:
            kinds = [f"{count} {word}" for count, word in ((self.nan, "NaN"), (self.inf, "infinite")) if count]
            return f"output {self.name}: {' and '.join(kinds) or f'{self.unlike} finite'} where the reference is not"
        return f"output {self.name}: error {self.error:.2g} of the largest value (absolute {self.max_abs_error:.2g})"


@dataclass(frozen=True)
class PointNumbers:
    """All outputs for one set of inputs.

    Attributes:
        profile: Index of the profile.
        at: ``min``, ``opt`` or ``max`` of the profile; ``static``; or ``given`` for inputs from a file.
        shapes: Shape of each input.
        outputs: In the model's order.
    """

    profile: int
    at: str
    shapes: Mapping[str, Sequence[int]]
    outputs: tuple[OutputNumbers, ...]


@dataclass(frozen=True)
class Check:
    """The findings of one check.

    Attributes:
        verdict: See :data:`CheckVerdict`.
        scope: How far it went, see :data:`Scope`.
        digest: Digest of the plan that the verdict is of.
        reference: What computed the reference, with its version.
        seed: What the inputs were made from.
        tolerance: The largest ``error`` that passes.
        reason: One sentence: why it failed or says nothing; empty where it passed.
        inputs: For each input its name and where its values come from.
        points: The numbers.
        checked_at: RFC 3339, UTC.
        device: Name of the GPU that the engine ran on, or None.
        driver: Version of its driver, or None.
    """

    verdict: CheckVerdict
    scope: Scope
    digest: str
    reference: str
    seed: int
    tolerance: float
    reason: str
    inputs: tuple[tuple[str, str], ...]
    points: tuple[PointNumbers, ...]
    checked_at: str
    device: str | None = None
    driver: str | None = None

    @property
    def worst(self) -> tuple[OutputNumbers, ...]:
        """Return, for each output, the point where it is furthest from the reference."""
        worst: dict[str, OutputNumbers] = {}
        for output in (output for point in self.points for output in point.outputs):
            known = worst.get(output.name)
            if known is None or _badness(output) > _badness(known):
                worst[output.name] = output
        return tuple(worst.values())

    @property
    def weight(self) -> int:
        """Return how much it shows: 0 for nothing, 1 of the graph, 2 of the engine."""
        return 0 if self.verdict == "uninformative" else 1 if self.scope == "graph" else 2

    @property
    def largest_error(self) -> float:
        """Return the largest of the errors that decide; 0 without numbers."""
        return max((output.error for output in self.worst), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Return the record of ``check --json``, as plain JSON values."""
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples become lists
        return {
            **fields,
            "inputs": [{"name": name, "from": source} for name, source in self.inputs],
            "outputs": [asdict(output) for output in self.worst],
        }

    def to_text(self) -> str:
        """Return one line of canonical JSON, for the entry's record."""
        return canonical_json(self.to_json())

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Check:
        """Read the result of :meth:`to_json`.

        Raises:
            ValueError: It is no such record.
        """
        try:
            points = tuple(
                PointNumbers(
                    point["profile"],
                    point["at"],
                    {name: tuple(shape) for name, shape in point["shapes"].items()},
                    tuple(OutputNumbers(**output) for output in point["outputs"]),
                )
                for point in fields["points"]
            )
            inputs = tuple((entry["name"], entry["from"]) for entry in fields["inputs"])
            rest = {name: fields[name] for name in cls.__dataclass_fields__ if name not in {"inputs", "points"}}
            check = cls(**rest, inputs=inputs, points=points)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if check.verdict not in get_args(CheckVerdict) or check.scope not in get_args(Scope):
            raise ValueError(f"verdict {check.verdict!r}, scope {check.scope!r}")
        return check

    @classmethod
    def from_text(cls, text: str | None, digest: str) -> Check | None:
        """Return the check in an entry's record; None if there is none, or it is of another plan.

        Args:
            text: As :meth:`to_text` made it.
            digest: Digest of the entry's plan.
        """
        try:
            check = None if text is None else cls.from_json(json.loads(text))
        except ValueError:
            return None
        return check if check is not None and check.digest == digest else None

    def __str__(self) -> str:
        if self.verdict == "uninformative":
            return f"could not be judged: {self.reason}"
        where = f"on {self.device}" if self.scope == "engine" else "of its graph alone, on a CPU"
        if self.verdict == "failed":
            return f"failed a check {where}: {self.reason}"
        return f"passed a check {where}: largest error {self.largest_error:.2g}, tolerance {self.tolerance:g}"


def _badness(output: OutputNumbers) -> tuple[bool, int, float]:
    return bool(output.problem), output.unlike, output.error
