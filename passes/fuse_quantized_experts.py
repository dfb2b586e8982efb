"""Multiply each group's FP8 rows by its FP8 matrix.

    before:  y = grouped_matmul(dequantize(x, x_scale), dequantize(weight, weight_scale), offsets).to(dtype)
    after:   y = fp8_grouped_matmul(x, x_scale, weight, weight_scale, offsets, dtype)

Why: saves the write and the read of all experts' weights in float32 (8 bytes a number beside the 1 that is stored, used
or not), those of the rows, and two launches. In training the forward product and the input gradient (the weight
transposed) have this form.
Requires: float32 before the rounding to the result's dtype. Others may read the dequantized operands: they stay for these.
Numerics: reassociating; products of FP8 numbers are exact in float32, sums are taken by blocks of 128.
"""

import torch
from torch import Tensor

from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.fp8_grouped_matmul import fp8_grouped_matmul
from deepfuse.ops.grouped_matmul import grouped_matmul
from deepfuse.passes.fuse_quantized_matmul import E4M3, powers_of_two, rounded_by_op
from deepfuse.passes.fusion import fusion


def _offsets() -> Tensor:
    return torch.tensor([2, 2, 5], dtype=torch.int32)


@fusion(stage="quantize", kind="reassociating", saves="rows and weights in float32, written and read; two launches")
class FuseQuantizedExperts:
    anchor = grouped_matmul
    shared = (dequantize,)

    @staticmethod
    def pattern(
        x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        weight_ENK = dequantize(weight, weight_scale, 128, 128, torch.float32)
        return grouped_matmul(dequantize(x, x_scale, 1, 128, torch.float32), weight_ENK, offsets).to(dtype)

    @staticmethod
    def replacement(
        x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        return fp8_grouped_matmul(x, x_scale, weight, weight_scale, offsets, rounded_by_op(dtype)).to(dtype)

    samples = [
        (f"{E4M3}[5, 200]", x_scale, f"{E4M3}[3, 130, 200]", weight_scale, _offsets, dtype)
        for x_scale, weight_scale, dtype in (
            ("float32[5, 2]", "float32[3, 2, 2]", torch.bfloat16),
            ("float32[5, 2]", "float32[3, 2, 2]", torch.float32),
            ("float32[5, 2]", "float32[3, 2, 2]", torch.float16),
            (powers_of_two(5, 2), powers_of_two(3, 2, 2), torch.bfloat16),
        )
    ]
