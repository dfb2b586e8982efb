"""A shared expert becomes one of the routed experts: the same values, in every precision, and only where it may."""

import operator
from dataclasses import replace

import pytest
import torch

from deepfuse.blocks.fp8 import to_fp8
from deepfuse.blocks.linear import Linear
from deepfuse.blocks.moe import MoE
from deepfuse.ir.device import CPU, H200
from deepfuse.ir.private import with_own_code
from deepfuse.ops.expert_permute import expert_permute
from deepfuse.ops.expert_unpermute import expert_unpermute
from deepfuse.ops.grouped_matmul import grouped_matmul
from deepfuse.ops.linear import linear
from deepfuse.ops.route import route
from deepfuse.ops.swiglu import swiglu
from deepfuse.passes.check_values import Rewritten, copied
from deepfuse.passes.journal import noting
from deepfuse.passes.merge_shared_expert import FEW_TOKENS, merge_shared_expert
from deepfuse.passes.pipeline import default
from deepfuse.passes.runner import Runner
from deepfuse.runtime.weight_layout import lay_side_by_side, layout_key
from graphs import assert_same_graph, trace
from tiny_checkpoint import TINY

WIDTH = 128
CONFIG = replace(TINY, hidden_size=160, moe_intermediate_size=WIDTH)
D, E, K = CONFIG.hidden_size, CONFIG.n_routed_experts, CONFIG.num_experts_per_tok
LAST = "after:fuse_quantized_wgrad"


def block_of(config=CONFIG, dtype=torch.float32, form="plain", laid=True):
    """A block with random weights, in the precision ``form`` says, laid out as the pass wants it."""
    block = MoE(config).eval().requires_grad_(False)
    for tensor in block.state_dict().values():
        tensor.normal_(std=tensor.shape[-1] ** -0.5)
    for parameter in block.parameters():
        parameter.data = parameter.data.to(dtype)
    if form != "plain":
        to_fp8(block, activations=form == "fp8", wanted=lambda name: form != "experts in fp8" or name == "experts")
    if laid:
        lay_side_by_side(block, with_experts=True)
    return block


def compiled(block, device=H200, layout=None, pipeline=None):
    """The block through the passes, each of which is checked for its values; and its runner."""
    known = {"device": device, "layout": layout_key(block) if layout is None else layout}
    settings = {"providers": {}, "max_seq_len": 64, **known}
    runner = Runner(pipeline or default(), settings, strict=True, verify=True)
    return torch.compile(with_own_code(block.forward), fullgraph=True, dynamic=False, backend=runner.backend()), runner


def run(block, x, **options):
    """The result, and what the pass said of each site, without where it is."""
    fn, runner = compiled(block, **options)
    with torch.no_grad():
        y = fn(x)
    (graph,) = runner.journal.graphs
    notes = [note for p in graph.passes if p.name == "merge_shared_expert" for note in p.notes]
    return y, [note.partition(": ")[2] for note in notes], graph.snapshots


def calls(text):
    """How often each of our ops stands in a graph."""
    names = [
        line.split("torch.ops.deepfuse.")[1].split(".")[0] for line in text.splitlines() if "ops.deepfuse." in line
    ]
    return {name: names.count(name) for name in names}


BOTH = {"route": 1, "expert_unpermute": 1}
"""Of every merged graph."""
ROUTER = {torch.float32: {"linear": 1}, torch.bfloat16: {"router_logits": 1}}
OPS = {
    "plain": BOTH | {"expert_permute": 1, "grouped_matmul": 2, "swiglu": 1},
    "fp8": BOTH | {"permute_quantize": 1, "fp8_grouped_matmul": 2, "swiglu_quantize": 1},
    "fp8_weights": BOTH | {"expert_permute": 1, "grouped_matmul": 2, "dequantize": 2, "swiglu": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", OPS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_merged_gives_what_the_two_gave(dtype, form, tokens):
    block = block_of(dtype=dtype, form=form)
    x = torch.randn(tokens, D).to(dtype)
    y, notes, snapshots = run(block, x)
    expected = OPS[form] | ROUTER[dtype]
    assert notes == ["merged"] and calls(snapshots[LAST]) == expected
    apart, _, other = run(block, x, pipeline=default().without("merge_shared_expert"))
    assert sum(calls(other[LAST]).values()) > sum(expected.values())
    # float32: sums of 160 products in another order; bfloat16: 8 bits, and a rounding less, in front of the sum; FP8: a last
    # place may decide which way one of the 128 terms of a sum is rounded, by an eighth of it at most
    tolerance = 1e-5 if dtype == torch.float32 and form != "fp8" else 2**-7
    torch.testing.assert_close(y, apart, atol=tolerance * float(apart.abs().max()), rtol=0.0)


def test_in_fp8_the_shared_expert_multiplies_the_numbers_it_multiplied():
    # without a contribution of the routed experts nothing is left to hide a difference
    block = block_of(form="fp8")
    for parameter in (block.experts.gate_up_proj_scale_inv, block.experts.down_proj_scale_inv):
        parameter.zero_()
    x = torch.randn(5, D)
    y, notes, _ = run(block, x)
    apart, _, _ = run(block, x, pipeline=default().without("merge_shared_expert"))
    assert notes == ["merged"] and y.abs().max() > 0
    # float32 sums of blocks of 128 in another order
    torch.testing.assert_close(y, apart, atol=1e-5 * float(apart.abs().max()), rtol=0.0)


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_weights_written_in_place_later_are_seen(name):
    block = block_of()
    fn, _ = compiled(block)
    x = torch.randn(3, D)
    with torch.no_grad():
        before = fn(x)
        getattr(block.shared_experts, name).weight.mul_(-2)
        after = fn(x)
        torch.testing.assert_close(after, block(x), atol=1e-5 * float(after.abs().max()), rtol=0.0)
    assert (after - before).abs().max() > 0.1 * before.abs().max()


def beside():
    """Weights of experts, and of a shared one behind them."""
    up, down = torch.randn((E + 1) * 2 * WIDTH, D), torch.randn((E + 1) * D, WIDTH)
    gate_up, gate, up = up.split([E * 2 * WIDTH, WIDTH, WIDTH])
    down, own = down.split([E * D, D])
    return gate_up.view(E, -1, D), gate, up, down.view(E, D, -1), own


def before(x, logits, gate_up, gate, up, down, own, at=None, to=None):
    """``at``: the step whose operand is ``to(operand)``."""

    def step(name, value):
        return to(value) if name == at else value

    weights, experts = route(logits, None, "sigmoid", "max", 1, 1, K, True, 2.5, step("shared", 0))
    rows, order, inverse, offsets = expert_permute(x, step("experts", experts), E)
    halves = grouped_matmul(step("rows", rows), gate_up, offsets).chunk(2, -1)
    y = grouped_matmul(swiglu(*step("halves", halves)), down, step("groups", offsets))
    first, second = step("order", (gate, up))
    gated = linear(step("x", x), step("weight", first), gate[:, 0] if at == "bias" else None)
    shared = step("own", linear(swiglu(gated, linear(x, second, None)), own, None))
    total = step("sum", operator.add)(
        expert_unpermute(y, order, step("inverse", inverse), step("weights", weights)), shared
    )
    return (total, offsets) if at == "offsets" else total


def after(x, logits, gate_up, gate, up, down, own):
    weights, experts = route(logits, None, "sigmoid", "max", 1, 1, K, True, 2.5, 1)
    rows, order, inverse, offsets = expert_permute(x, experts, E + 1)
    gate_up = torch.as_strided(gate_up, [E + 1, 2 * WIDTH, D], [2 * WIDTH * D, D, 1], 0)
    both = grouped_matmul(rows, gate_up, offsets)
    mixed = swiglu(both[:, :WIDTH], both[:, WIDTH : 2 * WIDTH])
    down = torch.as_strided(down, [E + 1, D, WIDTH], [D * WIDTH, WIDTH, 1], 0)
    return expert_unpermute(grouped_matmul(mixed, down, offsets), order, inverse, weights)


def merged(fn, *args):
    gm, notes = trace(fn, *args), []
    original = copied(gm.graph)
    with noting(notes):
        count = merge_shared_expert(gm.graph, device=H200, layout="as they are")
    if count:
        rewritten = copied(gm.graph)
        assert Rewritten("merge_shared_expert", "reassociating", count, original, rewritten).problem(args) is None
    return gm, count, notes


def test_before_becomes_expected():
    args = torch.randn(3, D), torch.randn(3, E), *beside()
    gm, count, notes = merged(changed(None, None), *args)
    assert (count, notes) == (1, ["expert_unpermute at expert_unpermute: merged"])
    assert_same_graph(gm, trace(lambda *args: after(*args), *args))
    # what is merged is added to nothing
    assert merge_shared_expert(gm.graph, device=H200, layout="as they are") == 0


def changed(at, to):
    return lambda *args: before(*args, at, to)


def test_the_routed_part_may_be_the_second_of_the_sum():
    swapped = changed("sum", lambda add: lambda routed, shared: add(shared, routed))
    assert merged(swapped, torch.randn(3, D), torch.randn(3, E), *beside())[1] == 1


def other():
    """Another sort of as many rows."""
    return expert_permute(torch.zeros(3, D), torch.arange(3 * K).view(3, K) % E, E)


@pytest.mark.parametrize(
    ("at", "to", "reason"),
    [
        ("x", lambda x: x + 1, "the shared expert reads another input than the routed ones"),
        ("rows", lambda rows: rows + 1, "add stands where getitem does"),
        ("halves", lambda halves: halves[::-1], "gate and up of the routed experts are no halves of one product"),
        ("order", lambda weights: weights[::-1], "its weights do not lie behind the experts'"),
        ("weight", lambda gate: gate * 2, "its weight is computed"),
        ("bias", None, "a product of the shared expert has a bias"),
        ("own", lambda y: y * 2, "mul stands where linear does"),
        ("sum", lambda add: operator.mul, "its result is not added to that of a shared expert"),
        ("weights", lambda weights: weights * 2, "mul stands where getitem does"),
        ("offsets", None, "the result of getitem is read by output too"),
        ("shared", lambda shared: 1, "do not come from one router without shared experts"),
        ("groups", lambda offsets: offsets + 0, "add stands where getitem does"),
        ("inverse", lambda inverse: other()[2], "order or offsets are not those of the sorted rows"),
        ("groups", lambda offsets: other()[3], "order or offsets are not those of the sorted rows"),
        ("experts", lambda experts: experts % 3, "remainder stands where getitem does"),
    ],
)
def test_what_stays_apart_and_why(at, to, reason):
    _, count, notes = merged(changed(at, to), torch.randn(3, D), torch.randn(3, E), *beside())
    assert count == 0 and reason in notes[0], notes


STACKED = replace(CONFIG, n_shared_experts=2)
PADDED = replace(CONFIG, moe_intermediate_size=24)
APART = {
    "cpu": ({}, {"device": CPU}, "on a CPU launches are not what takes the time"),
    "unknown layout": ({}, {"layout": ""}, "nobody says that the weights lie side by side at every call"),
    "not laid": ({"laid": False}, {"layout": "as they are"}, "each has memory of its own"),
    "two shared": ({"config": STACKED}, {}, "it is 256 wide, an expert 128: several experts in one do not lie as experts do"),
    "padded": ({"config": PADDED, "form": "fp8"}, {"layout": "as they are"}, "24 rows of gate are filled up to 128, blocks of 128, its own are not"),
    "mixed": ({"form": "experts in fp8"}, {"layout": "as they are"}, "shared and routed experts compute in different precision"),
}  # fmt: skip


@pytest.mark.parametrize("why", APART)
def test_blocks_whose_shared_expert_stays_apart(why):
    made, options, reason = APART[why]
    block = block_of(**made)
    x = torch.randn(3, D)
    y, notes, _ = run(block, x, **options)
    assert [note.partition(": ")[0] for note in notes] == ["apart"] and reason in notes[0], notes
    torch.testing.assert_close(y, block(x), atol=1e-5 * float(y.abs().max()), rtol=0.0)


@pytest.mark.parametrize(("tokens", "expected"), [(FEW_TOKENS, True), (FEW_TOKENS + 1, False)])
def test_many_tokens_have_a_product_of_their_own(tokens, expected):
    _, notes, snapshots = run(block_of(), torch.randn(tokens, D))
    assert (notes == ["merged"]) is expected
    # gate and up are one product all the same, read through the experts' weights
    assert calls(snapshots[LAST])["linear"] == (1 if expected else 3)


def test_a_number_of_tokens_that_is_not_known_counts_as_many():
    block = block_of()
    fn, runner = compiled(block)
    x = torch.randn(5, D)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    with torch.no_grad():
        torch.testing.assert_close(fn(x), block(x), atol=1e-4, rtol=1e-5)
    assert "tokens are not known to be at most 64" in runner.journal.explain("merge_shared_expert")


def test_never_where_the_load_of_experts_is_counted():
    block = block_of().train()
    _, notes, _ = run(block, torch.randn(3, D))
    assert "is read by" in notes[0] and block.gate.tokens_per_expert.sum() == 3 * K


def test_never_where_a_gradient_is_wanted():
    block = block_of().requires_grad_(True)
    fn, runner = compiled(block)
    fn(torch.randn(3, D)).sum().backward()
    assert block.shared_experts.gate_proj.weight.grad.abs().sum() > 0
    assert "apart: the result of" in runner.journal.explain("merge_shared_expert")


def test_a_bias_of_the_shared_expert_is_not_lost():
    block = block_of()
    gate = block.shared_experts.gate_proj
    block.shared_experts.gate_proj = Linear(D, WIDTH, bias=True).requires_grad_(False)
    block.shared_experts.gate_proj.weight.data = gate.weight.data
    block.shared_experts.gate_proj.bias.fill_(1.0)
    x = torch.randn(3, D)
    y, notes, _ = run(block, x)
    assert notes == ["apart: a product of the shared expert has a bias"]
    torch.testing.assert_close(y, block(x), atol=1e-5 * float(y.abs().max()), rtol=0.0)


def test_a_block_without_shared_experts_is_left_alone():
    _, notes, _ = run(block_of(replace(CONFIG, n_shared_experts=0)), torch.randn(3, D), layout="as they are")
    assert notes == ["apart: its result is not added to that of a shared expert"]
