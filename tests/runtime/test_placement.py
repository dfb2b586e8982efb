"""Placements of experts: whole, even, never worse than none, and within their bound of the best."""

import ast
import itertools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepfuse.runtime.placement import Placement, place_experts


def busiest(row: Tensor, experts: list[int], ranks: int) -> float:
    """Load of the busiest rank, where copies share equally."""
    copies = torch.tensor(experts).bincount(minlength=len(row))
    return float((row.double() / copies)[torch.tensor(experts)].view(ranks, -1).sum(1).max())


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, int, int, int, int]:
    """Loads, ranks, redundant slots, ranks of a node, groups."""
    per_node, nodes = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ranks = per_node * nodes
    n_group = draw(st.sampled_from([1, nodes, 2 * nodes]))
    E = n_group * draw(st.integers(1, 5))
    redundant = -E % ranks + ranks * draw(st.integers(0, 3))
    # counts or shares of tokens; of subnormal numbers a copy's share would be 0
    load = st.one_of(st.integers(0, 5), st.floats(1e-6, 1e6))
    rows = draw(st.lists(st.lists(load, min_size=E, max_size=E), min_size=1, max_size=2))
    return torch.tensor(rows, dtype=torch.float64), ranks, redundant, per_node, n_group


@settings(deadline=None, max_examples=150)
@given(cases())
def test_every_expert_has_a_slot_and_no_rank_more_than_before(case: tuple[Tensor, int, int, int, int]) -> None:
    loads, ranks, redundant, per_node, n_group = case
    placement = place_experts(loads, ranks, redundant=redundant, ranks_per_node=per_node, n_group=n_group)
    L, E = loads.shape
    assert placement.expert_of_slot.shape == (L, E + redundant)
    for layer in range(L):
        experts = placement.expert_of_slot[layer].tolist()
        assert set(experts) == set(range(E))
        slots = placement.slots_of_expert[layer]
        assert [experts[s] for held in slots for s in held] == [e for e in range(E) for _ in slots[e]]
        assert sorted(s for held in slots for s in held) == list(range(E + redundant))
        mean = float(loads[layer].sum()) / ranks
        if mean:
            after = busiest(loads[layer], experts, ranks) / mean
            assert placement.after[layer] == pytest.approx(after, rel=1e-9)
    nodes = ranks // per_node
    if n_group % nodes == 0 and redundant % nodes == 0:
        for experts in placement.expert_of_slot.view(L, nodes, -1) // (E // n_group):
            homes = [set(node.tolist()) for node in experts]
            assert sum(map(len, homes)) == len(set().union(*homes)) == n_group
    assert bool((placement.after <= placement.before * (1 + 1e-9)).all())
    assert bool((placement.after >= 1 - 1e-9).all())


def test_it_ends_where_a_load_is_less_than_the_roundoff_of_others() -> None:
    # exchanging 1e-6 for nothing brings one sum closer to the other or not, as the sums are rounded
    loads = torch.tensor([[2.0, 1e-6, 0.0, 4.0, 696116.7950540193]], dtype=torch.float64)
    placement = place_experts(loads, 3, redundant=4)
    assert float(placement.after[0]) == pytest.approx(1, abs=1e-4)


def packings(slots: list[int], ranks: int) -> list[list[int]]:
    """Every way to fill ranks; order within a rank and of ranks does not matter, but does no harm."""
    return [list(p) for p in set(itertools.permutations(slots))] if ranks > 1 else [slots]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=4), st.integers(2, 3), st.integers(0, 3))
def test_the_best_of_all_placements_is_at_most_half(loads: list[float], ranks: int, redundant: int) -> None:
    E = len(loads)
    redundant += -(E + redundant) % ranks
    if E + redundant > 6:
        return  # too many to try
    row = torch.tensor([loads], dtype=torch.float64)
    found = place_experts(row, ranks, redundant=redundant).after[0] * row.sum() / ranks
    choices = (list(range(E)) + list(more) for more in itertools.combinations_with_replacement(range(E), redundant))
    optimum = min(busiest(row[0], p, ranks) for slots in choices for p in packings(slots, ranks))
    assert optimum * (1 - 1e-9) <= found <= 2 * optimum
    heaviest = min(
        max(load / count for load, count in zip(loads, counts, strict=True))
        for counts in itertools.product(range(1, redundant + 2), repeat=E)
        if sum(counts) == E + redundant
    )
    assert found <= sum(loads) / ranks + heaviest + 1e-9


def test_small_cases_are_the_best_there_is() -> None:
    # one expert has half of all: with a copy on the other rank both have half; 4 + 1 and 3 + 2 are even
    assert place_experts(torch.tensor([[4.0, 2.0, 2.0]]), 2, redundant=1).after.tolist() == [1.0]
    assert place_experts(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 2).after.tolist() == [1.0]
    # heaviest first alone packs 5, 2, 2 and 4, 3, 3 into 10 and 9; no placement has less
    assert place_experts(torch.tensor([[5.0, 4.0, 3.0, 3.0, 2.0, 2.0]]), 2).after[0] == pytest.approx(10 / 9.5)


def test_places_change_where_the_heaviest_first_is_not_best() -> None:
    # heaviest first packs 3, 2, 2 and 3, 2, 0; a 3 and a 2 change places
    assert place_experts(torch.tensor([[3.0, 3.0, 2.0, 2.0, 2.0, 0.0]]), 2).after[0] == 1.0


def test_loads_as_they_are_in_service_become_even() -> None:
    # a Zipf law over 256 experts, the ranks of DeepSeek-V3's prefill: 32, with one redundant slot each
    generator = torch.Generator().manual_seed(0)
    loads = torch.stack([1 / (10.0 + torch.randperm(256, generator=generator)) for _ in range(3)])
    placement = place_experts(loads, 32, redundant=32, ranks_per_node=8, n_group=8)
    assert bool((placement.before > 1.5).all()) and bool((placement.after < 1.1).all())


def test_groups_stay_on_one_node() -> None:
    generator = torch.Generator().manual_seed(0)
    loads = torch.rand(2, 32, generator=generator) ** 4
    placement = place_experts(loads, 8, redundant=8, ranks_per_node=2, n_group=8)
    for experts in placement.expert_of_slot:
        nodes = experts.view(4, -1) // 4  # groups on each node
        assert [len(set(node.tolist())) for node in nodes] == [2, 2, 2, 2]
        assert {g for node in nodes.tolist() for g in node} == set(range(8))


def test_groups_stay_on_one_node_where_ranks_have_no_expert_of_their_own() -> None:
    # all that is asked for is the first group's, and every copy that helps is on its node
    (experts,) = place_experts(torch.tensor([[3.0, 0.0]]), 4, redundant=10, ranks_per_node=2, n_group=2).expert_of_slot
    assert [set(node.tolist()) for node in experts.view(2, -1)] in ([{0}, {1}], [{1}, {0}])


def test_copies_lie_on_different_ranks() -> None:
    placement = place_experts(torch.tensor([[100.0, 1, 1, 1, 1, 1]]), 3, redundant=3)
    ranks = {slot // 3 for slot in placement.slots_of_expert[0][0]}
    assert len(ranks) == 3


def test_nothing_asked_for_is_even() -> None:
    placement = place_experts(torch.zeros(1, 4, dtype=torch.int64), 2, redundant=2)
    assert placement.before.tolist() == placement.after.tolist() == [1.0]


def test_the_report_says_the_balance_of_each_layer() -> None:
    placement = place_experts(torch.tensor([[4.0, 2.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]), 2)
    assert isinstance(placement, Placement)
    assert str(placement).splitlines() == [
        "4 experts in 4 slots of 2 ranks: busiest rank over the mean",
        "layer 0: 1.500 -> 1.250",
        "layer 1: 1.000 -> 1.000",
        "mean of 2 layers: 1.250 -> 1.125",
    ]


@pytest.mark.parametrize(
    ("loads", "how", "error"),
    [
        (torch.ones(3), {}, "want finite loads >= 0 [layers, experts], got (3,) from 1.0 to 1.0"),
        (torch.ones(0, 4), {}, "want finite loads >= 0 [layers, experts], got (0, 4) from nothing to nothing"),
        (torch.tensor([[1.0, -1.0]]), {}, "want finite loads >= 0 [layers, experts], got (1, 2) from -1.0 to 1.0"),
        (torch.tensor([[1.0, torch.inf]]), {}, "got (1, 2) from 1.0 to inf"),
        (torch.ones(1, 3), {}, "want ranks that divide 3 experts + redundant, and redundant >= 0, got 2 and 0"),
        (torch.ones(1, 2), {"redundant": -2}, "and redundant >= 0, got 2 and -2"),
        (
            torch.ones(1, 4),
            {"ranks_per_node": 3},
            "want ranks_per_node that divides 2 ranks and n_group that divides 4",
        ),
        (torch.ones(1, 4), {"n_group": 3}, "got None and 3"),
    ],
)
def test_what_does_not_fit_is_refused(loads: Tensor, how: dict[str, int], error: str) -> None:
    with pytest.raises(ValueError, match=f"^placement: .*{re.escape(error)}"):
        place_experts(loads, 2, **how)  # type: ignore[arg-type]


def test_the_documentation_prints_what_it_says() -> None:
    text = (Path(__file__).parents[2] / "docs" / "parallelism.md").read_text()
    rows = re.search(r"loads = torch.tensor\((.*)\)", text)
    assert rows is not None
    assert str(place_experts(torch.tensor(ast.literal_eval(rows[1])), ranks=4, redundant=4)) in text
