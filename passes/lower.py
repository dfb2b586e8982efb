"""Send each op of the dialect to the provider for its device.

    before:  y = deepfuse.rms_norm(x, weight, eps)
    after:   y = deepfuse.rms_norm.triton(x, weight, eps)          an opaque kernel
             ... the reference's own nodes, for Inductor to fuse   an inline provider

Why: without a rewrite every op is an opaque call, and on CPU its meaning is worth more to Inductor than its name.
Requires: a functional graph with ``meta["val"]`` on every node; runs after all passes that match ops by name.
Numerics: within the tolerance of the op between providers; an inlined reference is what the op means.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from deepfuse.ir.op import NAMESPACE, OPS, Op
from deepfuse.ir.provider import Choice
from deepfuse.ops.append_latent import append_latent, appended_latent
from deepfuse.passes.journal import note
from deepfuse.passes.record import graph_pass
from deepfuse.passes.splice import Splicer, replace_outputs, values


@graph_pass(stage="lower", kind="reassociating")
def lower(graph: fx.Graph, *, providers: Mapping[str, str]) -> int:
    """Rewrite in place; ``providers`` forces one by op name. Returns the number of ops sent to a provider."""
    chosen: Counter[str] = Counter()
    splicer = Splicer(graph)
    for node in list(graph.nodes):
        op = _op_of(node)
        if op is not None:
            choice = op.choose(tuple(values(list(node.args))), compiled=True, forced=providers.get(op.name))
            _replace(node, op, choice, splicer)
        elif _is_append(node):
            op, choice = append_latent, _lower_append(node, providers, splicer)
        else:
            continue
        chosen[f"{op.name} -> {choice.provider.name}{_refusals(choice, providers.get(op.name))}"] += 1
    for line, count in sorted(chosen.items()):
        note(f"{count} x {line}")
    return chosen.total()


def _op_of(node: fx.Node) -> Op | None:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    if target.namespace != NAMESPACE or target._overloadname != "default":
        return None
    return OPS[target._opname]


def _replace(node: fx.Node, op: Op, choice: Choice, splicer: Splicer) -> None:
    if choice.provider.inline:
        replace_outputs(node, splicer.splice(node, choice.provider.fn, node.args))
    else:
        node.target = getattr(getattr(torch.ops.deepfuse, op.name), choice.provider.name)


def _is_append(node: fx.Node) -> bool:
    higher_order = torch.ops.higher_order.auto_functionalized_v2
    return node.target is higher_order and node.args[0] is append_latent.overload


def _lower_append(node: fx.Node, providers: Mapping[str, str], splicer: Splicer) -> Choice:
    """The cache write stands in the graph as a function of the cache (``auto_functionalized_v2``).

    A kernel keeps that form, which Inductor makes in-place again; otherwise it becomes an ``index_put``, which Inductor
    makes in-place and fuses with what it writes.
    """
    kwargs: Any = node.kwargs
    (cache,) = kwargs["_all_bases"]
    args = (cache, *(kwargs[name] for name in ("latent", "k_rope", "slots")))
    choice = append_latent.choose(tuple(values(list(args))), compiled=True, forced=providers.get("append_latent"))
    if choice.provider.name == "triton":
        node.args = (torch.ops.deepfuse.append_latent.triton, *node.args[1:])
    else:
        replace_outputs(node, (None, splicer.splice(node, appended_latent, args)))
    return choice


def _refusals(choice: Choice, forced: str | None) -> str:
    refused = [f"{name}: {why}" for name, why in choice.refused if name == forced or "runs on" not in why]
    return f" ({'; '.join(refused)})" if refused else ""
