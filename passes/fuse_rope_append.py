"""What stands between a projection and the cache becomes one op: the latent's norm, the key's rotation, the write.

    before:  latent = rms_norm(x[:C], weight, eps);  k_rope = squeeze(rotary(unsqueeze(x[C:]), cos, sin))
             cache = append_latent(cache, latent, k_rope, slots)
    after:   latent, k_rope, cache = norm_rope_append(cache, x[:C], x[C:], weight, cos, sin, slots, eps)

``append_latent_fp8`` likewise. Where others read the latent or the key, as the attention of a prefill does, the op
returns them (``keep``); a decode step, which reads the cache, wants neither.
Why: two launches fewer a layer; and of a token in bfloat16 and DeepSeek-V3's widths, 576 numbers, 1152 bytes that are
not read again, and in decode 1152 that are not written beside the cache. On a CPU, where no kernel does it, the graph
stays what it was.
Requires: a norm and a rotation of one head that are read nowhere before the write; a cache that is no view. Where the
next layer computes in FP8, its quantize has taken the norm of a prefill already (``fuse_norm_quantize``).
Numerics: exact; the kernel sums and rounds as those of the three ops do.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from deepfuse.ir.printer import where
from deepfuse.ops.append_latent import append_latent
from deepfuse.ops.append_latent_fp8 import append_latent_fp8
from deepfuse.ops.norm_rope_append import norm_rope_append
from deepfuse.ops.rms_norm import rms_norm
from deepfuse.ops.rotary import rotary
from deepfuse.passes.journal import note
from deepfuse.passes.match import op_name, source_name
from deepfuse.passes.mutation import call_mutation, is_mutation, is_of_a_view, mutation_arguments
from deepfuse.passes.record import graph_pass
from deepfuse.passes.splice import call, replace_outputs

aten = torch.ops.aten
APPENDS = (append_latent.overload, append_latent_fp8.overload)
_SAME_ORDER = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
"""Views that leave the numbers of a row, of one head, in their order."""


@dataclass(frozen=True, slots=True)
class _Site:
    """The nodes around a write of ``[T, C]`` and ``[T, R]``."""

    latent: fx.Node
    """The norm."""
    k_rope: fx.Node
    """The rotation's result, as it is written."""
    rotation: fx.Node


@graph_pass(
    stage="quantize", kind="exact", saves="two launches a layer; a read and in decode a write of latent and rotary key"
)
def fuse_rope_append(graph: fx.Graph) -> int:
    """Rewrite in place; returns the number of writes that took their norm and rotation in."""
    fused = 0
    for write in list(graph.nodes):
        if not is_mutation(write) or write.args[0] not in APPENDS:
            continue
        site = _site(write)
        found = site if isinstance(site, str) else "matched"
        note(f"{op_name(write.args[0])} at {where(write)}: {found}")
        if isinstance(site, _Site):
            _fuse(graph, write, site)
            fused += 1
    return fused


def _site(write: fx.Node) -> _Site | str:
    """What is written, or why it stays as it is."""
    if is_of_a_view(write):
        return "the cache is a view of another tensor"
    _, latent, k_rope, _ = mutation_arguments(write)
    if latent.target is not rms_norm.overload:
        return f"latent comes from {source_name(latent)}, rule wants rms_norm"
    path = [k_rope]
    while path[-1].target in _SAME_ORDER:
        path.append(path[-1].args[0])
    rotation = path[-1]
    if rotation.target is not rotary.overload:
        return f"k_rope comes from {source_name(rotation)}, rule wants rotary"
    heads = rotation.meta["val"].shape[1]
    if heads != 1:
        return f"k_rope is of {heads} heads, rule wants 1"
    for inner in path[1:]:
        if len(inner.users) > 1:
            users = ", ".join(op_name(user.target) for user in inner.users)
            return f"{op_name(inner.target)}'s result has {len(inner.users)} users: {users}"
    dtypes = [read.meta["val"].dtype for read in (latent, k_rope)]
    if dtypes[0] != dtypes[1]:
        return f"latent and k_rope are {dtypes[0]} and {dtypes[1]}, rule wants one dtype"
    for name, read in (("latent", latent), ("k_rope", k_rope)):
        early = [user for user in read.users if user < write]
        if early:
            return f"{name} is read before it is written, by {op_name(early[0].target)}"
    return _Site(latent, k_rope, rotation)


def _fuse(graph: fx.Graph, write: fx.Node, site: _Site) -> None:
    cache, _, _, slots = mutation_arguments(write)
    x, weight, eps = site.latent.args
    turned, cos, sin, interleaved = site.rotation.args
    keep = any(user is not write for read in (site.latent, site.k_rope) for user in read.users)
    with graph.inserting_before(write):
        k_rope = _without_head(graph, site.rotation, turned)
        arguments = (cache, x, k_rope, weight, cos, sin, slots, eps, interleaved, keep)
        results, (written,) = call_mutation(graph, write, norm_rope_append, arguments)
    replace_outputs(write, (None, written))
    for old, new in zip((site.latent, site.k_rope), results, strict=True):
        old.replace_all_uses_with(new)


def _without_head(graph: fx.Graph, like: fx.Node, x: Any) -> fx.Node:
    """``[T, 1, R] -> [T, R]``."""
    if x.target is aten.unsqueeze.default and x.args[1] == 1:
        return x.args[0]
    return call(graph, like, aten.squeeze.dim, x, 1)
