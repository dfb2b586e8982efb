"""A rewritten graph beside the one before: differences are seen where they are made, and go no further."""

import torch
from torch import Tensor

from deepfuse.ops.rms_norm import rms_norm
from deepfuse.passes.check_values import Rewritten, copied
from graphs import trace

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


def test_an_exact_pass_is_judged_by_its_results() -> None:
    assert "result 0" in str(rewritten(1 + 2**-20, "exact").problem((X, WEIGHT, BORDER)))


def test_memory_that_nothing_wrote_is_not_compared() -> None:
    def fill(x: Tensor) -> Tensor:
        return torch.empty_like(x).fill_(2.0) * x

    graph = trace(fill, X).graph
    assert Rewritten("nothing", "reassociating", 1, copied(graph), copied(graph)).problem((X,)) is None
