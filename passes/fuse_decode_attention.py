"""The absorbed decode step of a GPU in three kernels: query, splits of the cache, and values.

    before:  q_latent = head_matmul(q_nope, W_UK);  q_rope = rotary(q_rope, cos, sin)
             y = head_matmul(mla_decode(q_latent, q_rope, cache, ...), W_UV);  values, scale = quantize(y, e4m3, 1, 128)
    after:   q_latent, q_rope = absorb_query(q_nope, q_rope, cos, sin, kv_b_proj)
             y, values, scale = mla_decode_project(q_latent, q_rope, cache, ..., kv_b_proj, e4m3, keep)

``mla_decode_fp8`` likewise, and a ``kv_b_proj`` in FP8, whose ``dequantize`` goes into both. The two halves are found each
by itself; y stays where it is read by something else, and where it is not quantized.
Why: four launches fewer a layer in FP8, two without; the mix of the latents, C numbers a head, and y are not written and
read; of an FP8 ``kv_b_proj``, 2 bytes a number written and read at each step. On a CPU, where no kernel does it, the graph
stays what it was: products of few rows have providers of their own there, and Inductor fuses the rest.
Requires: what ``absorb_mla`` writes. To be quantized, blocks of 128 that are of one head each.
Numerics: reassociating; splits are weighted before they are summed, not after.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from deepfuse.ir.device import Device
from deepfuse.ir.op import Op
from deepfuse.ir.printer import where
from deepfuse.ops.absorb_query import absorb_query
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.head_matmul import head_matmul
from deepfuse.ops.mla_decode import mla_decode
from deepfuse.ops.mla_decode_fp8 import mla_decode_fp8
from deepfuse.ops.mla_decode_project import mla_decode_project
from deepfuse.ops.quantize import quantize
from deepfuse.ops.rotary import rotary
from deepfuse.passes.journal import note
from deepfuse.passes.match import RESHAPES, op_name, source_name
from deepfuse.passes.record import graph_pass
from deepfuse.passes.splice import call, erase_dead, replace_outputs, values

aten = torch.ops.aten
DECODES = (mla_decode.overload, mla_decode_fp8.overload)


@graph_pass(
    stage="quantize",
    kind="reassociating",
    saves="two launches and the mixed latents; in FP8 two more, kv_b_proj in the model's dtype, and what o_proj quantizes",
)
def fuse_decode_attention(graph: fx.Graph, *, device: Device) -> int:
    """Rewrite in place; returns the number of halves, two of each attention."""
    decodes = [node for node in graph.nodes if node.target in DECODES]
    if not decodes or device.kind == "cpu":
        note("nothing to do: " + ("on a CPU the ops stay apart" if decodes else "the graph has no absorbed attention"))
        return 0
    halves: tuple[tuple[str, Callable[..., str | None]], ...] = (("query", _fuse_query), ("values", _fuse_values))
    fused = 0
    for decode in decodes:
        for name, fuse in halves:
            problem = fuse(graph, decode)
            note(f"{name} of {op_name(decode.target)} at {where(decode)}: {problem or 'matched'}")
            fused += problem is None
    return fused


def _fuse_query(graph: fx.Graph, decode: Any) -> str | None:
    """Put ``absorb_query`` before an attention, or say why not."""
    q_latent, q_rope = decode.args[:2]
    for name, node, op in (("q_latent", q_latent, head_matmul), ("q_rope", q_rope, rotary)):
        if node.target is not op.overload:
            return f"{name} comes from {source_name(node)}, rule wants {op.name}"
        early = [user for user in node.users if user < decode]
        if early:
            return f"{name} is read before the attention, by {op_name(early[0].target)}"
    q_nope, w_uk = q_latent.args
    found = _weight_rows(w_uk)
    if found is None or found[2:] != (0, q_nope.meta["val"].shape[2]):
        return "the query's matrix is not the first rows of each head of a weight"
    arguments = (q_nope, *q_rope.args, *found[:2])
    problem = _refusal(absorb_query, arguments)
    if problem:
        return problem
    with graph.inserting_before(decode):
        new = call(graph, decode, absorb_query.overload, *arguments)
        results = [call(graph, decode, operator.getitem, new, i) for i in range(2)]
    for old, result in zip((q_latent, q_rope), results, strict=True):
        old.replace_all_uses_with(result)
    return None


def _fuse_values(graph: fx.Graph, decode: Any) -> str | None:
    """Put ``mla_decode_project`` in the place of an attention and of what reads it, or say why not."""
    readers = list(decode.users)
    y = readers[0]
    if len(readers) > 1 or y.target is not head_matmul.overload or y.args[0] is not decode:
        return f"the mix is read by {', '.join(op_name(user.target) for user in readers)}, rule wants head_matmul alone"
    w_uv, value = y.args[1], y.meta["val"]
    turned = w_uv.target is aten.permute.default and list(w_uv.args[1]) == [0, 2, 1]
    found = _weight_rows(w_uv.args[0]) if turned else None
    V = value.shape[2]
    if found is None or found[3] - found[2] != V or found[3] != found[0].meta["val"].shape[0] // value.shape[1]:
        return "the values' matrix is not the last rows of each head of a weight"
    quantized = _quantize_of(y)
    keep = quantized is None or any(reader is not quantized for reader in _readers(y))
    to = (None, False) if quantized is None else (quantized.args[1], quantized.args[4])
    arguments = (*decode.args, *found[:2], V, *to, keep)
    problem = _refusal(mla_decode_project, arguments)
    if problem:
        return problem
    with graph.inserting_before(y):
        new = call(graph, decode, mla_decode_project.overload, *arguments)
        results = [call(graph, decode, operator.getitem, new, i) for i in range(3)]
    if quantized is not None:
        replace_outputs(quantized, results[1:])
    if keep:
        y.replace_all_uses_with(results[0])
    erase_dead((*_with_views(decode), *_with_views(y)))
    return None


def _weight_rows(part: Any) -> Any:
    """The weight ``[H (N + V), C]``, its scales or ``None``, and the first row of each head's and the end of those that
    ``part [H, rows, C]`` has; ``None`` where it is something else.
    """
    if part.target is not aten.slice.Tensor or len(part.args) != 4 or part.args[1] != 1:
        return None
    per_head, _, begin, end = part.args
    if per_head.target not in RESHAPES:
        return None
    weight, shape = per_head.args[0], per_head.meta["val"].shape
    if list(weight.meta["val"].shape) != [shape[0] * shape[1], shape[2]]:
        return None
    if weight.target is dequantize.overload and weight.args[2:4] == (128, 128):
        return weight.args[0], weight.args[1], begin, end
    return weight, None, begin, end


def _quantize_of(y: Any) -> Any:
    """The quantize of ``y [B, H, V]`` as ``[B, H V]`` in blocks of 1 x 128 that are of one head each; or ``None``."""
    B, H, V = y.meta["val"].shape
    for reader in _readers(y):
        rows = reader.target is quantize.overload and reader.args[2:4] == (1, 128) and V % 128 == 0
        if rows and list(reader.args[0].meta["val"].shape) == [B, H * V]:
            return reader
    return None


def _readers(node: Any) -> list[Any]:
    """What reads a node, also in another shape."""
    found: list[Any] = []
    for user in node.users:
        found += _readers(user) if user.target in RESHAPES else [user]
    return found


def _with_views(node: Any) -> Iterator[fx.Node]:
    """A node, and what is the same in another shape."""
    yield node
    for user in node.users:
        if user.target in RESHAPES:
            yield from _with_views(user)


def _refusal(op: Op, arguments: Sequence[Any]) -> str | None:
    """Why the kernel of an op does not take these nodes."""
    kernel = next(provider for provider in op.providers if provider.name == "triton")
    reason = kernel.supports(*values(list(arguments)))
    return reason and f"the kernel of {op.name} refuses: {reason}"
