"""Every op goes to a provider; what an inlined reference computes stays what it was."""

from functools import partial

import pytest
import torch
from torch.utils import _pytree as pytree

import deepfuse.runtime.describe  # noqa: F401  defines every op
from deepfuse.ir.op import OPS
from deepfuse.ir.private import uncompiled_backend, with_own_code
from deepfuse.ir.tolerance import EXACT
from deepfuse.ops.add_rms_norm import add_rms_norm
from deepfuse.ops.append_latent import append_latent
from deepfuse.ops.linear import linear
from deepfuse.ops.mla_attention import mla_attention
from deepfuse.ops.rms_norm import rms_norm
from deepfuse.ops.swiglu import swiglu
from deepfuse.passes.journal import noting
from deepfuse.passes.lower import lower
from graphs import rewritten, trace

FUNCTIONAL = [op.name for op in OPS.values() if not op.mutates]


def lowered(fn, *args, providers=None):
    return rewritten(partial(lower, providers=providers or {}), fn, *args)


def targets(gm):
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_lowered_op_computes_what_the_op_does(name):
    op = OPS[name]
    for args in op.samples(torch.device("cpu"), torch.float32):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]

        def call(*given, args=args):
            left = iter(given)
            return op(*(next(left) if isinstance(a, torch.Tensor) else a for a in args))

        gm, count, _ = lowered(call, *tensors)
        assert count == 1 and f"deepfuse.{name}.default" not in targets(gm)
        for got, want in zip(pytree.tree_leaves(gm(*tensors)), pytree.tree_leaves(call(*tensors)), strict=True):
            assert got.dtype == want.dtype
            bounds = op.tolerance_for(got.dtype) if got.is_floating_point() else EXACT
            # float8 is compared bit by bit only
            got, want = (t.float() if t.itemsize == 1 else t for t in (got, want))
            torch.testing.assert_close(got, want, atol=bounds.atol, rtol=bounds.rtol, equal_nan=True)


def test_equal_calls_keep_their_own_inputs():
    # two projections of one shape, traced once: their values must not be taken for one another
    def gated(x, w1, w2):
        return swiglu(linear(x, w1, None), linear(x, w2, None))

    args = torch.randn(9, 8), torch.randn(6, 8), torch.randn(6, 8)
    gm, count, _ = lowered(gated, *args)
    assert count == 3
    torch.testing.assert_close(gm(*args), gated(*args))
    storages = [n.meta["val"].untyped_storage()._cdata for n in gm.graph.nodes if "mm" in str(n.target)]
    assert len(set(storages)) == 2, "two results share a storage: Inductor would take them for views of one another"


def test_two_outputs_go_to_their_users():
    def f(x, r, w):
        y, h = add_rms_norm(x, r, w, 1e-6)
        return h * 2 + y

    args = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    gm, _, _ = lowered(f, *args)
    torch.testing.assert_close(gm(*args), f(*args))


def test_an_opaque_provider_is_named_in_the_graph():
    args = tuple(next(iter(mla_attention.samples(torch.device("cpu"), torch.float32))))
    gm, _, notes = lowered(lambda *t: mla_attention(*t, args[-1])[0], *args[:-1])
    assert "deepfuse.mla_attention.torch" in targets(gm)
    assert notes == ["1 x mla_attention -> torch"]


def test_a_forced_provider_is_taken():
    args = torch.randn(1, 8), torch.randn(6, 8)
    gm, _, notes = lowered(lambda x, w: linear(x, w, None), *args, providers={"linear": "reference"})
    assert notes == ["1 x linear -> reference"] and any("mm" in t for t in targets(gm))
    _, _, notes = lowered(lambda x, w: linear(x, w, None), *args)
    assert notes == ["1 x linear -> matvec"]


def test_a_forced_provider_of_an_op_that_is_not_there_is_reported():
    args = torch.randn(2, 8), torch.randn(8)
    _, count, notes = lowered(lambda x, w: rms_norm(x, w, 1e-6), *args, providers={"linear": "reference"})
    assert count == 1
    assert notes[-1].startswith("0 x linear -> reference: the model has no linear here, or a pass before")


def test_a_forced_provider_that_cannot_serve_is_reported():
    args = torch.randn(50, 8), torch.randn(6, 8)
    _, _, notes = lowered(lambda x, w: linear(x, w, None), *args, providers={"linear": "matvec"})
    assert notes == ["1 x linear -> reference (matvec: rows are not 1 to 4)"]


def test_is_idempotent():
    gm, _, _ = lowered(lambda x, w: rms_norm(x, w, 1e-6), torch.randn(3, 8), torch.randn(8))
    assert lower(gm.graph, providers={}) == 0


def test_new_nodes_know_where_they_come_from():
    gm = trace(lambda x, w: rms_norm(x, w, 1e-6), torch.randn(3, 8), torch.randn(8))
    (node,) = gm.graph.find_nodes(op="call_function", target=rms_norm.overload)
    node.meta["nn_module_stack"] = {"a": ("L['self'].norm", torch.nn.Module)}
    lower(gm.graph, providers={})
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert calls and all("norm" in n.meta["nn_module_stack"]["a"][0] for n in calls)


def lowered_as_compiled(fn, *args):
    """What ``fn`` gives, lowered behind the hooks of the compiler, and the graph's targets."""
    seen, notes = [], []

    def run(hook, gm):
        if hook == "last":
            with noting(notes):
                lower(gm.graph, providers={})
            gm.graph.eliminate_dead_code()
            seen.extend(targets(gm))

    with torch.no_grad():
        result = torch.compile(with_own_code(fn), fullgraph=True, dynamic=False, backend=uncompiled_backend(run))(*args)
    return result, seen, notes


@pytest.mark.parametrize("name", [op.name for op in OPS.values() if op.mutates])
def test_an_op_that_mutates_becomes_what_it_means(name):
    op = OPS[name]
    for args in list(op.samples(torch.device("cpu"), torch.float32))[:2]:
        # of its arguments the op changes the first
        ours, theirs = args[0].clone(), args[0].clone()

        def step(cache, args=args):
            return op(cache, *args[1:]), cache.flatten(1)

        (returned, written), seen, notes = lowered_as_compiled(step, ours)
        expected = op(theirs, *args[1:])
        for got, want in zip(pytree.tree_leaves(returned), pytree.tree_leaves(expected), strict=True):
            assert got is want is None or torch.equal(got, want)
        assert torch.equal(ours, theirs) and torch.equal(written, theirs.flatten(1))
        assert "aten.index_put.default" in seen and not any("auto_functionalized" in t for t in seen)
        assert notes == [f"1 x {name} -> torch"]


def test_a_write_into_a_view_stays_as_it_is():
    _, latent, k_rope, slots = next(iter(append_latent.samples(torch.device("cpu"), torch.float32)))
    layers = torch.zeros(4, 2, 64, 24)
    expected = layers.clone()
    append_latent(expected[:, 1], latent, k_rope, slots)

    def step(layers):
        append_latent(layers[:, 1], latent, k_rope, slots)
        return layers.sum()

    total, seen, notes = lowered_as_compiled(step, layers)
    assert torch.equal(layers, expected) and torch.equal(total, expected.sum())
    assert "auto_functionalized_v2" in seen
    assert notes == ["1 x append_latent: stays: it changes a view of another tensor"]
