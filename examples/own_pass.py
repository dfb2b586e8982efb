"""A pass of one's own: multiplications by one go.

    before:  y = x * 1.0
    after:   y = x

Why: where YaRN is off, the tables of the rotary embedding are multiplied by a temperature of 1.
Requires: the product has the dtype of ``x``; an integer times 1.0 is a float.
Numerics: exact.
"""

import torch
from torch import fx

import deepfuse as df
from deepfuse.passes.journal import note


@df.graph_pass(stage="semantic", kind="exact")
def drop_times_one(graph: fx.Graph) -> int:
    dropped = 0
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor):
        x, factor = node.args
        if type(factor) is not float or factor != 1.0:
            continue
        if x.meta["val"].dtype != node.meta["val"].dtype:
            note(f"{node.name}: kept: the product has another dtype")
            continue
        node.replace_all_uses_with(x)
        graph.erase_node(node)
        dropped += 1
    return dropped


if __name__ == "__main__":
    # uncompiled: the same graphs, at once
    plain = df.build("v3-tiny", compile=False)
    # else eliminate_no_ops, which knows more of them, is first
    passes = df.passes.default().without("eliminate_no_ops").plus(drop_times_one)
    model = df.build("v3-tiny", passes=passes, compile=False)
    print(model.explain("drop_times_one"))
    assert model.report.matches()["drop_times_one"] > 0
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model(ids), plain(ids))
