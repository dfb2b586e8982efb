"""The experts' weight gradient from FP8 numbers.

    before:  dw = grouped_matmul_wgrad(dequantize(dy, dy_scale), dequantize(x, x_scale), offsets).to(dtype)
    after:   dw = fp8_grouped_matmul_wgrad(dy, dy_scale, x, x_scale, offsets, dtype)

Why: saves the write and the read of both operands in float32 (8 bytes a number beside the 1 that is stored) and two
launches.
Requires: blocks of 128x1, and float32 before the rounding to the result's dtype. Others may read the dequantized
operands: they stay for these.
Numerics: reassociating; products of FP8 numbers are exact in float32, sums are taken by blocks of 128 rows.
"""

import torch
from torch import Tensor

from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.fp8_grouped_matmul_wgrad import fp8_grouped_matmul_wgrad
from deepfuse.ops.grouped_matmul_wgrad import grouped_matmul_wgrad
from deepfuse.passes.fuse_quantized_matmul import E4M3, powers_of_two, rounded_by_op
from deepfuse.passes.fusion import fusion


def _offsets() -> Tensor:
    return torch.tensor([100, 100, 200], dtype=torch.int32)


@fusion(stage="quantize", kind="reassociating", saves="both operands in float32, written and read; two launches")
class FuseQuantizedWgrad:
    anchor = grouped_matmul_wgrad
    shared = (dequantize,)

    @staticmethod
    def pattern(
        dy: Tensor, dy_scale: Tensor, x: Tensor, x_scale: Tensor, offsets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        dy_MN, x_MK = (dequantize(v, s, 128, 1, torch.float32) for v, s in ((dy, dy_scale), (x, x_scale)))
        return grouped_matmul_wgrad(dy_MN, x_MK, offsets).to(dtype)

    @staticmethod
    def replacement(
        dy: Tensor, dy_scale: Tensor, x: Tensor, x_scale: Tensor, offsets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        return fp8_grouped_matmul_wgrad(dy, dy_scale, x, x_scale, offsets, rounded_by_op(dtype)).to(dtype)

    samples = [
        (f"{E4M3}[200, 72]", dy_scale, f"{E4M3}[200, 40]", x_scale, _offsets, dtype)
        for dy_scale, x_scale, dtype in (
            ("float32[2, 72]", "float32[2, 40]", torch.bfloat16),
            ("float32[2, 72]", "float32[2, 40]", torch.float32),
            ("float32[2, 72]", "float32[2, 40]", torch.float16),
            (powers_of_two(2, 72), powers_of_two(2, 40), torch.bfloat16),
        )
    ]
