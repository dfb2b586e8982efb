"""Compare a graph's values before and after a pass, on real inputs.

An exact pass must give the same bits. A reassociating one may differ by ``atol + rtol * max |expected|`` of the narrowest
dtype computed in, for each result and each call that was there before: the graphs run in lockstep (:mod:`.lockstep`).
Between two such calls rewrites err independently: n of them by sqrt(n) times as much. Results are judged without lockstep
too, but where the graph rounds to FP8 or takes decisions, which amplify what one rounding changed. Where the graph rounds to FP8, a
last place before a rounding may decide which way it goes, and ``absorb_mla`` leaves a rounding out: a number then moves
by up to a unit of the 4-bit significand, an eighth of it; terms of a sum err independently, so that the sum errs by no
larger share of its size. The bytes of a latent cache in FP8 are compared as the numbers they stand for, one of whose
steps they may differ by.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from deepfuse.ir.private import storage_id
from deepfuse.ir.tolerance import DEFAULT_TOLERANCE, ONE_FLOAT8_STEP, Tolerance
from deepfuse.ops.append_latent_fp8 import unpacked_rows
from deepfuse.passes.lockstep import run_in_lockstep
from deepfuse.passes.mutation import is_mutation, is_of_a_view, mutation_arguments
from deepfuse.passes.record import Kind

_leaves = torch.utils._pytree.tree_leaves
TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    **DEFAULT_TOLERANCE,
    torch.float8_e4m3fn: Tolerance(atol=1e-3, rtol=2**-3),
    torch.float8_e5m2: Tolerance(atol=1e-3, rtol=2**-2),
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
        """How results, calls that both have, or what is written to inputs differ; ``None`` where they do not."""
        widest = widest_tolerance(self.before.graph)
        if self.kind == "reassociating":
            ours, theirs = _cloned(inputs), _cloned(inputs)
            compare = partial(self._difference, widest)
            found = run_in_lockstep(self.before, self.after, (ours, theirs), compare)
            together = self._of_results(widest, found.distance, (found.want, ours), (found.got, theirs))
            if found.problem or together:
                return found.problem or together
            if _rounds_to_fp8(widest) or _decides(self.before.graph):
                return None
        # where nothing amplifies a rounding, results are judged as well: errors of one sign add up on the way there
        ours, theirs = _cloned(inputs), _cloned(inputs)
        with torch.no_grad():
            want, got = _leaves(self.before(*ours)), _leaves(self.after(*theirs))
        return self._of_results(widest, self.rewrites, (want, ours), (got, theirs))

    def _of_results(
        self, widest: Tolerance, rewrites: int, want: tuple[list[Any], list[Any]], got: tuple[list[Any], list[Any]]
    ) -> str | None:
        """The same of results and of inputs, as they were left."""
        caches = caches_in_fp8(self.before.graph)
        for i, (a, b) in enumerate(zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True)):
            tolerance = widest
            rank = caches.get(i - len(want[0]))
            if rank is not None and self.kind == "reassociating":
                a, b = (torch.cat(unpacked_rows(cache, rank, torch.float32), -1) for cache in (a, b))
                tolerance = ONE_FLOAT8_STEP[torch.float8_e4m3fn]
            problem = self._difference(tolerance, a, b, rewrites) if isinstance(b, Tensor) else None
            if problem:
                return f"result {i} of {len(want[0]) + len(want[1])}: {problem}"
        return None

    def _difference(self, tolerance: Tolerance, got: Tensor, want: Tensor, rewrites: int) -> str | None:
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"want {want.dtype} {list(want.shape)}, got {got.dtype} {list(got.shape)}"
        if torch.equal(_bits(got), _bits(want)):
            return None
        if self.kind == "exact" or not want.is_floating_point():
            return f"want the same bits, got {int((_bits(got) != _bits(want)).sum())} that differ"
        got, want = got.double(), want.double()
        finite = want.isfinite()
        signs = [x.nan_to_num(0.0, 1.0, -1.0)[~finite] for x in (got, want)]
        if not torch.equal(got.isfinite(), finite) or not torch.equal(*signs):
            return "want infinities and NaN where they were, got others"
        if not finite.any():
            return None
        error, size = (got - want)[finite].abs().max().item(), want[finite].abs().max().item()
        bound = (tolerance.atol + tolerance.rtol * size) * math.sqrt(max(rewrites, 1))
        return None if error <= bound else f"want errors up to {bound:.2e}, got {error:.2e} (values up to {size:.2e})"


def _rounds_to_fp8(widest: Tolerance) -> bool:
    return widest.rtol >= TOLERANCES[torch.float8_e4m3fn].rtol


def _decides(graph: fx.Graph) -> bool:
    """Whether a call makes whole numbers or truth values of floating-point ones, as ``route`` does."""

    def is_floating(n: fx.Node) -> list[bool]:
        return [v.is_floating_point() for v in _leaves(n.meta.get("val")) if isinstance(v, Tensor)]

    return any(
        n.op == "call_function" and not all(is_floating(n)) and any(any(is_floating(b)) for b in n.all_input_nodes)
        for n in graph.nodes
    )


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
    if caches_in_fp8(graph):
        dtypes.add(torch.float8_e4m3fn)
    return max((TOLERANCES[dtype] for dtype in dtypes), key=lambda t: t.rtol, default=TOLERANCES[torch.float32])


def caches_in_fp8(graph: fx.Graph) -> dict[int, int]:
    """Inputs that are latent caches in FP8 and written to, by their number: the rank of their latents."""
    inputs = list(graph.find_nodes(op="placeholder"))
    found = {}
    for node in graph.nodes:
        if not is_mutation(node) or is_of_a_view(node):
            continue
        cache, latent = mutation_arguments(node)[:2]
        if cache in inputs and cache.meta["val"].dtype == torch.uint8:
            found[inputs.index(cache)] = latent.meta["val"].shape[-1]
    return found


def _cloned(inputs: Sequence[Any]) -> list[Any]:
    """Copies of the inputs, of which those share memory that did: a graph may read one through another."""
    tensors = {i: x.detach() for i, x in enumerate(inputs) if isinstance(x, Tensor)}
    together: dict[int, list[int]] = {}
    for i, x in tensors.items():
        together.setdefault(storage_id(x), []).append(i)
    out = list(inputs)
    for places in together.values():
        first = tensors[places[0]]
        if len(places) == 1:
            out[places[0]] = first.clone()
            continue
        storage = first.untyped_storage().clone()
        for i in places:
            x = tensors[i]
            out[i] = torch.empty(0, dtype=x.dtype, device=x.device).set_(
                storage, x.storage_offset(), x.shape, x.stride()
            )
    return out


def _bits(x: Tensor) -> Tensor:
    # NaN is equal to itself, 0.0 is not -0.0; views as integers need memory without gaps
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(integers[x.element_size()]) if x.is_floating_point() else x
