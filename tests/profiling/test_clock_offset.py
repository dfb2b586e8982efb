"""Clocks that are set wrong and drift, over ways that take any time."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from deepfuse.profiling.clock_offset import Answer, Clock, Offset, ask, offset_of

DELAYS = st.integers(0, 300)


@st.composite
def answers(draw, offset):
    """Of one short time, with a clock that does not drift: the reference shows ``offset`` more."""
    made, now = [], draw(st.integers(0, 10_000))
    for _ in range(draw(st.integers(1, 6))):
        there, held, back = draw(DELAYS), draw(DELAYS), draw(DELAYS)
        made.append(Answer(now, now + there + offset, now + there + held + offset, now + there + held + back))
        now = made[-1].returned + draw(DELAYS)
    return made


@given(st.data(), st.integers(-2000, 2000))
def test_the_middle_of_what_agrees_with_all_answers(data, offset):
    given_answers = data.draw(answers(offset))
    found = offset_of(given_answers)
    # by trying them all: no message arrives before it was sent
    possible = [
        o
        for o in range(offset - 1000, offset + 1001)
        if all(a.sent + o <= a.received and a.replied <= a.returned + o for a in given_answers)
    ]
    assert offset in possible
    assert found.ns == (possible[0] + possible[-1]) / 2
    assert found.uncertainty_ns == (possible[-1] - possible[0]) / 2


@given(st.data(), st.integers(-2000, 2000))
def test_more_answers_say_more(data, offset):
    given_answers = data.draw(answers(offset))
    assert offset_of(given_answers).uncertainty_ns <= offset_of(given_answers[:1]).uncertainty_ns
    assert abs(offset_of(given_answers).ns - offset) <= offset_of(given_answers).uncertainty_ns


class World:
    """A reference, and a clock beside it that is ``ahead_ns`` off and runs faster by ``drift``."""

    def __init__(self, ahead_ns, drift, delays):
        self.time, self.ahead_ns, self.drift, self.delays = 0, ahead_ns, drift, delays

    def own(self):
        return round(self.time * (1 + self.drift)) + self.ahead_ns

    def question(self):
        self.time += self.delays()
        received = self.time
        self.time += 1_000
        replied = self.time
        self.time += self.delays()
        return received, replied


@given(
    st.integers(-(10**12), 10**12),
    st.floats(-1e-3, 1e-3),
    st.lists(st.integers(5_000, 400_000), min_size=1, max_size=40),
    st.lists(st.floats(0, 1), min_size=1, max_size=5),
)
def test_a_clock_that_drifts_is_set_right_between_two_questions(ahead_ns, drift, delays, moments):
    upcoming = iter(delays * 200)
    world = World(ahead_ns, drift, lambda: next(upcoming))
    before = ask(world.question, rounds=32, now=world.own)
    asked_ns = world.time
    first, world.time = world.time, world.time + 60 * 10**9
    last = world.time
    after = ask(world.question, rounds=32, now=world.own)
    clock = Clock(before, after)
    # while it asked, the clock drifted; twice, for the moment that the offset is said to be of; a ns each is rounded
    slack = 2 * abs(drift) * max(asked_ns, world.time - last) + 4
    for moment in moments:
        world.time = round(first + moment * (last - first))
        assert abs(clock.reference(world.own()) - world.time) <= clock.uncertainty_ns + slack


def test_drift_alone_would_be_an_error():
    # of 60 s at 1e-5 with the first offset only: 600 us, a thousand times what the answers leave open
    clock = Clock(Offset(0, 0.0, 500.0), Offset(60 * 10**9, 600_000.0, 500.0))
    assert clock.reference(30 * 10**9) == 30 * 10**9 + 300_000
    assert clock.uncertainty_ns == 500


def test_asked_twice_at_one_moment():
    assert Clock(Offset(5, 7.0, 1.0), Offset(5, 9.0, 1.0)).reference(10) == 17


@given(st.lists(DELAYS, min_size=2, max_size=2), st.integers(1, 500))
def test_a_clock_that_is_set_in_between_is_uncertain_by_as_much(delays, jump):
    there, back = delays
    first = Answer(0, there, there, there + back)
    second = Answer(1000, 1000 + there + jump, 1000 + there + jump, 1000 + there + back)
    assume(jump > there + back)
    found = offset_of([first, second])
    assert found.uncertainty_ns == (jump - there - back) / 2


def test_no_answers():
    with pytest.raises(ValueError, match="clock_offset: want at least one answer, got none"):
        offset_of([])
