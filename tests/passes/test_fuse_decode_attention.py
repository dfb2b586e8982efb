"""What stands around absorbed attention goes into its kernels, on a GPU, where and only where it should."""

import pytest
import torch

from deepfuse.ir.device import CPU, H100, H200, measured_cpu
from deepfuse.ir.verify import verify, verify_types
from deepfuse.ops.absorb_query import absorb_query
from deepfuse.ops.absorbed_weight import sample_weight
from deepfuse.ops.append_latent_fp8 import packed_rows
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.head_matmul import head_matmul
from deepfuse.ops.mla_decode import mla_decode
from deepfuse.ops.mla_decode_fp8 import mla_decode_fp8
from deepfuse.ops.mla_decode_project import mla_decode_project
from deepfuse.ops.quantize import quantize
from deepfuse.ops.rotary import rotary
from deepfuse.passes.fuse_decode_attention import fuse_decode_attention
from deepfuse.passes.pipeline import default
from deepfuse.passes.runner import op_counts
from fake_graphs import preset
from fake_graphs import rewritten as rewritten_preset
from graphs import assert_same_graph, rewritten, trace

B, H, N, R, C, PAGES = 3, 2, 24, 8, 32, 2
SCALE = (N + R) ** -0.5
E4M3 = torch.float8_e4m3fn
MATCHED = ["matched", "matched"]


def on_a_gpu(graph):
    return fuse_decode_attention(graph, device=H200)


def arguments(V, weight="numbers", cache="numbers", dtype=torch.float32):
    """Of the functions below: query, rotation, ``kv_b_proj`` and its scales, and the cache."""
    q_nope, q_rope = torch.randn(B, H, N + R, dtype=dtype).split([N, R], -1)
    angle = torch.rand(B, R // 2) * 6
    rows = torch.randn(B * PAGES + 1, 64, C + R, dtype=dtype)
    if cache == "fp8":
        rows = packed_rows(*rows.flatten(0, 1).split([C, R], -1)).unflatten(0, rows.shape[:2])
    pages = torch.arange(1, B * PAGES + 1).reshape(B, PAGES)
    seqlens = torch.tensor([70, 5, 0], dtype=torch.int32)
    kv_b = sample_weight(H, N + V, C, weight, q_nope.device, dtype)
    return q_nope, q_rope, angle.cos(), angle.sin(), *kv_b, rows, pages, seqlens


def matrices(weight, scale, dtype):
    """What ``absorb_mla`` writes for W^UK and W^UV."""
    if scale is not None:
        weight = dequantize(weight, scale, 128, 128, dtype)
    heads = weight.view(H, weight.shape[0] // H, C)
    return heads[:, :N], heads[:, N : heads.shape[1]].permute(0, 2, 1)


def decode(q_latent, q_rope, cache, *rest):
    return (mla_decode_fp8 if cache.dtype == torch.uint8 else mla_decode)(q_latent, q_rope, cache, *rest, SCALE)


def step(q_nope, q_rope, cos, sin, weight, scale, *cached):
    w_uk, w_uv = matrices(weight, scale, q_nope.dtype)
    mixed = decode(head_matmul(q_nope, w_uk), rotary(q_rope, cos, sin, True), *cached)
    return head_matmul(mixed, w_uv).view(B, -1)


def step_fused(q_nope, q_rope, cos, sin, weight, scale, *cached):
    query = absorb_query(q_nope, q_rope, cos, sin, True, weight, scale)
    V = weight.shape[0] // H - N
    return mla_decode_project(*query, *cached, SCALE, weight, scale, V, None, False, True)[0].view(B, -1)


def quantized_step(*args):
    return quantize(step(*args), E4M3, 1, 128, False)


def quantized_step_fused(q_nope, q_rope, cos, sin, weight, scale, *cached):
    query = absorb_query(q_nope, q_rope, cos, sin, True, weight, scale)
    V = weight.shape[0] // H - N
    return mla_decode_project(*query, *cached, SCALE, weight, scale, V, E4M3, False, False)[1:]


def kept_step(*args):
    y = step(*args)
    return y.exp(), *quantize(y, E4M3, 1, 128, True)


def kept_step_fused(q_nope, q_rope, cos, sin, weight, scale, *cached):
    query = absorb_query(q_nope, q_rope, cos, sin, True, weight, scale)
    V = weight.shape[0] // H - N
    y, *quantized = mla_decode_project(*query, *cached, SCALE, weight, scale, V, E4M3, True, True)
    return y.view(B, -1).exp(), *quantized


STEPS = [(step, step_fused, 40), (quantized_step, quantized_step_fused, 128), (kept_step, kept_step_fused, 256)]


def verdicts(notes):
    return [note.partition(": ")[2] for note in notes]


def numbers(results):
    """Results without FP8, whose comparison is bit by bit."""
    leaves = torch.utils._pytree.tree_leaves(results)
    return [t.float() if t.is_floating_point() else t for t in leaves]


@pytest.mark.parametrize("cache", ["numbers", "fp8"])
@pytest.mark.parametrize("weight", ["numbers", "fp8", "powers of two"])
@pytest.mark.parametrize(("before", "after", "V"), STEPS)
def test_becomes_the_graph_that_says_so(before, after, V, weight, cache):
    args = arguments(V, weight, cache)
    gm, count, notes = rewritten(on_a_gpu, before, *args)
    assert count == 2 and verdicts(notes) == MATCHED
    verify(gm.graph)
    verify_types(gm.graph)
    assert_same_graph(gm, trace(after, *args))
    # on a CPU all run as references, and these say the same things in the same order
    for actual, expected in zip(numbers(gm(*args)), numbers(before(*args)), strict=True):
        torch.testing.assert_close(actual, expected, atol=0, rtol=0)


@pytest.mark.parametrize("before", [step, quantized_step, kept_step])
def test_is_idempotent(before):
    counts = []

    def twice(graph):
        counts.extend((on_a_gpu(graph), on_a_gpu(graph)))
        return sum(counts)

    _, _, notes = rewritten(twice, before, *arguments(128))
    assert counts == [2, 0] and notes[-1] == "nothing to do: the graph has no absorbed attention"


def test_on_a_cpu_the_ops_stay_apart():
    for device in (CPU, measured_cpu(seconds=0.0)):
        gm, count, notes = rewritten(
            lambda graph, d=device: fuse_decode_attention(graph, device=d), step, *arguments(40)
        )
        assert count == 0 and notes == ["nothing to do: on a CPU the ops stay apart"]
        assert op_counts(gm.graph)["deepfuse.head_matmul.default"] == 2
    assert rewritten(lambda graph: fuse_decode_attention(graph, device=H100), step, *arguments(40))[1] == 2


def test_heads_that_share_a_block_of_the_quantize_are_not_quantized():
    args = arguments(64)
    gm, count, _ = rewritten(on_a_gpu, quantized_step, *args)
    assert count == 2 and op_counts(gm.graph)["deepfuse.quantize.default"] == 1
    (node,) = gm.graph.find_nodes(op="call_function", target=mla_decode_project.overload)
    assert node.args[-3:] == (None, False, True)


@pytest.mark.parametrize(("rows", "cols"), [(128, 1), (128, 128), (0, 0)])
def test_a_quantize_in_other_blocks_stays(rows, cols):
    def by_columns(*args):
        return quantize(step(*args), E4M3, rows, cols, False)

    gm, count, _ = rewritten(on_a_gpu, by_columns, *arguments(128))
    assert count == 2 and op_counts(gm.graph)["deepfuse.quantize.default"] == 1


def test_a_quantize_of_the_heads_in_another_shape_stays():
    def by_heads(*args):
        return quantize(step(*args).view(B * H, -1), E4M3, 1, 128, False)

    gm, count, _ = rewritten(on_a_gpu, by_heads, *arguments(128))
    assert count == 2 and op_counts(gm.graph)["deepfuse.quantize.default"] == 1


def test_a_weight_dequantized_from_other_blocks_is_a_weight_of_numbers():
    def scaled_whole(q_nope, q_rope, cos, sin, weight, scale, *cached):
        return step(q_nope, q_rope, cos, sin, dequantize(weight, scale, 0, 0, q_nope.dtype), None, *cached)

    args = list(arguments(40))
    args[4:6] = quantize(args[4], E4M3, 0, 0, False)
    gm, count, _ = rewritten(on_a_gpu, scaled_whole, *args)
    assert count == 2 and op_counts(gm.graph)["deepfuse.dequantize.default"] == 1
    torch.testing.assert_close(gm(*args), scaled_whole(*args), atol=0, rtol=0)


def with_another_query(q_nope, q_rope, cos, sin, weight, scale, *cached):
    _, w_uv = matrices(weight, scale, q_nope.dtype)
    q_latent = q_nope.repeat(1, 1, 2)[..., :C].contiguous()
    return head_matmul(decode(q_latent, rotary(q_rope, cos, sin, True), *cached), w_uv)


def without_rotation(q_nope, q_rope, cos, sin, weight, scale, *cached):
    w_uk, w_uv = matrices(weight, scale, q_nope.dtype)
    return head_matmul(decode(head_matmul(q_nope, w_uk), q_rope * cos[0, 0], *cached), w_uv), sin.exp()


def read_before(q_nope, q_rope, cos, sin, weight, scale, *cached):
    w_uk, w_uv = matrices(weight, scale, q_nope.dtype)
    turned = rotary(q_rope, cos, sin, True)
    read = turned.exp()
    return head_matmul(decode(head_matmul(q_nope, w_uk), turned, *cached), w_uv), read


def by_the_last_rows(q_nope, q_rope, cos, sin, weight, scale, *cached):
    _, w_uv = matrices(weight, scale, q_nope.dtype)
    w_uk = weight.view(H, -1, C)[:, -N : weight.shape[0] // H]
    return head_matmul(decode(head_matmul(q_nope, w_uk), rotary(q_rope, cos, sin, True), *cached), w_uv)


def mix_read_too(q_nope, q_rope, cos, sin, weight, scale, *cached):
    w_uk, w_uv = matrices(weight, scale, q_nope.dtype)
    mixed = decode(head_matmul(q_nope, w_uk), rotary(q_rope, cos, sin, True), *cached)
    return head_matmul(mixed, w_uv), mixed.exp()


def mix_not_multiplied(q_nope, q_rope, cos, sin, weight, scale, *cached):
    w_uk, _ = matrices(weight, scale, q_nope.dtype)
    return decode(head_matmul(q_nope, w_uk), rotary(q_rope, cos, sin, True), *cached).exp()


def by_fewer_rows(q_nope, q_rope, cos, sin, weight, scale, *cached):
    w_uk, _ = matrices(weight, scale, q_nope.dtype)
    mixed = decode(head_matmul(q_nope, w_uk), rotary(q_rope, cos, sin, True), *cached)
    heads = weight.view(H, -1, C)
    return head_matmul(mixed, heads[:, N : heads.shape[1] - 1].permute(0, 2, 1))


def by_a_matrix_of_its_own(q_nope, q_rope, cos, sin, weight, scale, *cached):
    w_uk, w_uv = matrices(weight, scale, q_nope.dtype)
    mixed = decode(head_matmul(q_nope, w_uk), rotary(q_rope, cos, sin, True), *cached)
    return head_matmul(mixed, w_uv.exp())


NOT_FIRST = "the query's matrix is not the first rows of each head of a weight"
NOT_LAST = "the values' matrix is not the last rows of each head of a weight"


@pytest.mark.parametrize(
    ("fn", "query", "projected"),
    [
        (with_another_query, "q_latent comes from clone, rule wants head_matmul", "matched"),
        (without_rotation, "q_rope comes from mul, rule wants rotary", "matched"),
        (read_before, "q_rope is read before the attention, by exp", "matched"),
        (by_the_last_rows, NOT_FIRST, "matched"),
        (mix_read_too, "matched", "the mix is read by head_matmul, exp, rule wants head_matmul alone"),
        (mix_not_multiplied, "matched", "the mix is read by exp, rule wants head_matmul alone"),
        (by_fewer_rows, "matched", NOT_LAST),
        (by_a_matrix_of_its_own, "matched", NOT_LAST),
    ],
)
def test_leaves_alone_what_is_something_else(fn, query, projected):
    args = arguments(40)
    gm, count, notes = rewritten(on_a_gpu, fn, *args)
    assert verdicts(notes) == [query, projected] and count == 1
    assert notes[0].startswith("query of mla_decode at ") and notes[1].startswith("values of mla_decode at ")
    for actual, expected in zip(numbers(gm(*args)), numbers(fn(*args)), strict=True):
        torch.testing.assert_close(actual, expected, atol=0, rtol=0)


def test_leaves_alone_what_no_kernel_takes():
    args = arguments(40, dtype=torch.float64)
    _, count, notes = rewritten(on_a_gpu, step, *args)
    assert count == 0 and verdicts(notes) == [
        "the kernel of absorb_query refuses: computes in float32 at most",
        "the kernel of mla_decode_project refuses: computes in float32 at most",
    ]


@pytest.mark.parametrize("name", ["v2-lite", "kimi-k2"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bfloat16", "fp8"])
def test_every_layer_of_other_presets_is_fused(name, fp8):
    entry = rewritten_preset(preset(name, 2), "decode", torch.bfloat16, fp8=fp8)
    (fused,) = (p for p in entry.passes if p.name == "fuse_decode_attention")
    assert fused.rewrites == 4 and verdicts(fused.notes) == MATCHED * 2
    last = entry.snapshots["after:fuse_rope_append"]
    # the cos and sin of rotary's q; dequantize, of kv_b_proj only; o_proj's quantize
    for gone in (
        "deepfuse.rotary",
        "deepfuse.head_matmul",
        "deepfuse.dequantize",
        "deepfuse.quantize",
        "deepfuse.mla_decode.default",
    ):
        assert gone not in last
    assert last.count("deepfuse.mla_decode_project.default(") == 2


def test_runs_behind_what_shares_quantizes():
    names = default().names
    assert names.index("absorb_mla") < names.index("share_quantize") < names.index("fuse_decode_attention")
