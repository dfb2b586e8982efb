"""A module compiled with the passes."""

import torch
from torch import nn

import deepfuse as df


class Scaled(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), factor))
        self.norm = nn.RMSNorm(4, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) * self.weight


def test_a_class_may_be_built_any_number_of_times() -> None:
    # Dynamo keeps graphs with the code of a function, and stops at the ninth
    x = torch.randn(3, 4)
    for factor in range(10):
        module = Scaled(float(factor))
        built = df.build(module, device="cpu", compile=False)
        with torch.no_grad():
            torch.testing.assert_close(built(x), module(x))
        assert "rsqrt at norm" in built.explain("recognize_norm")
