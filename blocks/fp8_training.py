"""Linear layers and experts trained in FP8: weights in float32, quantized in each step; three products, all in FP8.

    y  = Q1(x)  @ Q2(w).T       Q1: blocks of 1x128 along what is summed over; Q2: of 128x128
    dx = Q1(dy) @ Q2(w)
    dw = Q1(dy.T) @ Q1(x.T).T

``Q`` is quantize and dequantize. The gradients are those of the product without rounding (straight-through), with their
own operands rounded; they are written out here, as a gradient of the rounding would be zero. What is read of x in the
weight gradient is a choice: x as it came (``saved="high"``, the default: one rounding), or its FP8 values
(``saved="fp8"``, DeepSeek-V3's own: a fourth or half of the memory, and two roundings, by rows and then by columns).

Dims: M rows (tokens), N outputs, K inputs, E experts.
Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3 and figure 6.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepfuse.blocks.fp8 import BLOCK, E4M3, in_decoder_layers
from deepfuse.blocks.linear import Linear, whole
from deepfuse.blocks.moe import Experts
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.grouped_matmul import grouped_matmul
from deepfuse.ops.grouped_matmul_wgrad import grouped_matmul_wgrad
from deepfuse.ops.linear import linear
from deepfuse.ops.quantize import quantize
from deepfuse.ops.swiglu import swiglu

Saved = Literal["high", "fp8"]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, saved: Saved) -> Tensor:
        x_values, x_scale = quantize(x, E4M3, 1, BLOCK, False)
        values, scale = quantize(weight, E4M3, BLOCK, BLOCK, False)
        ctx.save_for_backward(*((x,) if saved == "high" else (x_values, x_scale)), values, scale)
        ctx.dtypes = x.dtype, weight.dtype
        return _rounded(_product(x_values, x_scale, values, scale, BLOCK), x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        *x, values, scale = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        dy_values, dy_scale = quantize(dy, E4M3, 1, BLOCK, False)
        dx = _product(dy_values, dy_scale, values.t(), scale.t(), BLOCK)
        dy_values, dy_scale = quantize(dy, E4M3, BLOCK, 1, False)
        x_values, x_scale = quantize(_high(x, x_dtype), E4M3, BLOCK, 1, False)
        dw = _product(dy_values.t(), dy_scale.t(), x_values.t(), x_scale.t(), 1)
        return dx.to(x_dtype), dw.to(weight_dtype), None


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        saved: Saved,
        x_values: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> Tensor:
        if x_values is None or x_scale is None:
            x_values, x_scale = quantize(x, E4M3, 1, BLOCK, False)
        values, scale = quantize(weight, E4M3, BLOCK, BLOCK, False)
        ctx.save_for_backward(*((x,) if saved == "high" else (x_values, x_scale)), values, scale, offsets)
        ctx.dtypes = x.dtype, weight.dtype
        return _rounded(_grouped_product(x_values, x_scale, values, scale, offsets), x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *x, values, scale, offsets = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        dy_values, dy_scale = quantize(dy, E4M3, 1, BLOCK, False)
        dx = _grouped_product(dy_values, dy_scale, values.transpose(1, 2), scale.transpose(1, 2), offsets)
        dy_values, dy_scale = quantize(dy, E4M3, BLOCK, 1, False)
        x_values, x_scale = quantize(_high(x, x_dtype), E4M3, BLOCK, 1, False)
        dw = grouped_matmul_wgrad(
            dequantize(dy_values, dy_scale, BLOCK, 1, torch.float32),
            dequantize(x_values, x_scale, BLOCK, 1, torch.float32),
            offsets,
        )
        return dx.to(x_dtype), dw.to(weight_dtype), None, None, None, None


class TrainedFP8Linear(Linear):
    """A linear layer whose three products are in FP8; ``weight`` in float32."""

    saved: Saved = "high"

    def forward(self, x: Tensor) -> Tensor:
        y = _Linear.apply(x, self.weight, self.saved)  # type: ignore[no-untyped-call]
        return whole(y, self.bias, self.summed)


class TrainedFP8Experts(Experts):
    """Experts whose six products are in FP8; both weights in float32."""

    saved: Saved = "high"

    @property
    def reads_fp8(self) -> bool:  # type: ignore[override]
        # the weight gradient of the other kind reads the rows as they were
        return self.saved == "fp8"

    def forward(self, rows: Tensor, offsets: Tensor, quantized: tuple[Tensor, Tensor] | None = None) -> Tensor:
        gate_up = _Grouped.apply(rows, self.gate_up_proj, offsets, self.saved, *(quantized or ()))  # type: ignore[no-untyped-call]
        gate, up = gate_up.chunk(2, dim=-1)
        return _Grouped.apply(swiglu(gate, up), self.down_proj, offsets, self.saved)  # type: ignore[no-untyped-call,no-any-return]


def train_in_fp8(model: nn.Module, *, saved: Saved = "high") -> list[nn.Parameter]:
    """Let the linear layers and experts of the decoder layers compute in FP8, in place; returns their weights."""
    weights = []
    for name in sorted(in_decoder_layers(model)):
        module = model.get_submodule(name)
        linear = isinstance(module, Linear)
        module.__class__ = TrainedFP8Linear if linear else TrainedFP8Experts
        module.saved = saved  # type: ignore[assignment]
        weights += [module.weight] if linear else [module.gate_up_proj, module.down_proj]
    return weights  # type: ignore[return-value]


def _product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, b_rows: int) -> Tensor:
    """``dequantize(a) [M, K] @ dequantize(b) [N, K].T`` in float32."""
    b_NK = dequantize(b, b_scale, b_rows, BLOCK, torch.float32)
    return linear(dequantize(a, a_scale, 1, BLOCK, torch.float32), b_NK, None)


def _grouped_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor) -> Tensor:
    b_ENK = dequantize(b, b_scale, BLOCK, BLOCK, torch.float32)
    return grouped_matmul(dequantize(a, a_scale, 1, BLOCK, torch.float32), b_ENK, offsets)


def _rounded(y: Tensor, dtype: torch.dtype) -> Tensor:
    # not to() for the dtype it has: torch 2.11's Dynamo loses the gradient of a function that returns what it was given
    return y if y.dtype == dtype else y.to(dtype)


def _high(saved: list[Tensor], dtype: torch.dtype) -> Tensor:
    return saved[0] if len(saved) == 1 else dequantize(saved[0], saved[1], 1, BLOCK, dtype)
