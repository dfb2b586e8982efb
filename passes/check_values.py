"""Compare a graph's values before and after a pass, on real inputs.

An exact pass must give the same bits. A reassociating one may differ by ``atol + rtol * max |expected|`` of the narrowest
dtype computed in, for each result: a difference made early goes through the rest of the graph, so that it is judged
against the whole result. Rewrites err independently: n of them by sqrt(n) times as much. Where the graph rounds to FP8, a
last place before the rounding may decide which way it goes, by up to half a unit of the 4-bit significand each way: a
16th; terms of a sum err independently, so that the sum errs by no larger share of its size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from deepfuse.ir.tolerance import DEFAULT_TOLERANCE, Tolerance
from deepfuse.passes.record import Kind

_leaves = torch.utils._pytree.tree_leaves
TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    **DEFAULT_TOLERANCE,
    torch.float8_e4m3fn: Tolerance(atol=1e-3, rtol=2**-4),
    torch.float8_e5m2: Tolerance(atol=1e-3, rtol=2**-3),
}


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A graph before and after a pass; both are copies."""

    name: str
    kind: Kind
    rewrites: int
    before: fx.GraphModule
    after: fx.GraphModule

    def problem(self, inputs: Sequence[Any]) -> str | None:
        """How results, or what is written to inputs, differ; ``None`` where they do not."""
        want, got = _run(self.before, inputs), _run(self.after, inputs)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            if isinstance(b, Tensor):
                problem = self._difference(a, b)
                if problem:
                    return f"result {i} of {len(want)}: {problem}"
        return None

    def _difference(self, got: Tensor, want: Tensor) -> str | None:
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"want {want.dtype} {list(want.shape)}, got {got.dtype} {list(got.shape)}"
        if torch.equal(_bits(got), _bits(want)):
            return None
        if self.kind == "exact" or not want.is_floating_point():
            return f"want the same bits, got {int((_bits(got) != _bits(want)).sum())} that differ"
        got, want = got.double(), want.double()
        if not torch.equal(got.isfinite(), want.isfinite()):
            return "want infinities and NaN where they were, got others"
        finite = want.isfinite()
        error, size = (got - want)[finite].abs().max().item(), want[finite].abs().max().item()
        tolerance = widest_tolerance(self.before.graph)
        bound = (tolerance.atol + tolerance.rtol * size) * math.sqrt(max(self.rewrites, 1))
        return None if error <= bound else f"want errors up to {bound:.2e}, got {error:.2e} (values up to {size:.2e})"


def copied(graph: fx.Graph) -> fx.GraphModule:
    """A graph of its own, to be run later."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return fx.GraphModule(torch.nn.Module(), copy)


def widest_tolerance(graph: fx.Graph) -> Tolerance:
    """That of the dtypes the graph computes in or rounds to."""
    # inputs are as they are: only what is rounded in the graph may be rounded otherwise
    results = (value for node in graph.nodes if node.op == "call_function" for value in _leaves(node.meta.get("val")))
    dtypes = {v.dtype for v in results if isinstance(v, Tensor)} & TOLERANCES.keys()
    return max((TOLERANCES[dtype] for dtype in dtypes), key=lambda t: t.rtol, default=TOLERANCES[torch.float32])


def _run(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Results, and the inputs as they are afterwards."""
    given = [i.detach().clone() if isinstance(i, Tensor) else i for i in inputs]
    with torch.no_grad():
        results = gm(*given)
    return [*torch.utils._pytree.tree_leaves(results), *given]


def _bits(x: Tensor) -> Tensor:
    # NaN is equal to itself, 0.0 is not -0.0; views as integers need memory without gaps
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(integers[x.element_size()]) if x.is_floating_point() else x
