"""To FP8 with scales known before: ``values = round(clamp(x / scale, -max, max))``, counting what was clamped.

For scales that were calibrated once and are then fixed: nothing has to be read twice or waited for, but values beyond
``max * scale`` are cut off, and a count that grows says that the scales no longer fit.

Dims: M rows, K columns.
Source: Jacob et al. 2018 (arXiv:1712.05877), section 3 (ranges learned beforehand); the rounding is that of
`ops/quantize.py`.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.provider import float32_at_most
from deepfuse.ops.dequantize import check_scale, in_memory, widen_scale
from deepfuse.ops.fp8_rounding import quotient, saturate
from deepfuse.ops.quantize import (
    BITWISE,
    BLOCKS,
    FP8_DTYPES,
    check_blocks,
    empty_scale,
    expand_scale,
    flat_tile_of,
    quantize,
    round_to_fp8,
    scale_shape,
)


def quantize_static_ref(x: Tensor, scale: Tensor, dtype: torch.dtype, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(x.dtype, torch.float32)
    # no gradient comes through float8
    x_MK = x.detach().to(compute)
    x_MK = torch.where(x_MK.isinf(), float("nan"), x_MK)
    scale_MK = expand_scale(scale.detach().to(compute), x.shape, rows, cols)
    scale_MK = torch.where(scale_MK > 0, scale_MK, float("nan"))
    values_MK = round_to_fp8(x_MK, scale_MK, dtype)
    beyond_MK = (x_MK / scale_MK).abs() > torch.finfo(dtype).max
    return values_MK.contiguous(), beyond_MK.sum()


@triton.jit
def _quantize_static_kernel(
    x_ptr,
    scale_ptr,
    values_ptr,
    clipped_ptr,
    x_stride_m,
    x_stride_k,
    scale_stride_m,
    scale_stride_k,
    M,
    K,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FP8_MAX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per tile, whose rows (columns) lie in one block if blocks have 128."""
    tile_m = tl.program_id(0).to(tl.int64)
    tile_k = tl.program_id(1).to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (m < M)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + m[:, None] * x_stride_m + k[None, :] * x_stride_k, mask=mask, other=0.0).to(tl.float32)
    if ROWS == 0:
        scale = tl.load(scale_ptr + tl.zeros((1, 1), tl.int32))
    elif ROWS == 1:
        scale = tl.load(scale_ptr + m * scale_stride_m + tile_k * scale_stride_k, mask=m < M)[:, None]
    elif COLS == 1:
        scale = tl.load(scale_ptr + tile_m * BLOCK_M // ROWS * scale_stride_m + k * scale_stride_k, mask=k < K)[None, :]
    else:
        one = tl.zeros((1, 1), tl.int32)
        scale = tl.load(scale_ptr + tile_m * BLOCK_M // ROWS * scale_stride_m + tile_k * scale_stride_k + one)
    scale = widen_scale(scale)
    q = quotient(x, tl.where(scale > 0, scale, float("nan")))
    # an infinity is not clipped, but no number
    q = tl.where(tl.abs(x) < float("inf"), q, float("nan"))
    values = saturate(q, FP8_MAX).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + m[:, None] * K + k[None, :], values, mask=mask)
    clipped = tl.sum(((tl.abs(q) > FP8_MAX) & mask).to(tl.int32).reshape(BLOCK_M * BLOCK_K), 0)
    if clipped > 0:
        tl.atomic_add(clipped_ptr, clipped.to(tl.int64))


def _launch(x: Tensor, scale: Tensor, dtype: torch.dtype, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    values = torch.empty((M, K), dtype=dtype, device=x.device)
    clipped = torch.zeros((), dtype=torch.int64, device=x.device)
    if values.numel() == 0:
        return values, clipped
    block_m, block_k, num_warps = flat_tile_of(M)
    _quantize_static_kernel[(triton.cdiv(M, block_m), triton.cdiv(K, block_k))](
        x,
        in_memory(scale),
        values,
        clipped,
        *x.stride(),
        *scale.stride(),
        M,
        K,
        ROWS=rows,
        COLS=cols,
        FP8_MAX=torch.finfo(dtype).max,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=num_warps,
    )
    return values, clipped


def _check(x: Tensor, scale: Tensor, dtype: torch.dtype, rows: int, cols: int) -> None:
    check_blocks("quantize_static", dtype, rows, cols)
    if x.ndim != 2:
        raise ValueError(f"quantize_static: want x [M, K], got {list(x.shape)}")
    if not x.is_floating_point() or x.element_size() < 2:
        raise TypeError(f"quantize_static: want x in float16, bfloat16, float32 or float64, got {x.dtype}")
    check_scale("quantize_static", "scale", scale, scale_shape(x.shape, rows, cols))


def _fake(x: Tensor, scale: Tensor, dtype: torch.dtype, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    return values, torch.empty((), dtype=torch.int64, device=x.device)


def _cost(x: Tensor, scale: Tensor, dtype: torch.dtype, rows: int, cols: int) -> Cost:
    # division, two bounds, comparison and sum
    return Cost(flops=5 * x.numel(), bytes=tensor_bytes(x, scale) + x.numel() + 8)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, torch.dtype, int, int]]:
    for i, (rows, cols) in enumerate(BLOCKS):
        for j, shape in enumerate([(1, 128), (0, 128), (5, 200), (130, 576)]):
            fp8, power_of_two = FP8_DTYPES[(i + j) % 2], (i + j // 2) % 2 == 1
            x = torch.randn(shape, device=device, dtype=dtype)
            # scales of other numbers, half as large: some are clipped
            _, scale = quantize(torch.randn(shape, device=device) / 2, fp8, rows, cols, power_of_two)
            yield x, scale, fp8, rows, cols
        x = torch.randn(300, 140, device=device, dtype=dtype).t()
        yield x, empty_scale(x, rows, cols, False).fill_(0.005), FP8_DTYPES[0], rows, cols


quantize_static = define(
    "quantize_static(Tensor x, Tensor scale, ScalarType dtype, int rows, int cols) -> (Tensor values, Tensor clipped)",
    reference=quantize_static_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    tolerance=BITWISE,
)
"""Round to FP8 with given scales, saturating. Defined bit by bit; has no gradient (as ``quantize``).

NaN and infinities become NaN, as does all of a block whose scale is no positive finite number: what is no number never
becomes one.

Args:
    x: ``[M, K]``, any strides; float16, bfloat16 or float32 (float64 by the reference).
    scale: ``[ceil(M / rows), ceil(K / cols)]`` (``[1, 1]`` for 0x0), float32 or ``float8_e8m0fnu``, any strides.
    dtype: ``float8_e4m3fn`` or ``float8_e5m2``.
    rows, cols: of a block; 1x128, 128x1, 128x128, or 0x0 for one scale.

Returns:
    ``values [M, K]``, contiguous, and ``clipped``, an int64 scalar on the device of ``x``: how many finite elements have
    ``|x / scale|`` (in float32) beyond the largest finite value of ``dtype``.

Raises:
    ValueError: ``x`` is no matrix, ``scale`` has another shape, or no such block.
    TypeError: dtypes other than these.
"""

quantize_static.provide("triton", _launch, priority={"cuda": 10}, supports=float32_at_most)
