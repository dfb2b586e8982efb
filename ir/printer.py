"""Print a graph as Python that runs.

The text defines ``forward(...)`` over ``torch.ops``; shapes and dtypes stand behind each line, and lines are preceded
by the block they come from. :func:`run_text` turns the text back into a function.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from deepfuse.ir import op

HEADER = "import torch\nfrom torch import device, inf, nan\n"


def graph_text(graph: fx.Graph) -> str:
    """The graph as a Python module with one function, ``forward``."""
    lines = [HEADER]
    names = {node: node.name for node in graph.nodes}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    lines.append(f"def forward({', '.join(names[n] for n in inputs)}):")
    lines += [f"    # {names[n]}: {_type_text(n)}" for n in inputs]
    for node in graph.nodes:
        if node.op == "call_function":
            lines.append(f"    {names[node]} = {_call_text(node, names)}  # {_type_text(node)}")
        elif node.op == "get_attr":
            raise ValueError(f"graph_text: want a graph without attributes, got {node.target}; lift it to an input")
        elif node.op == "output":
            lines.append(f"    return {_value_text(node.args[0], names)}")
    return "\n".join(lines) + "\n"


def run_text(text: str) -> Callable[..., Any]:
    """The function that :func:`graph_text` printed."""
    scope: dict[str, Any] = {}
    exec(compile(text, "<graph>", "exec"), scope)  # noqa: S102 - the text is our own
    return scope["forward"]


def where(node: fx.Node) -> str:
    """The block a node comes from, as in ``model.layers.3.self_attn``; the node's name where that is not known."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    # Dynamo writes the path as an access: L['model'].model.layers.slice(None, ...)[3]._modules['self_attn']
    parts = [part for part in re.split(r"[^\w]+", path) if part not in ("", "L", "self", "_modules", "G")]
    return ".".join(parts) or node.name


def source_line(node: fx.Node) -> str:
    """Where the call was written, as in ``mlp.py:18``; empty where that is not known."""
    places = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    # every op of ours is called there
    places = [place for place in places if place[0] != op.__file__]
    return f"{places[-1][0].rpartition('/')[2]}:{places[-1][1]}" if places else ""


def _call_text(node: fx.Node, names: dict[fx.Node, str]) -> str:
    args = [_value_text(a, names) for a in node.args]
    args += [f"{k}={_value_text(v, names)}" for k, v in node.kwargs.items()]
    return f"{_target_text(node.target)}({', '.join(args)})"


def _target_text(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{target.name()}"
    module = getattr(target, "__module__", "builtins").replace("_operator", "operator")
    if module == "builtins":
        return str(target.__name__)
    return f"__import__({module!r}, fromlist=['']).{target.__name__}"


def _value_text(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        inner = ", ".join(_value_text(v, names) for v in value)
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, torch._ops.OpOverload):
        return f"torch.ops.{value}"
    if isinstance(value, slice):
        return f"slice({_value_text(value.start, names)}, {_value_text(value.stop, names)}, {value.step})"
    return repr(value)


def _type_text(node: fx.Node) -> str:
    value = node.meta.get("val")
    text = _shape_text(value)
    path = where(node)
    return text if path == node.name else f"{text}  {path}"


def _shape_text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{', '.join(str(s) for s in value.shape)}]"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_shape_text(v) for v in value) + ")"
    return type(value).__name__
