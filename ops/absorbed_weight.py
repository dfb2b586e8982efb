"""The two matrices of ``kv_b_proj`` that absorbed attention multiplies by, where they lie: ``[W^UK | W^UV]`` of each head.

Rows ``h (N + V)`` to ``h (N + V) + N`` of the weight are head h's ``W^UK``, the V behind them its ``W^UV``. A weight in FP8
is dequantized in the tile that is multiplied, so that no copy of it is written and read.
Dims: H heads, N nope width, V value width, C latent rank.
Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.2; FP8 weights: DeepSeek-V3 (arXiv:2412.19437), section 3.3.2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ops.dequantize import check_scale, dequantize_ref, in_memory, widen_scale
from deepfuse.ops.quantize import FP8_DTYPES, quantize_ref, scale_shape


def per_head(weight: Tensor, weight_scale: Tensor | None, H: int, dtype: torch.dtype) -> Tensor:
    """``[H, N + V, C]`` numbers of a weight ``[H (N + V), C]``; one in FP8 comes with its scales, and in ``dtype``."""
    if weight_scale is not None:
        weight = dequantize_ref(weight, weight_scale, 128, 128, dtype)
    return weight.unflatten(0, (H, weight.shape[0] // H))


@triton.jit
def weight_tile(
    weight_ptrs, scale_ptr, first_row, row, num_rows, mask, scale_stride, num_scales, FP8: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile in ``DTYPE``: of ``first_row`` and those behind it that ``row``, 0 to 127, counts, ``num_rows`` of them live.

    The columns of one in FP8 lie in one block. Its rows lie in two at most, whose scales are all that is read: a scale
    for each row would be one for each register.
    """
    weight = tl.load(weight_ptrs, mask=mask, other=0.0)
    if FP8:
        block = first_row // 128
        scale = widen_scale(tl.load(scale_ptr + block * scale_stride))
        next_scale = widen_scale(tl.load(scale_ptr + tl.minimum(block + 1, num_scales - 1) * scale_stride))
        scale = tl.where(row < (128 - first_row % 128).to(tl.int32), scale, next_scale)
        # rows of others may have the scale NaN, and NaN times zero is not zero
        weight = (weight.to(tl.float32) * tl.where(row < num_rows, scale, 0.0)).to(DTYPE)
    return weight


def weight_arguments(weight: Tensor, weight_scale: Tensor | None) -> tuple[Tensor, Tensor, list[int]]:
    """What kernels take: the weight, its scales (the weight again where it has none); strides of both, rows of scales."""
    scale = weight if weight_scale is None else in_memory(weight_scale)
    return weight, scale, [*weight.stride(), *scale.stride(), scale.shape[0]]


def weight_bytes(weight: Tensor, weight_scale: Tensor | None, H: int, rows: int) -> int:
    """Bytes of ``rows`` rows of each head; of a block that ends in other rows, its share."""
    numbers = H * rows * weight.shape[1]
    scales = 0 if weight_scale is None else weight_scale.numel() * weight_scale.element_size()
    return numbers * weight.element_size() + scales * H * rows // max(weight.shape[0], 1)


def check_weight(op: str, q: Tensor, weight: Tensor, weight_scale: Tensor | None, part: int) -> None:
    """Refuse a weight that has no rows for the heads of ``q [T, H, ...]``, ``part`` of each, or no scales that fit."""
    H = q.shape[1]
    if weight.ndim != 2 or H == 0 or weight.shape[0] % H or weight.shape[0] // H < part:
        raise ValueError(
            f"{op}: want weight [H (N + V), C] of {H} heads, {part} or more rows each, got {list(weight.shape)}"
        )
    if weight_scale is None:
        if weight.dtype != q.dtype:
            raise TypeError(
                f"{op}: want weight in the dtype of the queries or with scales, got {weight.dtype} and {q.dtype}"
            )
        return
    if weight.dtype not in FP8_DTYPES:
        raise TypeError(f"{op}: want weight in float8_e4m3fn or float8_e5m2 where it has scales, got {weight.dtype}")
    check_scale(op, "weight_scale", weight_scale, scale_shape(weight.shape, 128, 128))


def sample_weight(
    H: int, rows: int, C: int, kind: str, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """A weight of ``H`` heads and its scales: ``kind`` is numbers, fp8, or fp8 with powers of two."""
    weight = torch.randn(H * rows, C, device=device, dtype=dtype) / max(C, 1) ** 0.5
    if kind == "numbers":
        return weight, None
    return quantize_ref(weight, torch.float8_e4m3fn, 128, 128, kind == "powers of two")
