"""RMSNorm with its weight."""

import torch
from torch import Tensor, nn

from deepfuse.ops.add_rms_norm import add_rms_norm
from deepfuse.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """``rms_norm`` of ``[..., D]``; given a residual, adds it first and returns the sum as well."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """``(norm(x + residual), x + residual)``."""
        return add_rms_norm(x, residual, self.weight, self.eps)
