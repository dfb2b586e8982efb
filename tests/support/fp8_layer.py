"""A decoder layer's FP8 parts, written plainly: what passes of the stage ``quantize`` find in a graph.

Weights are quantized offline; in training online, from masters, with the gradients written out.
Dims: T tokens, D model width, I inner width, E experts, K experts a token.
"""

from typing import Any

import torch
from torch import Tensor, nn

from deepfuse.ops.add_rms_norm import add_rms_norm
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.expert_permute import expert_permute
from deepfuse.ops.expert_unpermute import expert_unpermute
from deepfuse.ops.grouped_matmul import grouped_matmul
from deepfuse.ops.linear import linear
from deepfuse.ops.quantize import quantize
from deepfuse.ops.rms_norm import rms_norm
from deepfuse.ops.swiglu import swiglu

E4M3 = torch.float8_e4m3fn
D, I, E, K = 256, 128, 4, 2
EPS = 1e-6


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        weight, scale = quantize(torch.randn(outputs, inputs) * inputs**-0.5, E4M3, 128, 128, False)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        values, scale = quantize(x, E4M3, 1, 128, False)
        weight = dequantize(self.weight, self.weight_scale_inv, 128, 128, torch.float32)
        return linear(dequantize(values, scale, 1, 128, torch.float32), weight, None).to(x.dtype)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = Linear(D, I), Linear(D, I), Linear(I, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class GroupedLinear(nn.Module):
    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        weight, scale = quantize(torch.randn(experts, outputs, inputs) * inputs**-0.5, E4M3, 128, 128, False)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        values, scale = quantize(rows, E4M3, 1, 128, False)
        weight = dequantize(self.weight, self.weight_scale_inv, 128, 128, torch.float32)
        return grouped_matmul(dequantize(values, scale, 1, 128, torch.float32), weight, offsets).to(rows.dtype)


class Experts(nn.Module):
    def __init__(self, experts: int = E, hidden: int = D, inner: int = I):
        super().__init__()
        self.gate_up, self.down = GroupedLinear(experts, hidden, 2 * inner), GroupedLinear(experts, inner, hidden)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        gate, up = self.gate_up(rows, offsets).chunk(2, -1)
        return self.down(swiglu(gate, up), offsets)


class Layer(nn.Module):
    """``x, h [T, D]`` -> the pair for the next layer; the attention is two projections and their sum."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.q_a, self.kv_a = Linear(D, D), Linear(D, D)
        self.shared, self.experts = MLP(), Experts()
        self.router = nn.Parameter(torch.randn(E, D))
        self.input_norm, self.q_norm, self.post_norm = (nn.Parameter(torch.randn(D).to(dtype)) for _ in range(3))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h = add_rms_norm(x, h, self.input_norm, EPS)
        attended = rms_norm(self.q_a(y), self.q_norm, EPS) + self.kv_a(y)
        y, h = add_rms_norm(attended, h, self.post_norm, EPS)
        weights, experts = linear(y.float(), self.router, None).softmax(-1).topk(K)
        rows, order, inverse, offsets = expert_permute(y, experts, E)
        out = expert_unpermute(self.experts(rows, offsets), order, inverse, weights)
        return out + self.shared(y), h


class _TrainedProduct(torch.autograd.Function):
    """``x @ weight.t()`` and its two gradients, each of operands in FP8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(_rounded(x, 1, 128), _rounded(weight, 128, 128), None).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx = _rounded(dy, 1, 128) @ _rounded(weight, 128, 128)
        dw = _rounded(dy, 128, 1).t() @ _rounded(x, 128, 1)
        return dx.to(x.dtype), dw.to(weight.dtype)


def _rounded(x: Tensor, rows: int, cols: int) -> Tensor:
    return dequantize(*quantize(x, E4M3, rows, cols, False), rows, cols, torch.float32)


class TrainedMLP(nn.Module):
    """A norm and an MLP whose weights are masters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.randn(D))
        self.gate, self.up = (nn.Parameter(torch.randn(I, D) * D**-0.5) for _ in range(2))
        self.down = nn.Parameter(torch.randn(D, I) * I**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = rms_norm(x, self.norm, EPS)
        gate, up = _TrainedProduct.apply(y, self.gate), _TrainedProduct.apply(y, self.up)  # type: ignore[no-untyped-call]
        return x + _TrainedProduct.apply(swiglu(gate, up), self.down)  # type: ignore[no-untyped-call, no-any-return]
