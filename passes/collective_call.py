"""What a graph says of a collective: its process group and size, and which one a wait ends.

    y = _c10d_functional.all_to_all_single(x, ..., group)      starts it: y must not be read yet
    y = _c10d_functional.wait_tensor(y)                        ends it

Source: torch/distributed/_functional_collectives.py, torch 2.15.
"""

from typing import Any

from torch import fx

from deepfuse.ir.cost import tensor_bytes
from deepfuse.ir.private import COLLECTIVES, SITE

WAIT = "wait_tensor"
_OF_NO_GROUP = {"wait_tensors", "isend", "irecv", "batch_p2p_ops"}
"""Messages between two processes, and waits for several tensors: nobody's counterpart is looked for."""


def is_collective(node: fx.Node) -> bool:
    """Whether it starts a collective or waits for one."""
    return getattr(node.target, "namespace", "") == COLLECTIVES


def collective_call(node: fx.Node) -> dict[str, Any] | None:
    """What the :class:`deepfuse.passes.sites.Site` of a collective, or of a wait for one, has; ``None`` for other nodes.

    Args:
        node: of a graph in which all nodes before it have their sites.
    """
    if not is_collective(node):
        return None
    target: Any = node.target
    op = target._opname
    if op == WAIT:
        waited: Any = node.args[0]
        # one of the tensors of several, or a view; what is computed of several tensors is no collective's
        while isinstance(waited, fx.Node) and waited.op == "call_function" and not is_collective(waited):
            waited = waited.args[0] if waited.args else None
        return {"op": op, "start": waited.meta.get(SITE) if isinstance(waited, fx.Node) else None}
    if op in _OF_NO_GROUP:
        return {"op": op}
    names = [argument.name for argument in target._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    first, group = given[names[0]], given["group_name"]
    brought = [n.meta["val"] for n in (first if isinstance(first, list | tuple) else [first])]
    return {
        "op": op,
        "dtype": str(brought[0].dtype).removeprefix("torch.") if brought else "",
        # newer versions of torch may have the group itself there
        "group": str(getattr(group, "group_name", group)),
        "message": str(tensor_bytes(*brought)),
    }
