"""Nested phases as one fraction."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginecache.trt.build.phases import PhaseReporter, PhaseTree


def test_steps_of_the_outermost_phase_make_the_fraction():
    tree = PhaseTree()
    tree.start("Building engine", None, 4)
    assert (tree.outermost, tree.fraction) == ("Building engine", 0.0)
    tree.complete_step("Building engine", 0)
    assert tree.fraction == 0.25
    tree.complete_step("Building engine", 2)
    assert tree.fraction == 0.75


def test_inner_phases_share_the_step_that_they_run_in():
    tree = PhaseTree()
    tree.start("outer", None, 2)
    tree.start("first", "outer", 2)
    tree.complete_step("first", 0)
    assert tree.fraction == pytest.approx(0.125)
    tree.finish("first")
    assert tree.fraction == pytest.approx(0.25)
    tree.start("second", "outer", 1)
    tree.start("deep", "second", 1)
    tree.complete_step("deep", 0)
    assert tree.fraction == pytest.approx(0.3125)
    tree.complete_step("outer", 0)
    assert tree.fraction == 0.5


def test_end_of_the_outermost_phase_is_not_the_end_of_the_build():
    tree = PhaseTree()
    tree.start("outer", None, 2)
    tree.finish("outer")
    assert tree.fraction == 0.0
    tree.complete()
    assert tree.fraction == 1.0


NAMES = st.sampled_from(["a", "b", "c", "d"])
EVENTS = st.one_of(
    st.tuples(st.just("start"), NAMES, st.none() | NAMES, st.integers(-1, 5)),
    st.tuples(st.just("complete_step"), NAMES, st.integers(-1, 9)),
    st.tuples(st.just("finish"), NAMES),
)


@given(st.lists(EVENTS, max_size=60))
def test_fraction_never_falls_and_never_passes_one_whatever_tensorrt_calls(events):
    tree, seen = PhaseTree(), [0.0]
    for name, *arguments in events:
        getattr(tree, name)(*arguments)
        seen.append(tree.fraction)
    assert seen == sorted(seen)
    assert seen[-1] <= 1.0


def test_reports_are_rare_but_the_last_is_never_lost():
    now, reports = [0.0], []
    reporter = PhaseReporter(lambda *report: reports.append(report), clock=lambda: now[0])
    reporter.start("outer", None, 100_000)
    for step in range(500):
        now[0] += 0.001
        reporter.complete_step("outer", step)
    assert 5 <= len(reports) <= 7
    for step in range(500, 50_000):  # a burst in no time
        reporter.complete_step("outer", step)
    assert len(reports) <= 60
    assert reports[-1][1] == pytest.approx(0.5, abs=0.011)
    reporter.complete()
    assert reports[-1] == ("outer", 1.0)
