"""Placements as blocks take them: what is none, which copy a token goes to, and what a process keeps."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.batch import Batch
from deepfuse.blocks.cut import Cut, taken, whole_shape
from deepfuse.blocks.expert_parallel import to_expert_parallel
from deepfuse.blocks.load_counter import LoadCounter, counting
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.parallel import Parallel
from deepfuse.blocks.placement import Placement
from deepfuse.blocks.replicas import Replicas
from tiny_checkpoint import TINY

LOADS = torch.ones(2, 8, dtype=torch.float64)
ROWS = [[7, 6, 5, 4, 3, 2, 1, 0, 7, 6, 7, 7], [0, 1, 2, 3, 4, 5, 6, 7, 0, 2, 0, 2]]
"""Of two layers: 8 experts in 12 slots; of 4 processes the last has expert 7 of the first layer twice."""


def placement(rows: list[list[int]] = ROWS, ranks: int = 4, loads: Tensor = LOADS) -> Placement:
    return Placement(torch.tensor(rows), ranks, loads)


def placed(rank: int = 1, size: int = 4, config=TINY, device: str = "meta", plan: Placement | None = None, **how):
    with torch.device(device):
        model = CausalLM(config)
    to_expert_parallel(model, Axis("expert", "0", size, rank), placement=plan or placement(), **how)
    return model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks": 5}, "want ranks that divide the 12 slots of a layer, got 5"),
        ({"ranks": 0}, "got 0"),
        ({"ranks": "4"}, "got '4'"),
        ({"rows": ROWS[:1]}, r"want expert_of_slot \[2, slots\] int64, with the layers of the loads, got \[1, 12\]"),
        ({"rows": [[0.0] * 8] * 2}, "want expert_of_slot .*, got .* torch.float32"),
        (
            {"rows": [[*range(7), 6]] * 2},
            "want slots for the experts 0 .. 7 and a slot for each, got none for expert 7",
        ),
        ({"rows": [[*range(8)], [*range(7), 8]], "ranks": 2}, "got expert 8 in layer 1"),
        ({"loads": -LOADS}, r"want finite loads >= 0 \[layers, experts\], got \(2, 8\) from -1.0"),
        ({"loads": LOADS * torch.nan}, "want finite loads >= 0"),
    ],
)
def test_what_is_no_placement_is_refused(changes, words):
    with pytest.raises(ValueError, match=f"^placement: .*{words}"):
        placement(**changes)


def test_placements_are_the_same_by_what_lies_where():
    other = placement([ROWS[0], ROWS[0]])
    assert placement() == placement(loads=2 * LOADS) and placement() != other and placement() != placement(ranks=3)
    assert hash(placement()) == hash(placement()) and len({placement(), placement(), other}) == 2
    # keys of builds have the settings as they print
    texts = [repr(Parallel(placement=p)) for p in (placement(), placement(loads=2 * LOADS), other, placement(ranks=3))]
    assert texts[0] == texts[1] and len(set(texts)) == 3
    assert "placement=Placement(8 experts in 12 slots of 4 ranks, 2 layers, " in texts[0]
    assert Parallel(placement=placement()) == Parallel(placement=placement())


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_choice_goes_to_a_copy_of_its_expert_and_copies_take_turns(data: st.DataObject) -> None:
    E, size = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    row = [*range(E), *data.draw(st.lists(st.integers(0, E - 1), max_size=6))]
    T, expert = data.draw(st.integers(0, 12)), data.draw(st.integers(0, E - 1))
    copies = [s for s, e in enumerate(row) if e == expert]
    most, K = max(map(row.count, row)), data.draw(st.integers(1, 3))
    all_firsts = set()
    for rank in range(size):
        replicas = Replicas(row, E, most=most + 1, rank=rank).eval()
        experts = torch.randint(E, (T, K), generator=torch.Generator().manual_seed(T))
        chosen = replicas(experts)
        assert torch.equal(torch.tensor(row)[chosen], experts)
        # tokens that all choose one: counts of its copies differ by one at most
        counts = replicas(torch.full((T, 1), expert)).flatten().bincount(minlength=len(row))[copies]
        assert int(counts.sum()) == T and int(counts.max() - counts.min()) <= 1
        all_firsts.add(int(replicas(torch.tensor([[expert]]))))
    # a step of one token on each process
    assert len(all_firsts) == min(size, len(copies))


def test_copies_are_for_inference():
    replicas = Replicas(ROWS[0], 8, most=4, rank=0)
    with pytest.raises(ValueError, match=r"^placement: want a model for inference, .* call eval\(\)"):
        replicas.train()(torch.zeros(1, 1, dtype=torch.int64))


def test_a_cut_by_slots_takes_indices_and_knows_who_has_which():
    cuts = [Cut(Axis("expert", "0", 4, rank), 0, slots=tuple(ROWS[0])) for rank in range(4)]
    x = torch.arange(8.0)[:, None]
    parts = [taken(x, [cut]) for cut in cuts]
    assert torch.cat(parts).flatten().tolist() == ROWS[0]
    assert all(whole_shape(part.shape, [cut]) == (8, 1) for part, cut in zip(parts, cuts, strict=True))
    assert [cuts[0].holder(e, 8) for e in range(8)] == [2, 2, 1, 1, 1, 0, 0, 0]
    in_order = Cut(Axis("expert", "0", 4, 1), 0)
    assert [in_order.holder(e, 8) for e in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert list(in_order.indices(8, "experts")) == [2, 3] and list(cuts[3].indices(8, "experts")) == [6, 7, 7]


@pytest.mark.parametrize("rank", [0, 3])
def test_a_process_keeps_the_experts_of_its_slots(rank):
    # layer 0 has no experts; 3 is that of multi-token prediction, which is not served
    config = TINY
    whole = CausalLM(config)
    whole.initialize()
    part = copy.deepcopy(whole)
    layers = to_expert_parallel(part, Axis("expert", "0", 4, rank), placement=placement())
    assert layers == [f"model.layers.{i}.mlp" for i in (1, 2, 3)]
    drawn = placed(rank).to_empty(device="cpu")
    drawn.initialize()
    theirs = dict(whole.named_parameters())
    rows = {1: ROWS[0], 2: ROWS[1], 3: [*range(8), 0, 1, 2, 3]}
    for model in (part, drawn):
        for name, parameter in model.named_parameters():
            want = theirs[name]
            if ".experts." in name:
                want = want[rows[int(name.split(".")[2])][3 * rank : 3 * rank + 3]]
            assert torch.equal(parameter, want), name


def test_capacity_is_of_a_slot():
    # ceil(16 tokens * 3 choices / 12 slots * 1.25); of 8 experts in order each has 8
    exchange = placed(mode="capacity", capacity_factor=1.25).model.layers[1].mlp.exchange
    assert exchange.capacity(16, 3) == 5


def test_padding_is_sent_to_no_slot():
    model = placed(size=1, rank=0, device="cpu", plan=placement(ranks=1), mode="capacity", capacity_factor=12)
    layer = model.eval().model.layers[1].mlp
    sent = []
    layer.exchange.forward = lambda x, weights, experts, ffn: (sent.append(experts), (x, experts))[1]
    five, q_start = torch.zeros(5, dtype=torch.int64), torch.tensor([0, 3], dtype=torch.int32)
    torch.nn.init.normal_(layer.gate.weight)
    layer(torch.randn(5, TINY.hidden_size), Batch(five, q_start, five, five))
    assert bool((sent[0][3:] == 12).all()) and bool((sent[0][:3] < 12).all())


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            {"size": 2, "rank": 0},
            "want one of the model's 2 layers of 8 experts over the 2 processes .*, got .* over 4",
        ),
        (
            {"config": replace(TINY, num_hidden_layers=2)},
            "want one of the model's 1 layers .*, got one of 2 layers of 8",
        ),
        (
            {"config": replace(TINY, n_routed_experts=16)},
            ".* 2 layers of 16 experts .*; choose it anew with place_experts",
        ),
    ],
)
def test_a_placement_of_another_model_or_mesh_is_refused(how, words):
    with pytest.raises(ValueError, match=f"^placement: {words}"):
        placed(**how)


def test_a_group_on_two_nodes_is_refused():
    nodes = (Axis("expert", "1", 2, 0), Axis("expert", "2", 2, 1))
    # groups of two experts; 6 slots on each of two nodes
    whole = [[6, 7, 6, 7, 0, 1, 2, 3, 4, 5, 4, 5]] * 2
    assert (
        placed(plan=placement(whole), mode="node_limited", nodes=nodes).model.layers[1].mlp.exchange.num_experts == 12
    )
    torn = [whole[0], [0, 1, 2, 3, 6, 7, 4, 5, 6, 7, 4, 5]]
    words = "want each group of experts on one node with mode 'node_limited', got group 3 of layer 1 on nodes 0 and 1; choose"
    with pytest.raises(ValueError, match=f"^placement: {words}"):
        placed(plan=placement(torn), mode="node_limited", nodes=nodes)
    placed(plan=placement(torn))


def test_settings_of_another_type_are_refused():
    for path in ("plan.json", placement(), None):
        Parallel(placement=path).check()
    with pytest.raises(TypeError, match=r"^parallel: want placement as what place_experts returns, .*, got \[\[0\]\]"):
        Parallel(placement=[[0]]).check()


def test_tokens_are_counted_and_padding_is_not():
    counter = LoadCounter(4, torch.device("cpu"))
    counter(torch.tensor([[0, 1], [1, 3], [2, 2]]), None)
    four = torch.zeros(4, dtype=torch.int64)
    # two tokens of prompts, two of padding; in decode a sequence of padding has no tokens
    counter(torch.tensor([[3, 1]] * 4), Batch(four, torch.tensor([0, 2], dtype=torch.int32), four, four))
    seqlens = torch.tensor([5, 0, 7, 0], dtype=torch.int32)
    counter(torch.tensor([[0, 1]] * 4), Batch(four, four, four, four, seqlens=seqlens))
    assert counter.tokens.tolist() == [1 + 2, 2 + 2 + 2, 2, 1 + 2]


def test_a_served_layer_counts_where_it_is_asked_to():
    model = CausalLM(TINY).eval()
    counting(model, on=True)
    assert [layer.mlp.counter is not None for layer in model.model.layers[1:]] == [True, True, False]
    assert not [name for name in model.state_dict() if "counter" in name]
    counting(model, on=False)
    assert not [module for module in model.modules() if isinstance(module, LoadCounter)]
    with pytest.raises(ValueError, match="want count_loads for a model with routed experts, got one without"):
        counting(CausalLM(replace(TINY, n_routed_experts=None)), on=True)
