"""A rewritten graph beside the one before: differences are seen where they are made, and go no further."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.quantize import quantize
from deepfuse.ops.rms_norm import rms_norm
from deepfuse.passes.check_values import Rewritten, copied
from deepfuse.passes.lockstep import Recorded
from graphs import trace

E4M3 = torch.float8_e4m3fn

X, WEIGHT = torch.ones(4, 16), torch.ones(16)
BORDER = rms_norm(X, WEIGHT, 1.0)[:, :1]
"""What the norm gives: not more than itself, but less than the norm of anything larger."""


def far_apart(x: Tensor, weight: Tensor, border: Tensor) -> Tensor:
    """Ends in a choice: the least difference in the norm may turn its result."""
    y = rms_norm(x, weight, 1.0)
    return torch.where(y[:, :1] > border, 1e6, -1e6) * x


def rewritten(factor: float, kind: str = "reassociating") -> Rewritten:
    """The norm taken of a node of its own, of ``factor`` times x."""
    graph = trace(far_apart, X, WEIGHT, BORDER).graph
    before = copied(graph)
    norm = next(node for node in graph.nodes if node.target == rms_norm.overload)
    with graph.inserting_before(norm):
        scaled = graph.call_function(torch.ops.aten.mul.Tensor, (norm.args[0], factor))
        scaled.meta["val"] = norm.args[0].meta["val"]
        other = graph.call_function(rms_norm.overload, (scaled, *norm.args[1:]))
        other.meta["val"] = norm.meta["val"]
    norm.replace_all_uses_with(other)
    graph.erase_node(norm)
    return Rewritten("scale", kind, 1, before, copied(graph))  # type: ignore[arg-type]


def test_what_a_rounding_decides_is_no_difference() -> None:
    case = rewritten(1 + 2**-20)
    with torch.no_grad():
        assert (case.before(X, WEIGHT, BORDER) < 0).all() and (case.after(X, WEIGHT, BORDER) > 0).all()
    assert case.problem((X, WEIGHT, BORDER)) is None


def test_a_difference_is_named_where_it_is_made() -> None:
    # the norm itself is another node: its first reader is what both graphs have
    assert str(rewritten(1.5).problem((X, WEIGHT, BORDER))).startswith("slice_1: want errors up to")


def changed(fn: Any, change: Any, *args: Any, rewrites: int = 1) -> str | None:
    """What is said of a pass that did ``change`` to the graph of a function."""
    graph = trace(fn, *args).graph
    before = copied(graph)
    change(graph)
    return Rewritten("changed", "reassociating", rewrites, before, copied(graph)).problem(args)


def scale_norms(graph: fx.Graph, factor: float) -> None:
    """Let all readers of a norm read ``factor`` times its result."""
    for norm in [node for node in graph.nodes if node.target == rms_norm.overload]:
        with graph.inserting_after(norm):
            scaled = graph.call_function(torch.ops.aten.mul.Tensor, (norm, factor))
            scaled.meta["val"] = norm.meta["val"]
        norm.replace_all_uses_with(scaled, delete_user_cb=lambda user, scaled=scaled: user is not scaled)


@pytest.mark.parametrize("other", [float("inf"), float("nan")])
def test_an_infinity_of_the_other_sign_is_a_difference(other: float) -> None:
    def masked(x: Tensor, live: Tensor) -> Tensor:
        return torch.where(live, x.exp(), float("-inf")).exp()

    def turn(graph: fx.Graph) -> None:
        where = next(node for node in graph.nodes if node.target == torch.ops.aten.where.self)
        with graph.inserting_before(where):
            full = graph.call_function(torch.ops.aten.full_like.default, (where.args[1], other))
            full.meta["val"] = where.args[1].meta["val"]
        where.args = (*where.args[:2], full)

    live = torch.arange(16).expand(4, 16) < 5
    assert "want infinities and NaN where they were" in str(changed(masked, turn, X, live))
    # rows of nothing else have no largest number
    assert "want infinities and NaN where they were" in str(changed(masked, turn, X, live & False))


def test_many_rewrites_leave_no_more_room_to_each() -> None:
    def layers(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(70):
            x = dequantize(*quantize(rms_norm(x, weight, 1e-6) * 2, E4M3, 1, 128, False), 1, 128, torch.float32)
        return x

    assert "want errors up to" in str(
        changed(layers, partial(scale_norms, factor=0.0), torch.randn(2, 128), torch.ones(128), rewrites=70)
    )


def test_errors_of_one_sign_add_up_in_the_results() -> None:
    def stack(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(16):
            x = x + rms_norm(x, weight, 1e-6)
        return x

    x, weight = torch.ones(2, 16, dtype=torch.bfloat16), torch.full((16,), 0.02, dtype=torch.bfloat16)
    assert str(changed(stack, partial(scale_norms, factor=1.5), x, weight, rewrites=16)).startswith("result 0")


def test_weights_in_another_dtype_are_not_kept() -> None:
    gm = trace(lambda x, w: x.exp() @ w.float().t(), X, torch.ones(16, 16, dtype=torch.bfloat16))
    recorded = Recorded(gm)
    recorded.run(X, torch.ones(16, 16, dtype=torch.bfloat16))
    assert not any("to_copy" in name or "exp" in name for name in recorded.values) and recorded.values


def test_an_exact_pass_is_judged_by_its_results() -> None:
    assert "result 0" in str(rewritten(1 + 2**-20, "exact").problem((X, WEIGHT, BORDER)))


def test_memory_that_nothing_wrote_is_not_compared() -> None:
    def fill(x: Tensor) -> Tensor:
        return torch.empty_like(x).fill_(2.0) * x

    graph = trace(fill, X).graph
    assert Rewritten("nothing", "reassociating", 1, copied(graph), copied(graph)).problem((X,)) is None
