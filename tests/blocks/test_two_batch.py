"""A batch in two halves, against the batch in one, in one process; over several: test_expert_parallel.py."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils import parametrize
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.balance import SequenceBalance
from deepfuse.blocks.batch import Batch
from deepfuse.blocks.data_parallel import to_data_parallel
from deepfuse.blocks.two_batch import parts_of, weights_once
from deepfuse.runtime.losses import mtp_loss, next_token_loss
from tiny_checkpoint import TINY, model_of

LENGTHS = [5, 1, 3, 4, 2]
"""Of packed sequences: the first half has three of them."""
FIRST = sum(LENGTHS[:3])
T = sum(LENGTHS)
IDS = torch.arange(T) * 7 % TINY.vocab_size
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])
STARTS = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
"""Of float32: products of other shapes and sums half by half add up in another order, at most 64 terms of 6e-8 each."""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return model_of(TINY).train()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # of gradients, the largest number says how large the terms of its sums are
        atol = TOLERANCE["atol"] * max(float(value.abs().max()), 1.0)
        torch.testing.assert_close(
            found[name], value, rtol=TOLERANCE["rtol"], atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_results_and_gradients_are_those_of_the_whole_batch(model):
    weights = torch.randn(T, TINY.vocab_size, generator=torch.Generator().manual_seed(1))
    whole = model(IDS, POSITIONS, STARTS)
    halves = model(IDS, POSITIONS, STARTS, first_half=FIRST)
    torch.testing.assert_close(halves, whole, **TOLERANCE)
    assert_close(*(gradients(model, (logits * weights).sum()) for logits in (halves, whole)))


def test_each_half_is_its_sequences_alone(model):
    halves = model(IDS, POSITIONS, STARTS, first_half=FIRST)
    first = model(IDS[:FIRST], POSITIONS[:FIRST], STARTS[:4])
    second = model(IDS[FIRST:], POSITIONS[FIRST:], STARTS[3:] - FIRST)
    torch.testing.assert_close(halves, torch.cat((first, second)), **TOLERANCE)


@pytest.mark.parametrize(("sequences", "first", "lengths"), [(1, 4, (4, 0)), (2, 3, (3, 2)), (3, 6, (6, 1))])
def test_the_first_half_has_the_middle_sequence(sequences, first, lengths):
    ends = {1: [0, 4], 2: [0, 3, 5], 3: [0, 2, 6, 7]}[sequences]
    x = torch.arange(ends[-1])
    parts = parts_of(Batch(x, torch.tensor(ends, dtype=torch.int32), x, x, slots=x), first)
    assert [part.positions.tolist() for part in parts] == [list(range(first)), list(range(first, ends[-1]))]
    assert [part.slots.numel() for part in parts] == list(lengths)
    assert [int(part.q_start[-1]) for part in parts] == list(lengths)
    assert [len(part.q_start) - 1 for part in parts] == [(sequences + 1) // 2, sequences // 2]
    assert all(int(part.q_start[0]) == 0 and part.q_start.dtype == torch.int32 for part in parts)


def test_one_sequence_is_a_half_beside_an_empty_one(model):
    whole = model(IDS[:5], POSITIONS[:5], STARTS[:2])
    torch.testing.assert_close(model(IDS[:5], POSITIONS[:5], STARTS[:2], first_half=5), whole, **TOLERANCE)


def test_each_half_writes_its_rows_of_the_cache(model):
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(2))[:T] + 64
    written = []
    for first_half in (None, FIRST):
        caches = [torch.zeros(2, 64, TINY.cache_width) for _ in range(TINY.num_hidden_layers)]
        with torch.no_grad():
            model(IDS, POSITIONS, STARTS, slots=slots, caches=caches, first_half=first_half)
        written.append(caches)
    for whole, halves in zip(*written, strict=True):
        assert not whole[0].any() and int(whole[1].any(-1).sum()) == T
        torch.testing.assert_close(halves, whole, **TOLERANCE)


def test_a_decode_step_in_halves_reads_the_cache_of_its_sequences(model):
    B, table = 3, torch.tensor([[1], [2], [3]])
    caches = [torch.randn(4, 64, TINY.cache_width) for _ in range(TINY.num_hidden_layers)]
    lengths = torch.tensor([4, 9, 1])
    step = {"slots": torch.arange(1, 4) * 64 + lengths - 1, "block_table": table, "seqlens": lengths.int()}
    arguments = IDS[:B], lengths - 1, torch.arange(B + 1, dtype=torch.int32)
    with torch.no_grad():
        whole, halves = (
            model(*arguments, caches=[c.clone() for c in caches], **step, first_half=first) for first in (None, 2)
        )
    torch.testing.assert_close(halves, whole, **TOLERANCE)


@pytest.mark.parametrize("loss_of", [next_token_loss, mtp_loss])
@pytest.mark.parametrize("B", [1, 2, 3])
def test_losses_are_those_of_the_whole_batch(model, loss_of, B):
    L = 6
    tokens = torch.randint(TINY.vocab_size, (B, L + 2), generator=torch.Generator().manual_seed(3))
    batch = torch.arange(L).repeat(B), torch.arange(0, (B + 1) * L, L, dtype=torch.int32)
    whole, halves = (loss_of(model, tokens, *batch, in_halves) for in_halves in (False, True))
    torch.testing.assert_close(halves, whole, **TOLERANCE)
    found = gradients(model, halves)
    assert_close(found, gradients(model, whole))
    assert any(name.startswith("model.layers.3.") for name in found) == (loss_of is mtp_loss)
    if B == 1:
        assert torch.equal(halves, whole), "one sequence stays whole"


def test_the_balance_loss_of_a_step_counts_once(model):
    L, B = 6, 3
    tokens = torch.randint(TINY.vocab_size, (B, L + 2), generator=torch.Generator().manual_seed(3))
    batch = torch.arange(L).repeat(B), torch.arange(0, (B + 1) * L, L, dtype=torch.int32)
    router = model.model.layers[1].mlp.gate
    try:
        router.balance = SequenceBalance(10.0, L)
        wanted = gradients(model, next_token_loss(model, tokens, *batch))
        router.balance = SequenceBalance(10.0, L, sequences=B)
        assert_close(gradients(model, next_token_loss(model, tokens, *batch, True)), wanted)
    finally:
        router.balance = None
    assert not torch.allclose(
        gradients(model, next_token_loss(model, tokens, *batch))["model.layers.1.mlp.gate.weight"],
        wanted["model.layers.1.mlp.gate.weight"],
        rtol=1e-2,
    ), "it is there"


def test_a_weight_that_processes_share_is_gathered_once():
    class Counted(torch.nn.Module):
        calls = 0

        def forward(self, part):
            Counted.calls += 1
            return part * 2

    layer = torch.nn.Linear(3, 3, bias=False)
    parametrize.register_parametrization(layer, "weight", Counted(), unsafe=True)
    Counted.calls = 0
    x = torch.arange(4)
    whole = Batch(x, torch.tensor([0, 2, 4], dtype=torch.int32), x, x)
    for parts, calls in ((parts_of(whole, 2), 1), (parts_of(whole, None), 2)):
        with weights_once(parts):
            out = sum(layer(torch.ones(1, 3)).sum() for _ in range(2))
        assert Counted.calls == calls
        Counted.calls, layer.parametrizations.weight.original.grad = 0, None
        out.backward()
        assert torch.equal(layer.parametrizations.weight.original.grad, torch.full((3, 3), 4.0))


# of Dynamo, torch 2.11
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_over_data_a_graph_gathers_each_weight_once():
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = model_of(replace(TINY, num_hidden_layers=1, num_nextn_predict_layers=0)).train()
        parts = to_data_parallel(model, lambda name: Axis("data", "0", 2, 0))
        tokens, batch = torch.zeros(2, 6, dtype=torch.int64), (torch.arange(4).repeat(2), torch.tensor([0, 4, 8]).int())
        seen = []

        def backend(gm, inputs):
            seen.append(gm.graph)
            return gm

        loss = torch.compile(next_token_loss, fullgraph=True, backend=backend)
        loss(model, tokens, *batch, True)
        (graph,) = seen
        gathers = [n for n in graph.nodes if "Gather" in str(n.target) or "autograd_function_apply" in str(n.target)]
        assert len(gathers) == len(parts)
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()
