"""Collectives that would have a gradient become those without one, where nothing is differentiated any more.

    before:  y = _c10d_functional_autograd.all_to_all_single(x, received, sent, group)
    after:   y = _c10d_functional.all_to_all_single(x, received, sent, group)

Why: Inductor knows the latter alone. The former it calls as it would any op, and takes the memory that a message is read
from for free while the message is on its way.
Requires: the same arguments on both sides, which the schemas say.
Numerics: exact.
"""

from typing import Any

import torch
from torch import fx

from deepfuse.ir.private import COLLECTIVES
from deepfuse.passes.journal import note
from deepfuse.passes.record import graph_pass

DIFFERENTIABLE = f"{COLLECTIVES}_autograd"


@graph_pass(
    stage="communicate", kind="exact", saves="the memory of messages on their way is not taken for another tensor"
)
def plain_collectives(graph: fx.Graph) -> int:
    """Rewrite in place; returns the number of collectives replaced."""
    count = 0
    for node in graph.nodes:
        target: Any = node.target
        if getattr(target, "namespace", "") != DIFFERENTIABLE:
            continue
        plain = getattr(getattr(torch.ops, COLLECTIVES), target._opname).default
        if [a.name for a in plain._schema.arguments] != [a.name for a in target._schema.arguments]:
            note(f"{target}: stays: {plain} takes other arguments")
            continue
        node.target = plain
        count += 1
    return count
