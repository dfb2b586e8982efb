"""The list scheduler: times worked out by hand, and what holds for any graph."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepfuse.passes.overlap_orders import by_depth, orders, starts_of
from deepfuse.passes.overlap_schedule import SLACK, Task, play, schedule


def start(after, seconds, **more):
    return Task(after=after, link_seconds=seconds, **more)


def wait(of, **more):
    return Task(after=(of,), start=of, **more)


LAYER = [
    start((), 4.0),
    wait(0),
    Task(seconds=2.0, after=(1,)),  # the experts
    start((2,), 4.0),
    wait(3),
    Task(seconds=3.0),  # the shared expert, in two parts
    Task(seconds=3.0, after=(5,)),
    Task(seconds=1.0, after=(4, 6)),
]


def test_a_layer_in_the_order_it_is_written_exposes_all():
    played = play(LAYER, range(len(LAYER)))
    # 4 + 2 + 4 + 3 + 3 + 1
    assert played.seconds == 17.0 and played.exposed == {0: 4.0, 3: 4.0}


def test_independent_work_fills_the_gaps_in_its_order():
    order = schedule(LAYER, [0, 3], reach=2, coarse=4.0)
    # both parts under the first message: 6 of 4, for what covers a part of it is done
    assert order == [0, 5, 6, 1, 2, 3, 4, 7]
    assert play(LAYER, order).exposed == {0: 0.0, 3: 4.0}
    longer = [start((), 3.0 / SLACK), *LAYER[1:]]
    order = schedule(longer, [0, 3], reach=2, coarse=4.0)
    assert order == [0, 5, 1, 2, 3, 6, 4, 7], "no more than the gap"
    # 3 + 2, then 3 under the message of 4, 1 exposed, and 1
    assert play(longer, order).seconds == 10.0


def test_what_does_not_fit_into_a_gap_is_tried_in_the_next():
    # 4 + 2 + 4 + 1, each part under a message of its own
    assert min(play(LAYER, order).seconds for order in orders(LAYER)) == 11.0


def test_a_message_takes_its_share_of_what_runs_beside_it():
    order = [0, 5, 6, 1, 2, 3, 4, 7]
    # 3 of the shared expert: 2 in the 4 of the message, at half the speed, and 1 behind it; nothing runs beside the second
    assert play(LAYER, order, busy=0.5).seconds == play(LAYER, order).seconds + 0.5 * 4.0
    assert play(LAYER, range(len(LAYER)), busy=0.5).seconds == 17.0


def test_filler_that_is_longer_than_the_gap_by_far_is_left_for_a_later_one():
    tasks = [start((), 0.1), wait(0), start((1,), 9.0), wait(2), Task(seconds=9.0), Task(after=(3, 4))]
    assert schedule(tasks, [0, 2], reach=2, coarse=4.0) == [0, 1, 2, 4, 3, 5]
    assert schedule(tasks, [0, 2], reach=2, coarse=90.0) == [0, 4, 1, 2, 3, 5], "unless it may"


def test_chains_of_two_halves_alternate():
    """Two halves of a batch, one after the other: dispatch, experts, combine of each."""
    half = [start((), 4.0), wait(0), Task(seconds=4.0, after=(1,)), start((2,), 4.0), wait(3)]
    shifted = [
        Task(
            seconds=t.seconds,
            after=tuple(a + 5 for a in t.after),
            link_seconds=t.link_seconds,
            start=None if t.start is None else t.start + 5,
        )
        for t in half
    ]
    tasks = [*half, *shifted]
    assert by_depth(tasks) == [0, 5, 3, 8] and starts_of(tasks) == [0, 3, 5, 8]
    played = play(tasks, schedule(tasks, by_depth(tasks), reach=4, coarse=4.0))
    # the link carries 16 without a gap; the experts of a half run under the messages of the other
    assert played.seconds == 16.0 and play(tasks, range(10)).seconds == 24.0


def test_gradients_of_weights_wait_for_a_gap_but_not_for_long():
    chain = []
    for k in range(4):
        before = (4 * k - 2,) if k else ()
        chain += [
            start(before, 1.0),
            wait(4 * k),
            Task(seconds=1.0, after=(4 * k + 1,)),
            Task(seconds=1.0, after=(4 * k + 1,)),
        ]
    order = schedule(chain, starts_of(chain), reach=1, coarse=4.0)
    place = {number: i for i, number in enumerate(order)}
    for k in range(3):  # that of one layer runs under the next one's message
        assert place[4 * k + 4] < place[4 * k + 3] < place[4 * k + 5]
    assert play(chain, order).seconds == 4 * 2 + 1


def test_what_reads_inputs_alone_fills_no_gap_and_lives_from_its_reader_on():
    # a loop over inputs that the product behind the message reads, and a product that waits for nothing
    tasks = [start((), 4.0), wait(0), Task(seconds=1.0, lazy=True), Task(seconds=1.0, after=(1, 2)), Task(seconds=3.0)]
    assert schedule(tasks, [0], reach=4, coarse=4.0) == [0, 4, 1, 2, 3]
    # one that nobody reads is a result
    assert schedule([*tasks, Task(seconds=1.0, lazy=True)], [0], reach=4, coarse=4.0) == [0, 4, 1, 2, 3, 5]


def test_memory_lives_from_who_makes_it_to_its_last_reader():
    tasks = [
        Task(makes={1: 10}, reads=frozenset({1, 9})),
        Task(makes={2: 30}, reads=frozenset({1, 2}), after=(0,)),
        Task(makes={3: 5}, reads=frozenset({2, 3}), after=(1,)),
    ]
    # 7 left by somebody, which goes after the first; then 10 + 30, then 30 + 5
    assert play(tasks, range(3), {9: 7}).peak == 40
    assert play(tasks[:1], range(1), {9: 7}).peak == 17


@st.composite
def graphs(draw):
    tasks, started = [], []
    for number in range(draw(st.integers(1, 24))):
        after = set(draw(st.lists(st.integers(0, number - 1), max_size=3))) if number else set()
        kind = draw(st.sampled_from(["compute", "compute", "start", "wait"]))
        seconds = draw(st.integers(0, 5))
        if kind == "start":
            started.append(number)
            tasks.append(start(tuple(after), float(seconds)))
        elif kind == "wait" and started:
            of = started.pop(draw(st.integers(0, len(started) - 1)))
            tasks.append(Task(after=tuple(after | {of}), start=of))
        else:
            lazy = draw(st.booleans()) and all(tasks[a].lazy for a in after)
            tasks.append(Task(seconds=float(seconds), after=tuple(after), lazy=lazy))
    return tasks


@given(tasks=graphs(), reach=st.integers(0, 6), coarse=st.sampled_from([1.0, 4.0, math.inf]), deep=st.booleans())
def test_any_graph_runs_once_in_a_valid_order_with_its_collectives_in_theirs(tasks, reach, coarse, deep):
    starts = by_depth(tasks) if deep else starts_of(tasks)
    order = schedule(tasks, starts, reach, coarse)
    assert sorted(order) == list(range(len(tasks)))
    place = {number: i for i, number in enumerate(order)}
    assert all(place[a] < place[n] for n, task in enumerate(tasks) for a in task.after)
    assert [n for n in order if n in starts] == starts
    # what is lazy stands right before the first that reads it, through others that are lazy perhaps
    needs: list[set[int]] = []
    for task in tasks:
        needs.append({n for a in task.after if tasks[a].lazy for n in (a, *needs[a])})
    read = {lazy for task, needed in zip(tasks, needs, strict=True) if not task.lazy for lazy in needed}
    for number in read:
        assert number in needs[next(n for n in order[place[number] :] if not tasks[n].lazy)]
    played = play(tasks, order)
    assert played.seconds == pytest.approx(sum(t.seconds for t in tasks) + sum(played.exposed.values()))
