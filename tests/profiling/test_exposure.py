"""Exposed, late and hidden communication, moment by moment."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepfuse.profiling.collectives import Collective
from deepfuse.profiling.exposure import compute_of, exposed_ns, exposed_share, exposure
from hand_made_ranks import GRAPH, made_run

MOMENTS = st.integers(0, 30)


@st.composite
def calls(draw):
    """A start and up to two waits, one after the other."""
    times = sorted(draw(st.lists(MOMENTS, min_size=6, max_size=6)))
    waits = tuple((times[i], times[i + 1]) for i in (2, 4))[: draw(st.integers(0, 2))]
    return Collective("all_reduce", "all_reduce", ("0", (0, 1)), GRAPH, 0, 8, (times[0], times[1]), waits)


@given(calls(), st.lists(st.tuples(MOMENTS, MOMENTS), max_size=5), MOMENTS)
def test_moment_by_moment(call, compute, last_arrival):
    found = exposure(call, compute, last_arrival)

    def inside(t, intervals):
        return any(began <= t < ended for began, ended in intervals)

    waiting = {t for t in range(31) if inside(t, [call.start, *call.waits]) and not inside(t, compute)}
    assert found.exposed_ns == len(waiting)
    assert found.late_ns == len({t for t in waiting if t < last_arrival})
    in_flight = range(call.start[1], call.ended)
    assert found.hidden_ns == len([t for t in in_flight if inside(t, compute)])


def test_of_a_step():
    # 2 of starting, 5 of waiting; the copy for the collective is a kernel like others
    run = made_run([("copy", 0, 4), ("start", 4, 6), ("shared", 6, 10), ("wait", 11, 16), ("matmul", 16, 20)])
    assert compute_of(run, run.steps) == [(0, 4), (6, 10), (16, 20)]
    assert exposed_ns(run, run.steps[0]) == 7
    assert exposed_share(run, GRAPH) == pytest.approx(7 / 20)


def test_compute_on_the_way_hides_a_wait():
    # as on a device whose streams run beside each other
    run = made_run([("start", 0, 1), ("shared", 1, 9), ("wait", 5, 12)])
    assert exposed_ns(run, run.steps[0]) == 1 + 3


def test_the_median_of_the_steps():
    waits = (3, 4, 90)
    steps = [[("start", 100 * i, 100 * i), ("wait", 100 * i + 1, 100 * i + 1 + w)] for i, w in enumerate(waits)]
    assert exposed_share(made_run(*steps), GRAPH) == pytest.approx(4 / 5)
