"""From FP8: ``x = values * scale`` of the block.

The product is taken in float32 and rounded once, to the dtype asked for.
Dims: B matrices, M rows, K columns.
Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.2; the straight-through gradient: Bengio et al. 2013
(arXiv:1308.3432).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.provider import float32_result_at_most
from deepfuse.ir.sizes import check_value
from deepfuse.ops.quantize import (
    BITWISE,
    BLOCKS,
    FP8_DTYPES,
    SCALE_DTYPES,
    as_batch,
    check_blocks,
    expand_scale,
    flat_tile_of,
    quantize,
    scale_shape,
)


def dequantize_ref(values: Tensor, scale: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    # no gradient: that of values would be float8
    values, scale = values.detach(), scale.detach()
    compute = torch.promote_types(values.dtype if values.element_size() > 1 else dtype, torch.float32)
    of_each = expand_scale(scale.to(compute), values.shape, rows, cols)
    # in place: a weight in float32 once less
    return values.to(compute, copy=True).mul_(of_each).to(dtype).contiguous()


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, rows: int, cols: int, power_of_two: bool) -> Tensor:
        return dequantize(*quantize(x, dtype, rows, cols, power_of_two), rows, cols, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        return dy, None, None, None, None


def straight_through(x: Tensor, dtype: torch.dtype, rows: int, cols: int, power_of_two: bool) -> Tensor:
    """``dequantize(quantize(x))`` in the dtype of ``x``, with the gradient of the identity. Arguments of ``quantize``."""
    return _StraightThrough.apply(x, dtype, rows, cols, power_of_two)  # type: ignore[no-untyped-call, no-any-return]


@triton.jit
def widen_scale(scale):
    """A scale as it lies in memory, float32 or the byte of a power of two, as float32."""
    if scale.dtype == tl.uint8:
        bits = scale.to(tl.int32) << 23
        # 2**-127 has no exponent left, and 255 is NaN
        bits = tl.where(scale == 0, 0x400000, tl.where(scale == 255, 0x7FC00000, bits))
        return bits.to(tl.float32, bitcast=True)
    else:  # noqa: RET505 - behind an if with a return Triton would compile both
        return scale


@triton.jit
def load_column_scales(ptrs):
    """Scales that belong to the columns of a product's tile, as float32.

    Each is read twice. Where reads are fewer than threads, Triton takes them for cheap and lets every thread read all
    that it multiplies by: 32 of them, whose addresses took the registers of the sums.
    """
    twice = widen_scale(tl.load(tl.broadcast_to(ptrs[:, None], (ptrs.shape[0], 2))))
    # of integers, as the larger of two NaN must be NaN
    return tl.max(twice.to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)


@triton.jit
def _dequantize_kernel(
    values_ptr,
    scale_ptr,
    y_ptr,
    values_stride_b,
    values_stride_m,
    values_stride_k,
    scale_stride_b,
    scale_stride_m,
    scale_stride_k,
    M,
    K,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per tile, whose rows (columns) lie in one block if blocks have 128."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // tiles_m).to(tl.int64)
    tile_m = (tl.program_id(0) % tiles_m).to(tl.int64)
    tile_k = tl.program_id(1).to(tl.int64)
    values_ptr += b * values_stride_b
    scale_ptr += b * scale_stride_b
    y_ptr += b * M * K
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (m < M)[:, None] & (k < K)[None, :]
    values_ptrs = values_ptr + m[:, None] * values_stride_m + k[None, :] * values_stride_k
    values = tl.load(values_ptrs, mask=mask, other=0.0).to(tl.float32)
    if ROWS == 0:
        scale = tl.load(scale_ptr + tl.zeros((1, 1), tl.int32))
    elif ROWS == 1:
        scale = tl.load(scale_ptr + m * scale_stride_m + tile_k * scale_stride_k, mask=m < M)[:, None]
    elif COLS == 1:
        scale = tl.load(scale_ptr + tile_m * BLOCK_M // ROWS * scale_stride_m + k * scale_stride_k, mask=k < K)[None, :]
    else:
        one = tl.zeros((1, 1), tl.int32)
        scale = tl.load(scale_ptr + tile_m * BLOCK_M // ROWS * scale_stride_m + tile_k * scale_stride_k + one)
    y = values * widen_scale(scale)
    tl.store(y_ptr + m[:, None] * K + k[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def _launch(values: Tensor, scale: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    y = torch.empty(values.shape, dtype=dtype, device=values.device)
    if y.numel() == 0:
        return y
    values, scale = as_batch(values), as_batch(in_memory(scale))
    B, M, K = values.shape
    block_m, block_k, num_warps = flat_tile_of(M)
    _dequantize_kernel[(B * triton.cdiv(M, block_m), triton.cdiv(K, block_k))](
        values,
        scale,
        y,
        *values.stride(),
        *scale.stride(),
        M,
        K,
        ROWS=rows,
        COLS=cols,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=num_warps,
    )
    return y


def in_memory(scale: Tensor) -> Tensor:
    """A scale as kernels take it: Triton has no UE8M0, so its bytes."""
    return scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale


def _check(values: Tensor, scale: Tensor, rows: int, cols: int, dtype: torch.dtype) -> None:
    if values.ndim < 2:
        raise ValueError(f"dequantize: want values [..., M, K], got {list(values.shape)}")
    check_blocks("dequantize", values.dtype, rows, cols)
    check_scale("dequantize", "scale", scale, scale_shape(values.shape, rows, cols))
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"dequantize: want dtype float16, bfloat16, float32 or float64, got {dtype}")


def check_scale(op: str, name: str, scale: Tensor, shape: Sequence[Any]) -> None:
    """Refuse scales of another dtype or shape."""
    if scale.dtype not in SCALE_DTYPES:
        raise TypeError(f"{op}: want {name} in float32 or float8_e8m0fnu, got {scale.dtype}")
    if scale.ndim != len(shape):
        raise ValueError(f"{op}: want {name} {list(shape)}, got {list(scale.shape)}")
    for size, wanted in zip(scale.shape, shape, strict=True):
        # symbolic sizes are compared when they are known
        check_value(size == wanted, lambda: f"{op}: want {name} {list(shape)}, got {list(scale.shape)}")


def _fake(values: Tensor, scale: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(values.shape, dtype=dtype, device=values.device)


def _cost(values: Tensor, scale: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Cost:
    return Cost(flops=values.numel(), bytes=tensor_bytes(values, scale) + values.numel() * dtype.itemsize)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, int, int, torch.dtype]]:
    for i, (rows, cols) in enumerate(BLOCKS):
        for j, shape in enumerate([(1, 128), (0, 128), (5, 200), (130, 576)]):
            x = torch.randn(shape, device=device)
            values, scale = quantize(x, FP8_DTYPES[(i + j) % 2], rows, cols, (i + j // 2) % 2 == 1)
            yield values, scale, rows, cols, dtype
        values, scale = quantize(torch.randn(140, 300, device=device), FP8_DTYPES[0], rows, cols, False)
        # columns contiguous
        yield values.t().contiguous().t(), scale, rows, cols, dtype
        # several matrices, and those transposed: a weight read the other way round
        values, scale = quantize(torch.randn(2, 3, 140, 7, device=device), FP8_DTYPES[0], rows, cols, i % 2 == 0)
        yield values, scale, rows, cols, dtype
        if rows == cols:
            yield values.mT, scale.mT, rows, cols, dtype


dequantize = define(
    "dequantize(Tensor values, Tensor scale, int rows, int cols, ScalarType dtype) -> Tensor",
    reference=dequantize_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    tolerance=BITWISE,
)
"""Multiply each block by its scale. Defined bit by bit; has no gradient (see :func:`straight_through`).

Args:
    values: ``[..., M, K]``, one matrix or many, ``float8_e4m3fn`` or ``float8_e5m2``, any strides.
    scale: ``[..., ceil(M / rows), ceil(K / cols)]`` (``[..., 1, 1]`` for 0x0), float32 or ``float8_e8m0fnu``, any
        strides.
    rows, cols: of a block; 1x128, 128x1, 128x128, or 0x0 for one scale a matrix.
    dtype: of the result: float16, bfloat16, float32 or float64.

Returns:
    ``[..., M, K]``, contiguous. NaN wherever value or scale is.

Raises:
    ValueError: ``values`` has fewer than two dimensions, ``scale`` has another shape, or no such block.
    TypeError: dtypes other than these.
"""

dequantize.provide("triton", _launch, priority={"cuda": 10}, supports=float32_result_at_most)
