"""Send each op of the dialect to the provider for its device.

    before:  y = deepfuse.rms_norm(x, weight, eps)
    after:   y = deepfuse.rms_norm.triton(x, weight, eps)          an opaque kernel
             ... the reference's own nodes, for Inductor to fuse   an inline provider

An op that mutates (a cache write) stands in the graph as a function of what it changes, ``auto_functionalized_v2``. A
kernel keeps that form, which Inductor makes in-place again; otherwise the op's ``functional`` nodes take its place, an
``index_put`` for a cache write, which Inductor makes in-place and fuses with what it writes.

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
from deepfuse.passes.journal import note
from deepfuse.passes.mutation import is_mutation, is_of_a_view, mutation_arguments
from deepfuse.passes.record import graph_pass
from deepfuse.passes.sites import mark_call
from deepfuse.passes.splice import Splicer, replace_outputs, values


@graph_pass(stage="lower", kind="reassociating")
def lower(graph: fx.Graph, *, providers: Mapping[str, str]) -> int:
    """Rewrite in place; ``providers`` forces one by op name. Returns the number of ops sent to a provider."""
    chosen: Counter[str] = Counter()
    unused = dict(providers)
    splicer = Splicer(graph)
    for node in list(graph.nodes):
        mutates = is_mutation(node)
        op = _op_of(node.args[0] if mutates else node.target)
        if op is None:
            continue
        forced = providers.get(op.name)
        unused.pop(op.name, None)
        mark_call(node, op, values(mutation_arguments(node) if mutates else list(node.args)))
        if not mutates:
            choice = op.choose(tuple(values(list(node.args))), compiled=True, forced=forced)
            _replace(node, op, choice, splicer)
        elif is_of_a_view(node):
            note(f"1 x {op.name}: stays: it changes a view of another tensor")
            continue
        else:
            choice = _lower_mutation(node, op, forced, splicer)
        chosen[f"{op.name} -> {choice.provider.name}{_refusals(choice, forced)}"] += 1
    for line, count in sorted(chosen.items()):
        note(f"{count} x {line}")
    for name, provider in sorted(unused.items()):
        note(
            f"0 x {name} -> {provider}: the model has no {name} here, or a pass before has put another op in its place"
        )
    return chosen.total()


def _op_of(target: Any) -> Op | None:
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if target.namespace != NAMESPACE or target._overloadname != "default":
        return None
    return OPS[target._opname]


def _replace(node: fx.Node, op: Op, choice: Choice, splicer: Splicer) -> None:
    if choice.provider.inline:
        replace_outputs(node, splicer.splice(node, choice.provider.fn, node.args))
    else:
        node.target = getattr(getattr(torch.ops.deepfuse, op.name), choice.provider.name)


def _lower_mutation(node: fx.Node, op: Op, forced: str | None, splicer: Splicer) -> Choice:
    args = mutation_arguments(node)
    choice = op.choose(tuple(values(args)), compiled=True, forced=forced)
    if choice.provider.name == "triton" or op.functional is None:
        node.args = (getattr(getattr(torch.ops.deepfuse, op.name), choice.provider.name), *node.args[1:])
        return choice
    new = splicer.splice(node, op.functional, args)
    # the node gives what the op returns, None for nothing, and then what it changed
    replace_outputs(node, new if isinstance(new, tuple) else (None, new))
    return choice


def _refusals(choice: Choice, forced: str | None) -> str:
    refused = [f"{name}: {why}" for name, why in choice.refused if name == forced or "runs on" not in why]
    return f" ({'; '.join(refused)})" if refused else ""
