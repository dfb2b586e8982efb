"""Intervals against the sets of moments they stand for."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from deepfuse.profiling.intervals import difference, intersection, length, union

MOMENTS = st.integers(0, 24)
INTERVALS = st.lists(st.tuples(MOMENTS, MOMENTS), max_size=8)


def moments(intervals):
    return {moment for began, ended in intervals for moment in range(began, ended)}


@given(INTERVALS, INTERVALS)
def test_the_same_moments(a, b):
    for found, expected in (
        (union(a), moments(a)),
        (difference(a, b), moments(a) - moments(b)),
        (intersection(a, b), moments(a) & moments(b)),
    ):
        assert moments(found) == expected
        assert length(found) == len(expected)


@given(INTERVALS)
def test_in_order_and_as_few_as_there_can_be(a):
    found = union(a)
    assert all(began < ended for began, ended in found)
    assert all(before[1] < after[0] for before, after in pairwise(found))
