"""Linear layer over the ``linear`` op; the weight's name and layout are those of ``torch.nn.Linear``."""

import torch
from torch import Tensor, nn

from deepfuse.ops.linear import linear


class Linear(nn.Module):
    """``[..., in_features] -> [..., out_features]``."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
