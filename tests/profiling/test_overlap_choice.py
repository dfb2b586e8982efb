"""Plans of a layer, held against schedules drawn by hand."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from deepfuse.profiling.overlap_choice import LayerSeconds, best, plans


def layer(attention: float, shared: float, dispatch: float, routed: float, combine: float) -> LayerSeconds:
    """A shared expert of two ops, and others of one."""
    return LayerSeconds((attention,), (shared / 2, shared / 2), dispatch, (routed,), combine)


def evenly(whole: LayerSeconds, latency: float = 0.0) -> Callable[[float], LayerSeconds]:
    """Parts take their share, and each message its latency."""

    def at(n: float) -> LayerSeconds:
        link = {"dispatch": n * whole.dispatch + latency, "combine": n * whole.combine + latency}
        ops = {
            name: tuple(n * seconds for seconds in getattr(whole, name)) for name in ("attention", "shared", "routed")
        }
        return replace(whole, **ops, **link)

    return at


def test_nothing_is_hidden_where_nothing_travels() -> None:
    assert plans(evenly(layer(1, 1, 0, 1, 0)), 3) == {"none": 9}


def test_shared_experts_run_while_rows_travel() -> None:
    # 1 + 3 beside nothing; 2 of compute beside 2 + 4, and 10 beside them
    assert plans(evenly(layer(1, 2, 2, 3, 4)), 2)["shared expert"] == 2 * (1 + 3 + 6)
    assert plans(evenly(layer(1, 10, 2, 3, 4)), 1)["shared expert"] == 1 + 3 + 10


def test_chunks_travel_under_the_experts_of_others() -> None:
    # attention until 2; link: 2-4, 4-6, then combine at 9-11 and 14-16; experts: 4-9 and 9-14
    assert plans(evenly(layer(2, 0, 4, 10, 4)), 3)["chunked x2"] == 3 * 16


def test_halves_of_a_batch_hide_each_others_exchange() -> None:
    # two halves of attention 2, dispatch 1, experts 2, combine 1. First layer: attention 0-2, 2-4; experts 4-6 and 6-8;
    # everything travels beside it but the last combine
    found = plans(evenly(layer(4, 0, 2, 4, 2)), 1)
    assert found["two-batch"] == 9 and found["none"] == 12
    # from then on computation never stops: 8 a layer
    assert [plans(evenly(layer(4, 0, 2, 4, 2)), n)["two-batch"] for n in (2, 5)] == [17, 41]


def test_a_link_that_never_rests_is_the_bound() -> None:
    layers = 7
    found = plans(evenly(layer(1, 0, 20, 1, 20)), layers)["two-batch"]
    assert layers * 40 <= found <= layers * 40 + 4  # what is before the first row travels, and between halves


def test_small_messages_are_left_alone() -> None:
    whole = layer(1e-6, 1e-7, 2e-6, 1e-6, 2e-6)
    found = plans(evenly(whole, latency=50e-6), 10)
    assert found["chunked x2"] > found["none"] and found["two-batch"] > found["none"]
    assert best(found) == "shared expert"


def test_of_equal_plans_the_simplest_is_taken() -> None:
    assert best({"none": 1.0, "shared expert": 1.0, "two-batch": 2.0}) == "none"


def test_one_token_is_not_split() -> None:
    assert list(plans(evenly(layer(1, 1, 1, 1, 1)), 1, can_split=False)) == ["none", "shared expert"]


def test_an_exchange_that_takes_processors_slows_what_runs_beside_it() -> None:
    alone, beside = (plans(evenly(layer(4, 0, 2, 4, 2)), 5, busy=busy) for busy in (0.0, 0.2))
    assert beside["none"] == alone["none"]
    # 8 a layer, and a fifth of the time that messages travel beside it: all 4 of each layer but the last combine's 1
    assert beside["two-batch"] == pytest.approx(alone["two-batch"] + 0.2 * (5 * 4 - 1))


def test_only_what_runs_beside_an_exchange_is_slowed() -> None:
    # attention 1, then 4 of the shared expert beside 2 of dispatch: 1.5 of work in them; routed 3 beside nothing, for it
    # waits for the dispatch; what is left of the shared expert beside the combine
    found = plans(evenly(layer(1, 8, 2, 3, 4)), 1, busy=0.25)
    assert found["shared expert"] == pytest.approx(1 + 8 + 3 + 0.25 * (2 + 4))


def test_a_message_beside_computation_comes_later() -> None:
    whole = layer(1, 2, 2, 3, 4)
    alone, late = (plans(evenly(whole), 2, late=late) for late in (0.0, 0.5))
    assert late["none"] == alone["none"]
    # dispatch and combine of two layers
    assert late["shared expert"] == alone["shared expert"] + 2 * 2 * 0.5
