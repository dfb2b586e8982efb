"""Norm, rotation and cache write become one op, where and only where they should."""

import pytest
import torch

from deepfuse.ir.device import CPU
from deepfuse.ir.private import uncompiled_backend, with_own_code
from deepfuse.ir.verify import verify, verify_types
from deepfuse.ops.append_latent import PAGE_SIZE, append_latent
from deepfuse.ops.append_latent_fp8 import append_latent_fp8, row_bytes, unpacked_rows
from deepfuse.ops.norm_rope_append import norm_rope_append
from deepfuse.ops.rms_norm import rms_norm
from deepfuse.ops.rotary import rotary
from deepfuse.passes.fuse_rope_append import fuse_rope_append
from deepfuse.passes.journal import noting
from deepfuse.passes.pipeline import default
from deepfuse.passes.runner import Runner, op_counts
from graphs import structure
from tiny_model import tiny_model

SETTINGS = {"device": CPU, "providers": {}, "max_seq_len": 64}
T, C, R, EPS = 5, 16, 8, 1e-6
FUSED, NORM, TURN = (f"deepfuse.{name}.default" for name in ("norm_rope_append", "rms_norm", "rotary"))


def arguments(in_fp8=False, dtype=torch.float32):
    angle = torch.rand(T, R // 2)
    width, stored = (row_bytes(C, R), torch.uint8) if in_fp8 else (C + R, dtype)
    return (
        torch.zeros(3, PAGE_SIZE, width, dtype=stored),
        torch.randn(T, C + R, dtype=dtype),
        torch.randn(C, dtype=dtype),
        angle.cos(),
        angle.sin(),
        torch.randperm(2 * PAGE_SIZE)[:T] + PAGE_SIZE,
    )


def normed(x, weight):
    return rms_norm(x[:, :C], weight, EPS)


def turned(x, cos, sin):
    return rotary(x[:, C:].unsqueeze(1), cos, sin, True).squeeze(1)


def append(cache, *rest):
    (append_latent_fp8 if cache.dtype == torch.uint8 else append_latent)(cache, *rest)


def decode(cache, x, weight, cos, sin, slots):
    append(cache, normed(x, weight), turned(x, cos, sin), slots)
    return cache[1].clone()


def prefill(cache, x, weight, cos, sin, slots):
    latent, k_rope = normed(x, weight), turned(x, cos, sin)
    append(cache, latent, k_rope, slots)
    return latent.exp(), k_rope.sum(0)


def prefill_that_reads_the_latent(cache, x, weight, cos, sin, slots):
    latent = normed(x, weight)
    append(cache, latent, turned(x, cos, sin), slots)
    return latent.exp()


def fused(cache, x, weight, cos, sin, slots, keep):
    return norm_rope_append(cache, x[:, :C], x[:, C:], weight, cos, sin, slots, EPS, True, keep)


def decode_fused(cache, *rest):
    fused(cache, *rest, False)
    return cache[1].clone()


def prefill_fused(cache, *rest):
    latent, k_rope = fused(cache, *rest, True)
    return latent.exp(), k_rope.sum(0)


def rewritten(fn, *args, passes=(fuse_rope_append,)):
    """What ``fn`` gives once its joint graph was rewritten; that graph, the numbers of rewrites, and the notes."""
    graphs, counts, notes = [], [], []

    def run(hook, gm):
        if hook == "joint":
            with noting(notes):
                counts.extend(p.fn(gm.graph) for p in passes)
            gm.graph.eliminate_dead_code()
            verify(gm.graph)
            verify_types(gm.graph)
            graphs.append(gm)

    with torch.no_grad():
        compiled = torch.compile(with_own_code(fn), fullgraph=True, dynamic=False, backend=uncompiled_backend(run))
        result = compiled(*args)
    (gm,) = graphs
    return result, gm, counts, notes


@pytest.mark.parametrize("in_fp8", [False, True], ids=["numbers", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fn", [decode, prefill, prefill_that_reads_the_latent])
def test_one_op_does_the_same_bit_by_bit(fn, dtype, in_fp8):
    cache, *rest = arguments(in_fp8, dtype)
    ours, theirs = cache.clone(), cache.clone()
    result, gm, counts, notes = rewritten(fn, ours, *rest)
    assert counts == [1] and notes[0].endswith(": matched")
    assert op_counts(gm.graph)[NORM] == op_counts(gm.graph)[TURN] == 0
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.auto_functionalized_v2)
    assert node.args[0] is norm_rope_append.overload and node.kwargs["keep"] is (fn is not decode)
    torch.testing.assert_close(result, fn(theirs, *rest), atol=0, rtol=0)
    assert torch.equal(ours, theirs) and ours.any()


def inputs_by_use(gm):
    """Inputs in the order in which the graph reads them, as Dynamo puts them in that of the source."""
    read = [i for node in gm.graph.nodes for i in node.all_input_nodes if i.op == "placeholder"]
    for node in reversed(list(dict.fromkeys(read))):
        next(iter(gm.graph.nodes)).prepend(node)
    return gm


@pytest.mark.parametrize(("before", "after"), [(decode, decode_fused), (prefill, prefill_fused)])
def test_becomes_the_graph_that_says_so(before, after):
    _, actual, _, _ = rewritten(before, *arguments())
    _, expected, _, _ = rewritten(after, *arguments(), passes=())
    assert structure(inputs_by_use(actual)) == structure(inputs_by_use(expected))


def test_is_idempotent():
    _, _, counts, notes = rewritten(prefill, *arguments(), passes=(fuse_rope_append, fuse_rope_append))
    assert counts == [1, 0] and len(notes) == 1


def not_normed(cache, x, weight, cos, sin, slots):
    append_latent(cache, x[:, :C].exp(), turned(x, cos, sin), slots)


def not_turned(cache, x, weight, cos, sin, slots):
    append_latent(cache, normed(x, weight), x[:, C:].exp(), slots)


def of_two_heads(cache, x, weight, cos, sin, slots):
    two = rotary(x[:, C:].unflatten(1, (2, R // 2)), cos[:, : R // 4], sin[:, : R // 4], True)
    append_latent(cache, normed(x, weight), two.flatten(1), slots)


def read_in_another_shape(cache, x, weight, cos, sin, slots):
    k_rope = rotary(x[:, C:].unsqueeze(1), cos, sin, True)
    append_latent(cache, normed(x, weight), k_rope.squeeze(1), slots)
    return k_rope.exp()


def read_before(cache, x, weight, cos, sin, slots):
    latent = normed(x, weight)
    read = latent.exp()
    append_latent(cache, latent, turned(x, cos, sin), slots)
    return read


def into_a_view(cache, x, weight, cos, sin, slots):
    append_latent(cache[1:], normed(x, weight), turned(x, cos, sin), slots - PAGE_SIZE)


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (not_normed, "latent comes from exp, rule wants rms_norm"),
        (not_turned, "k_rope comes from exp, rule wants rotary"),
        (of_two_heads, "k_rope is of 2 heads, rule wants 1"),
        (read_in_another_shape, "rotary's result has 2 users: squeeze, exp"),
        (read_before, "latent is read before it is written, by exp"),
        (into_a_view, "the cache is a view of another tensor"),
    ],
)
def test_leaves_alone_what_is_something_else(fn, why):
    cache, *rest = arguments()
    ours, theirs = cache.clone(), cache.clone()
    result, _, counts, notes = rewritten(fn, ours, *rest)
    assert counts == [0] and len(notes) == 1 and notes[0].startswith("append_latent at ")
    assert notes[0].partition(": ")[2] == why
    torch.testing.assert_close(result, fn(theirs, *rest), atol=0, rtol=0)
    assert torch.equal(ours, theirs)


def test_leaves_a_latent_of_another_dtype_alone():
    cache, x, weight, *rest = arguments()

    def mixed(cache, x, weight, cos, sin, slots):
        append_latent(cache, rms_norm(x[:, :C].bfloat16(), weight, EPS), turned(x, cos, sin), slots)

    _, _, counts, notes = rewritten(mixed, cache, x, weight, *rest)
    assert counts == [0] and notes[0].endswith("are torch.bfloat16 and torch.float32, rule wants one dtype")


def test_every_write_of_a_model_is_fused():
    text = tiny_model().explain("fuse_rope_append")
    assert text.count("2 rewrites") == len(tiny_model().report.journal.graphs) == 4
    assert "append_latent at model.model.layers.0.self_attn: matched" in text
    assert "matched" in text and "rule wants" not in text


def test_runs_behind_absorption():
    names = default().names
    assert names.index("absorb_mla") < names.index("fuse_rope_append") < names.index("lower")


def emitted(fn, *args):
    from torch._inductor.utils import run_and_get_code

    options = Runner(default(), SETTINGS).options()
    with torch.no_grad():
        _, codes = run_and_get_code(torch.compile(with_own_code(fn), fullgraph=True, options=options), *args)
    return "".join(codes)


def copies_cache(code, cache):
    """Whether there is a second cache, or a loop over one."""
    return f"empty_strided_cpu({tuple(cache.shape)}" in code or f"({cache.numel()}L" in code


def by_kernel(cache, x, weight, cos, sin, slots):
    """An opaque call, like that of the kernel on CUDA."""
    write = torch.ops.deepfuse.norm_rope_append.torch
    latent, k_rope = write(cache, x[:, :C], x[:, C:], weight, cos, sin, slots, EPS, True, True)
    return latent.exp(), k_rope.sum(0)


def with_a_copy(cache, *rest):
    before = cache.clone()
    return before, prefill(cache, *rest)


@pytest.mark.compile
@pytest.mark.parametrize("in_fp8", [False, True], ids=["numbers", "fp8"])
def test_the_emitted_code_copies_no_cache(in_fp8):
    cache, *rest = arguments(in_fp8)
    for fn in (prefill, by_kernel):
        ours, theirs = cache.clone(), cache.clone()
        code = emitted(fn, ours, *rest)
        fn(theirs, *rest)
        if in_fp8:
            # the compiled norm sums in another order, so that a value may be the next one
            ours, theirs = (torch.cat(unpacked_rows(t, C, torch.float32), -1) for t in (ours, theirs))
            torch.testing.assert_close(ours, theirs, atol=2**-9, rtol=2**-3)
        else:
            torch.testing.assert_close(ours, theirs)
        assert theirs.any() and not copies_cache(code, cache), code
    assert copies_cache(emitted(with_a_copy, cache, *rest), cache)
