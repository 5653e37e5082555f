"""Nested phases as the innermost that counts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from enginecache.trt.build.phases import PhaseReporter


def reporter_of(reports, clock=lambda: 0.0):
    return PhaseReporter(lambda *report: reports.append(report), clock)


def test_innermost_phase_that_counts_is_reported_with_the_step_that_runs():
    reports = []
    reporter = reporter_of(reports)
    reporter.start("Building engine", 4)
    reporter.start("Optimizing", 2)
    reporter.complete_step("Optimizing", 0)
    reporter.start("One step alone", 1)
    reporter.finish("One step alone")
    reporter.complete_step("Optimizing", 1)
    reporter.finish("Optimizing")
    reporter.complete_step("Building engine", 0)
    assert reports == [
        ("Building engine", 1, 4),
        ("Optimizing", 1, 2),
        ("Optimizing", 2, 2),
        ("Optimizing", 2, 2),
        ("Building engine", 1, 4),
        ("Building engine", 2, 4),
    ]


def test_phase_that_does_not_count_has_a_name_alone():
    reports = []
    reporter_of(reports).start("Loading", 1)
    assert reports == [("Loading", None, None)]


NAMES = st.sampled_from(["a", "b", "c", "d"])
EVENTS = st.one_of(
    st.tuples(st.just("start"), NAMES, st.integers(-1, 5)),
    st.tuples(st.just("complete_step"), NAMES, st.integers(-1, 9)),
    st.tuples(st.just("finish"), NAMES),
)


@given(st.lists(EVENTS, max_size=60))
def test_step_is_one_of_those_that_the_phase_has_whatever_tensorrt_calls(events):
    reports = []
    reporter = reporter_of(reports)
    for name, *arguments in events:
        getattr(reporter, name)(*arguments)
    for _, step, count in reports:
        assert step is count is None or 1 <= step <= count


def test_reports_are_rare_but_none_is_old():
    now, reports = [0.0], []
    reporter = reporter_of(reports, clock=lambda: now[0])
    reporter.start("outer", 100_000)
    for step in range(500):
        now[0] += 0.001
        reporter.complete_step("outer", step)
    assert 5 <= len(reports) <= 7
    for step in range(500, 50_000):  # a burst in no time
        reporter.complete_step("outer", step)
    assert len(reports) <= 60
    assert 49_000 <= reports[-1][1] <= 50_001
