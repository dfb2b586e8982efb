"""Collectives of handmade runs, and their matching against trying everything."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepfuse.profiling.collectives import Collective, collectives_of, common_order, matched
from hand_made_ranks import ALL_TO_ALL, COMBINE, GROUP, REDUCE, made_run

WORLD = ("0", (0, 1, 2))


def call(op, size, *, step=0, group=WORLD, at=0):
    return Collective(op, op, group, "decode_1", step, size, (at, at + 1))


def test_starts_and_waits_of_a_run():
    run = made_run([("start", 0, 3), ("matmul", 3, 10), ("wait", 10, 12), ("again", 12, 14), ("wait again", 15, 19)])
    first, second = collectives_of(run, {GROUP: (0, 1)})
    assert (first.op, first.name, first.group, first.bytes) == ("all_to_all_single", ALL_TO_ALL, ("0", (0, 1)), 512)
    assert (first.start, first.waits, first.arrived, first.ended) == ((0, 3), ((10, 12),), 0, 12)
    # the module calls the op again
    assert (second.name, second.start, second.waits) == (COMBINE, (12, 14), ((15, 19),))
    assert "of 512 bytes in step 0 (decode_1)" in str(first)


def test_in_flight_at_once():
    run = made_run([("start", 0, 1), ("reduce", 1, 2), ("wait", 3, 4), ("wait reduce", 5, 9)])
    assert [(c.name, c.waits) for c in collectives_of(run, {GROUP: (0, 1)})] == [
        (ALL_TO_ALL, ((3, 4),)),
        (REDUCE, ((5, 9),)),
    ]


def test_never_waited_for():
    (only,) = collectives_of(made_run([("start", 0, 3), ("matmul", 3, 10)]), {GROUP: (0, 1)})
    assert only.waits == () and only.ended == 3


def test_waits_whose_start_was_not_seen_and_loops_that_copy():
    # a wait for what an earlier graph started, and a loop that copies into the buffer to send
    run = made_run([("wait", 0, 4), ("copy", 4, 5)])
    assert collectives_of(run, {GROUP: (0, 1)}) == []


def test_a_group_that_nobody_knows():
    with pytest.raises(ValueError, match=r"collectives: want a group out of \['1'\], got '0' of layers.0.mlp"):
        collectives_of(made_run([("start", 0, 3)]), {"1": (0, 1)})


LETTERS = st.lists(st.sampled_from("abc"), max_size=7)


@given(LETTERS, LETTERS)
def test_as_many_in_order_as_can_be(a, b):
    pairs = common_order(a, b)
    assert all(a[i] == b[j] for i, j in pairs)
    assert pairs == sorted(pairs) and len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
    subsequences = {word for n in range(len(a) + 1) for word in combinations(a, n)}
    assert len(pairs) == max(n for n in range(len(b) + 1) for word in combinations(b, n) if word in subsequences)


KINDS = st.sampled_from([("all_reduce", 8), ("all_reduce", 16), ("all_to_all_single", 4), ("broadcast", 8)])


@given(st.dictionaries(st.integers(0, 2), st.lists(KINDS, max_size=6), min_size=1))
def test_every_call_is_in_one_row_in_order(kinds):
    calls = {
        rank: [call(op, size, at=10 * i) for i, (op, size) in enumerate(several)] for rank, several in kinds.items()
    }
    rows = matched(calls)
    for rank, mine in calls.items():
        assert [row.calls[rank] for row in rows if rank in row.calls] == mine
    for row in rows:
        assert len({c.kind for c in row.calls.values()}) == 1
        assert set(row.calls) | set(row.lacking) == set(kinds) and not set(row.calls) & set(row.lacking)


@given(st.lists(KINDS, min_size=1, max_size=8), st.data())
def test_the_one_that_a_rank_lacks_is_named(kinds, data):
    whole = [call(op, size, at=i) for i, (op, size) in enumerate(kinds)]
    rank, gone = data.draw(st.integers(0, 2)), data.draw(st.integers(0, len(kinds) - 1))
    calls = {r: whole if r != rank else whole[:gone] + whole[gone + 1 :] for r in range(3)}
    rows = matched(calls)
    assert len(rows) == len(kinds)
    (lacking,) = [row for row in rows if row.lacking]
    # of equal ones in a row nobody can say which
    assert lacking.lacking == (rank,) and lacking.any_call.kind == whole[gone].kind


def test_sizes_may_differ_where_processes_bring_what_they_have():
    uneven = matched({0: [call("all_to_all_single", 8)], 1: [call("all_to_all_single", 24)], 2: []})
    assert [(sorted(row.calls), row.lacking) for row in uneven] == [([0, 1], (2,))]
    reduced = matched({0: [call("all_reduce", 8)], 1: [call("all_reduce", 24)]})
    assert [(sorted(row.calls), row.lacking) for row in reduced] == [([0], (1,)), ([1], (0,))]


def test_groups_and_steps_are_matched_apart():
    pair, both = ("1", (0, 2)), ("2", (0, 2))
    calls = {
        0: [call("all_reduce", 8, group=pair), call("all_reduce", 8, group=both), call("all_reduce", 8, step=1)],
        1: [call("all_reduce", 8, step=1)],
        2: [call("all_reduce", 8, group=both), call("all_reduce", 8, group=pair), call("all_reduce", 8, step=1)],
    }
    rows = matched(calls)
    assert [(row.any_call.step, row.any_call.group[0], sorted(row.calls)) for row in rows] == [
        (0, "1", [0, 2]),
        (0, "2", [0, 2]),
        (1, "0", [0, 1, 2]),
    ]
    assert not any(row.lacking for row in rows)


def test_processes_that_were_not_profiled_lack_nothing():
    (row,) = matched({0: [call("all_reduce", 8)], 2: [call("all_reduce", 8)]})
    assert row.lacking == ()
