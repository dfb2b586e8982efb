"""Who comes last, and what for."""

from hypothesis import given
from hypothesis import strategies as st

from deepfuse.profiling.collectives import collectives_of, matched
from deepfuse.profiling.run import GUARDS, WRAPPER
from deepfuse.profiling.stragglers import BEFORE, BETWEEN, activities, done_between, met_before, straggler
from deepfuse.profiling.timeline import Step
from hand_made_ranks import COMBINE, GROUP, MATMUL, SHARED, made_run

WAITING = "layers.0.mlp.wait_tensor"


def last_of(runs, which=-1, uncertainty=0.0):
    rows = matched({rank: collectives_of(run, {GROUP: tuple(runs)}) for rank, run in runs.items()})
    done = {rank: activities(run) for rank, run in runs.items()}
    began = {rank: run.steps[0].began for rank, run in runs.items()}
    met = met_before(rows[: len(rows) + which], rows[which], began)
    return straggler(rows[which], met, done, uncertainty), met, done, rows[which]


def test_activities_have_no_gaps():
    run = made_run([("matmul", 10, 20), ("shared", 25, 30)], [("matmul", 50, 60)], around=3)
    assert activities(run) == [
        (4, 7, GUARDS),
        (7, 10, WRAPPER),
        (10, 20, MATMUL),
        (20, 25, WRAPPER),
        (25, 30, SHARED),
        (30, 33, WRAPPER),
        (33, 36, GUARDS),
        (36, 44, BETWEEN),
        (44, 47, GUARDS),
        (47, 50, WRAPPER),
        (50, 60, MATMUL),
        (60, 63, WRAPPER),
        (63, 66, GUARDS),
    ]


def test_a_part_of_a_step_that_is_not_compiled():
    run = made_run([("matmul", 0, 5)])
    run.parts["optimizer"] = []
    run.steps.append(Step("optimizer", 7, 9, 7, 9, [], {}))
    assert activities(run)[1:] == [(5, 7, BETWEEN), (7, 9, "(optimizer)")]


@given(st.lists(st.integers(0, 9), min_size=3, max_size=12), st.integers(-5, 60), st.integers(0, 60))
def test_a_window_moment_by_moment(lengths, began, lasting):
    names, now, done = [MATMUL, SHARED, WRAPPER], 0, []
    for i, n in enumerate(lengths):
        if n:
            done.append((now, now + n, names[i % 3]))
        now += n
    ended = min(began + lasting, now)
    found = done_between(done, began, ended)
    expected = {}
    for t in range(began, ended):
        name = next((name for a, b, name in done if a <= t < b), BEFORE)
        expected[name] = expected.get(name, 0) + 1
    assert {name: ns for name, ns in found.items() if ns} == expected


def step(at, matmul, *, wait=0, shared=0):
    """Met at the end of a wait, then experts, then a collective; returns what is done, and when it starts."""
    done = [("start", at, at + 1), ("wait", at + 1, at + 2 + wait)]
    now = at + 2 + wait
    for name, ns in (("shared", shared), ("matmul", matmul)):
        if ns:
            done.append((name, now, now + ns))
            now += ns
    return [*done, ("again", now, now + 1), ("wait again", now + 1, now + 200)]


def test_the_one_with_the_longest_kernel():
    runs = {0: made_run(step(0, 30)), 1: made_run(step(0, 100)), 2: made_run(step(0, 34))}
    found, *_, row = last_of(runs)
    assert row.any_call.name == COMBINE
    assert (found.process, found.late_ns, found.doing, found.longer_ns) == (1, 68, MATMUL, 68)


def test_everybody_waits_for_one_that_waited_for_nobody():
    # rank 1 came late to the first collective; at its end all met, and then rank 0 had more to do
    runs = {
        0: made_run([("shared", 0, 5), *step(5, 90, wait=45)]),
        1: made_run([("shared", 0, 50), *step(50, 20)]),
    }
    first, *_ = last_of(runs, which=0)
    second, *_ = last_of(runs, which=1)
    assert (first.process, first.late_ns, first.doing) == (1, 45, SHARED)
    assert (second.process, second.late_ns, second.doing) == (0, 70, MATMUL)


def test_time_outside_of_the_graphs_has_a_name():
    runs = {
        0: made_run([("matmul", 0, 10)], [("start", 20, 21), ("wait", 21, 90)]),
        1: made_run([("matmul", 0, 10)], [("start", 80, 81), ("wait", 81, 90)]),
    }
    found, *_ = last_of(runs)
    assert (found.process, found.late_ns, found.doing) == (1, 60, BETWEEN)
    late_from_the_beginning = {0: made_run([("start", 20, 21)]), 1: made_run([("start", 80, 81)])}
    assert last_of(late_from_the_beginning)[0].doing == BEFORE


def test_clocks_that_cannot_tell():
    runs = {0: made_run(step(0, 30)), 1: made_run(step(0, 100))}
    assert last_of(runs, uncertainty=69)[0] is not None
    assert last_of(runs, uncertainty=70)[0] is None


def test_a_collective_of_one():
    assert last_of({0: made_run(step(0, 30))})[0] is None


def test_a_collective_in_flight_is_no_meeting():
    # the first is waited for after the second has started: nobody has met before that
    done = [("start", 0, 1), ("matmul", 1, 8), ("again", 8, 9), ("wait", 9, 20), ("wait again", 20, 30)]
    late = [("start", 0, 1), ("matmul", 1, 19), ("again", 19, 20), ("wait", 20, 21), ("wait again", 21, 30)]
    found, met, *_ = last_of({0: made_run(done), 1: made_run(late)})
    assert met == {0: 0, 1: 0} and (found.process, found.doing, found.longer_ns) == (1, MATMUL, 11)


def test_the_last_meeting_counts():
    # two meetings before the third: at 10 and at 30
    done = [("start", 0, 1), ("wait", 1, 10), ("again", 10, 11), ("wait again", 11, 30), ("reduce", 40, 41)]
    late = [("start", 0, 1), ("wait", 1, 10), ("again", 20, 21), ("wait again", 21, 31), ("reduce", 60, 61)]
    assert last_of({0: made_run(done), 1: made_run(late)})[1] == {0: 30, 1: 31}
    # that nobody waited for it says nothing of the others
    unheard = [[call for call in calls if call[0] != "wait again"] for calls in (done, late)]
    assert last_of(dict(enumerate(map(made_run, unheard))))[1] == {0: 10, 1: 10}


@given(st.lists(st.integers(1, 40), min_size=4, max_size=4), st.integers(0, 10), st.integers(0, 10))
def test_of_two_the_differences_add_up(lengths, wait, between):
    a, b, c, d = lengths
    runs = {0: made_run(step(0, a, shared=b, wait=wait)), 1: made_run(step(between, c, shared=d))}
    found, met, done, row = last_of(runs, uncertainty=0)
    arrived = {rank: call.arrived for rank, call in row.calls.items()}
    if arrived[0] == arrived[1]:
        assert found is None
        return
    last = max(arrived, key=arrived.get)
    assert found.process == last and found.late_ns == abs(arrived[0] - arrived[1])
    times = {rank: done_between(done[rank], min(met.values()), arrived[rank]) for rank in runs}
    differences = {name: times[last][name] - times[1 - last][name] for name in {*times[0], *times[1]}}
    assert sum(differences.values()) == found.late_ns
    assert found.longer_ns == differences[found.doing] == max(differences[name] for name in times[last])
