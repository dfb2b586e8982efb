"""Each parameter in parts over processes that have tokens of their own, and put together where it is read.

    forward     weight = all_gather(part)                  in the dtype of the part
    backward    part's gradient = reduce_scatter(weight's gradient)    summed in float32

Both are nodes of the graph, so that passes see and move them (Zhang et al. 2024, arXiv:2411.00284). Memory of a process:
of masters and moments, which are parts, a share; of the weights that it computes with, all that forward saves for
backward, as without this.
Dims: n numbers of a parameter, p numbers of a part: n / processes, rounded up.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.collectives import wait
from deepfuse.blocks.slots import in_dtype
from deepfuse.ir.private import collectives


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.dtype = axis, part.dtype
        return wait(collectives.all_gather_into_tensor(part, axis.size, axis.group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        summed = wait(
            collectives.reduce_scatter_tensor(grads[0].float().contiguous(), "sum", ctx.axis.size, ctx.axis.group)
        )
        return in_dtype(summed, ctx.dtype), None


class Gathered(nn.Module):
    """``part [p]`` -> the parameter of which each process of ``axis`` has one."""

    def __init__(self, shape: torch.Size, axis: Axis):
        super().__init__()
        self.shape, self.axis = tuple(shape), axis
        self.numel = shape.numel()

    def forward(self, part: Tensor) -> Tensor:
        return _Gather.apply(part, self.axis)[: self.numel].view(self.shape)


@torch.no_grad()
def to_data_parallel(model: nn.Module, axis_of: Callable[[str], Axis | None]) -> dict[str, nn.Parameter]:
    """Leave a process its parts of a model's parameters, in place.

    Args:
        model: not on the meta device; equal on all processes of an axis.
        axis_of: over which processes a parameter is dealt out, by its name; ``None`` leaves it whole.

    Returns:
        What is trained, by the names of the parameters, in their order.
    """
    parts = {}
    for name, whole in list(model.named_parameters()):
        axis = axis_of(name)
        if axis is None:
            parts[name] = whole
            continue
        parent, _, last = name.rpartition(".")
        module = model.get_submodule(parent)
        each = -(-whole.numel() // axis.size)
        part = whole.new_zeros(each)
        mine = whole.flatten()[axis.rank * each : (axis.rank + 1) * each]
        part[: mine.numel()] = mine
        parts[name] = nn.Parameter(part, requires_grad=whole.requires_grad)
        setattr(module, last, parts[name])
        parametrize.register_parametrization(module, last, Gathered(whole.shape, axis), unsafe=True)
    return parts
