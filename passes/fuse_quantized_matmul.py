"""Multiply the FP8 numbers themselves.

    before:  y = linear(dequantize(a, a_scale), dequantize(b, b_scale), None).to(dtype)
    after:   y = fp8_matmul(a, a_scale, b, b_scale, ...)

Why: saves the write and the read of both operands in float32 (8 bytes a number beside the 1 that is stored) and two
launches; tensor cores multiply FP8 twice as fast as bfloat16. In training all three products of a layer have this form:
forward (b is the weight, in blocks of 128x128), input gradient (the weight transposed) and weight gradient (both operands
transposed, in blocks of 1x128). A bias is added in the product's own epilogue.
Requires: float32 before the rounding to the result's dtype. Others may read the dequantized operands: they stay for these.
Numerics: reassociating; products of FP8 numbers are exact in float32, sums are taken by blocks of 128.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.fp8_matmul import fp8_matmul
from deepfuse.ops.linear import linear
from deepfuse.passes.fusion import Site, fusion

E4M3 = "float8_e4m3fn"


def powers_of_two(*shape: int) -> Callable[[], Tensor]:
    """A sample of scales of that format."""
    return lambda: torch.full(shape, 0.25).to(torch.float8_e8m0fnu)


def rounded_by_op(dtype: torch.dtype) -> torch.dtype:
    """What an FP8 product rounds to for a result of that dtype: it rounds to no float16, which has too small a range."""
    return torch.float32 if dtype == torch.float16 else dtype


def _samples(*bias: str) -> Iterator[tuple[Any, ...]]:
    """Operands of both kinds of blocks, not all full, and every dtype of a result."""
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for b_rows, b_scale in ((128, "float32[2, 2]"), (1, "float32[130, 2]")):
            yield (f"{E4M3}[3, 200]", "float32[3, 2]", f"{E4M3}[130, 200]", b_scale, *bias, b_rows, dtype)
    scales = powers_of_two(3, 2), powers_of_two(2, 2)
    yield (f"{E4M3}[3, 200]", scales[0], f"{E4M3}[130, 200]", scales[1], *bias, 128, torch.bfloat16)


def _product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, b_rows: int) -> Tensor:
    b_NK = dequantize(b, b_scale, b_rows, 128, torch.float32)
    return linear(dequantize(a, a_scale, 1, 128, torch.float32), b_NK, None)


def _fused(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, b_rows: int, dtype: torch.dtype
) -> Tensor:
    return fp8_matmul(a, a_scale, b, b_scale, b_rows, bias, None, rounded_by_op(dtype)).to(dtype)


@fusion(
    stage="quantize",
    kind="reassociating",
    saves="both operands in float32, written and read; two launches, and one more with a bias",
)
class FuseQuantizedMatmul:
    anchor = linear
    shared = (dequantize,)

    @staticmethod
    def pattern(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, b_rows: int, dtype: torch.dtype) -> Tensor:
        return _product(a, a_scale, b, b_scale, b_rows).to(dtype)

    @staticmethod
    def replacement(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, b_rows: int, dtype: torch.dtype) -> Tensor:
        return _fused(a, a_scale, b, b_scale, None, b_rows, dtype)

    @staticmethod
    def pattern_bias(
        a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor, b_rows: int, dtype: torch.dtype
    ) -> Tensor:
        return (_product(a, a_scale, b, b_scale, b_rows) + bias.float()).to(dtype)

    @staticmethod
    def replacement_bias(
        a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor, b_rows: int, dtype: torch.dtype
    ) -> Tensor:
        return _fused(a, a_scale, b, b_scale, bias, b_rows, dtype)

    @staticmethod
    def guard(site: Site) -> str | None:
        bias = site.values.get("bias")
        return None if bias is None or bias.ndim == 1 else f"what is added is no bias [N]: {list(bias.shape)}"

    samples = list(_samples())
    samples_bias = [*_samples("bfloat16[130]"), *_samples("float32[130]")]
