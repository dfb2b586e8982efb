"""Experts on 2 and on 4 processes over Gloo, against one process that has all tokens and all experts."""

import json
from dataclasses import replace

import pytest
import torch

import expert_parallel_worker
from deepfuse.blocks.axis import Axis
from deepfuse.blocks.expert_parallel import to_expert_parallel
from deepfuse.blocks.fp8 import to_fp8
from deepfuse.blocks.model import CausalLM
from expert_parallel_worker import TINY
from ranks import run_ranks

EXACT = ["1 a process", "2 a process", "4 a process", "uneven", "all to one", "empty experts"]
EXACT += ["a process without tokens", "no tokens at all", "compiled by aot_eager"]
IN_FP8 = ["experts fp8", "experts fp8 weights", "experts trained fp8", "experts trained high"]
IN_FP8 += ["dispatch in fp8", "dispatch in fp8 compiled by aot_eager"]
DROPPING = ["dropped by affinity", "dropped by position", "half dropped", "nothing dropped"]
DROPPING += ["padding by affinity", "padding by position", "padding alone", "capacity compiled by aot_eager"]
NODES = ["nodes of one", "one node", "two nodes", "nodes and a process without tokens", "nodes in fp8"]
NODES += ["nodes compiled by aot_eager"]
CHUNKS = ["chunks", "chunks and a process without tokens", "chunks compiled by aot_eager"]
HALVES = ["halves", "halves with a capacity", "halves compiled by aot_eager"]
CLOSE = ["model", "model compiled by aot_eager", "compiled by inductor", "dispatch in fp8 with a capacity"]
CLOSE += [*CHUNKS, *HALVES, *DROPPING, *NODES]


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"{size} processes")
def said(request, tmp_path_factory):
    """What each process says: case -> tensor -> its largest difference, as a share of the largest number in it."""
    folder = tmp_path_factory.mktemp("expert_parallel")
    run_ranks(expert_parallel_worker.__file__, request.param, folder)
    return [json.loads((folder / f"said{rank}.json").read_text()) for rank in range(request.param)]


def found(said, names, suffix=""):
    """What processes say of these cases, of which two processes have those that are compiled, and four two nodes."""
    left_out = {name for name in names if ("two nodes" if len(said) == 2 else "compiled") in name}
    return [(name, cases[name + suffix]) for cases in said for name in names if name not in left_out]


def test_results_gradients_and_loads_are_those_of_one_process_bitwise(said):
    for name, differences in found(said, EXACT):
        assert set(differences) == {"y", "x", "weights", "load", "gate_up_proj", "down_proj"}, name
        assert not any(differences.values()), (name, differences)


def test_in_fp8_all_that_does_not_depend_on_blocks_of_tokens_is_bitwise_that_of_one_process(said):
    for name, differences in found(said, IN_FP8):
        inference = name in ("experts fp8", "experts fp8 weights")
        assert set(differences) >= ({"y", "load"} if inference else {"y", "x", "weights", "load"}), name
        assert not any(differences.values()), (name, differences)


def test_where_sums_are_taken_in_another_order_they_differ_by_that(said):
    # a model's weights have gradients from all processes; generated code, sums by node, and products with empty slots
    # among the rows, add up in another order. 1e-5: at most 200 terms, each rounded by 6e-8 of the sum
    for name, differences in found(said, CLOSE):
        assert differences and max(differences.values()) < 1e-5, (name, differences)


def test_drops_are_counted(said):
    lost = dict.fromkeys(DROPPING, 0)
    for name, (actual, expected) in found(said, DROPPING, ", counts"):
        assert actual == expected, name
        lost[name] += actual[0]
    assert not lost["nothing dropped"] and lost["half dropped"] > lost["dropped by affinity"] > 0
    assert not lost["padding alone"] and lost["padding by affinity"] > 0


def test_a_token_travels_once_to_each_node(said):
    rows = dict.fromkeys(NODES, 0)
    for name, (actual, expected) in found(said, NODES, ", rows"):
        assert actual == expected, name
        rows[name] += sum(actual)
    assert rows["nodes of one"] > 0 and rows["one node"] == 0


def parallel(rank=1, size=4, config=TINY, **settings):
    with torch.device("meta"):
        model = CausalLM(config)
    to_expert_parallel(model, Axis("expert", "0", size, rank), **settings)
    return model


def test_names_stay_and_experts_are_shares():
    with torch.device("meta"):
        whole = dict(CausalLM(TINY).named_parameters())
    part = dict(parallel().named_parameters())
    assert list(part) == list(whole)
    for name, parameter in part.items():
        E, *rest = whole[name].shape
        assert list(parameter.shape) == ([E // 4, *rest] if ".experts." in name else [E, *rest]), name


@pytest.mark.parametrize("fp8", [False, True])
def test_each_process_keeps_its_share_of_what_is_there(fp8):
    whole, part = CausalLM(TINY), CausalLM(TINY)
    whole.initialize()
    part.load_state_dict(whole.state_dict())
    to_expert_parallel(part, Axis("expert", "0", 4, 2))
    drawn = parallel(2).to_empty(device="cpu")
    drawn.initialize()
    for model in (whole, part, drawn) if fp8 else ():
        to_fp8(model)
    expected = {k: v[4:6] if ".experts." in k else v for k, v in whole.named_parameters()}
    for model in (part, drawn):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.float(), expected[name].float()), name


def test_bad_input():
    with pytest.raises(ValueError, match="want n_routed_experts divisible by the 3 processes of axis 'expert', got 8"):
        parallel(size=3, rank=0)
    with pytest.raises(ValueError, match="want a model with routed experts, got none; leave out the axis 'expert'"):
        parallel(config=replace(TINY, n_routed_experts=None))
    model = CausalLM(TINY)
    to_fp8(model)
    with pytest.raises(ValueError, match="want a model to be cut before its weights are FP8, got one with FP8 weights"):
        to_expert_parallel(model, Axis("expert", "0", 2, 0))
    with pytest.raises(
        ValueError, match=r"want mode out of \['dropless', 'capacity', 'node_limited'\], got 'dropping'"
    ):
        parallel(mode="dropping")
    for factor in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"want a finite capacity_factor > 0, got {factor}; 1 drops"):
            parallel(mode="capacity", capacity_factor=factor)
    with pytest.raises(ValueError, match=r"want drop out of \['affinity', 'position'\], got 'random'"):
        parallel(mode="capacity", drop="random")
    with pytest.raises(ValueError, match=r"want dispatch out of \['auto', 'fp8'\], got 'bf16'"):
        parallel(dispatch="bf16")
    nodes = (Axis("expert", "1", 2, 0), Axis("expert", "2", 2, 1))
    for mode, given, got in (
        ("capacity", nodes, "'capacity' with$"),
        ("node_limited", None, "'node_limited' without$"),
    ):
        with pytest.raises(ValueError, match=f"want nodes with mode 'node_limited' and with no other, got {got}"):
            parallel(mode=mode, nodes=given)
    problem = "want the 4 processes of axis 'expert' node by node, got 2 nodes of 2, where process 2 is number 1"
    with pytest.raises(ValueError, match=problem):
        parallel(rank=2, mode="node_limited", nodes=nodes)
    problem = "want whole groups of experts on each of 2 nodes, .*, got n_group = 1; mode 'dropless' needs no groups"
    with pytest.raises(ValueError, match=problem):
        parallel(config=replace(TINY, n_group=1, topk_group=1), mode="node_limited", nodes=nodes)
    # what is of no effect is not looked at
    parallel(capacity_factor=0)


def test_capacity_is_the_mean_load_times_a_factor_rounded_up():
    def capacity(factor, tokens):
        layers = parallel(mode="capacity", capacity_factor=factor).model.layers
        return layers[1].mlp.exchange.capacity(tokens, 3)

    # of 8 experts, 3 a token; exact where 0.1 has no exact float
    assert [capacity(factor, 16) for factor in (1, 1.25, 0.1, 0.7, 2.6)] == [6, 8, 1, 5, 16]
    # no token chooses an expert twice
    assert [capacity(factor, 16) for factor in (3, 1e12)] == [16, 16]
    assert capacity(1, 0) == 0 and capacity(1, 1) == 1
