"""Linear layer over the ``linear`` op; the weight's name and layout are those of ``torch.nn.Linear``."""

import torch
from torch import Tensor, nn

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.collectives import sum_over
from deepfuse.ops.linear import linear


class Linear(nn.Module):
    """``[..., in_features] -> [..., out_features]``."""

    summed: Axis | None = None
    """Processes that each have some of the inputs, and the bias whole."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.summed is None:
            return linear(x, self.weight, self.bias)
        return whole(linear(x, self.weight, None), self.bias, self.summed)


def whole(y: Tensor, bias: Tensor | None, summed: Axis | None) -> Tensor:
    """A layer's result, from ``y``, the product over the inputs of one of the processes of ``summed``."""
    y = sum_over(y, summed)
    return y if bias is None else y + bias.to(y.dtype)
