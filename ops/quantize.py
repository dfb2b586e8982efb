"""To FP8, with a scale for each block: ``scale = max(amax, 1e-4) / max``, ``values = round(clamp(x / scale, -max, max))``.

``max`` is the largest finite value, 448 (E4M3) or 57344 (E5M2). A block is 1x128 (activations), 128x1 (what the weight
gradient sums over tokens), 128x128 (weights), or a whole matrix. Each step rounds to nearest, ties to even: ``max(amax,
1e-4)`` over ``max`` to float32, ``x / scale`` to float32, and that to FP8. On request scales are rounded up to a power of
two, which makes dequantization exact. The same steps within a kernel, which fused forms share, are `fp8_rounding.py`.

Dims: B matrices, M rows, K columns.
Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.2; `inference/kernel.py` of deepseek-ai/DeepSeek-V3 (the 1e-4, and
the division by the scale); formats: Micikevicius et al. 2022 (arXiv:2209.05433), table 1.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.provider import float32_at_most
from deepfuse.ir.tolerance import EXACT
from deepfuse.ops.fp8_rounding import amax_bits, quotient_for_fp8, scale_from_amax_bits

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_DTYPES = (torch.float32, torch.float8_e8m0fnu)
BLOCKS = ((1, 128), (128, 1), (128, 128), (0, 0))
"""Rows and columns that share a scale; 0x0 is the whole matrix."""
LEAST_AMAX = 1e-4
"""Keeps the scale of a block of zeros, or of noise, away from zero."""
BITWISE = dict.fromkeys(
    (*FP8_DTYPES, *SCALE_DTYPES, torch.float16, torch.bfloat16, torch.float64),
    EXACT,
)
"""Tolerance of ops whose every rounding is stated."""


def quantize_ref(x: Tensor, dtype: torch.dtype, rows: int, cols: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    # no gradient comes through float8 (it would itself be rounded to float8), so none is recorded
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    scale = block_scale(block_amax(x, rows, cols), dtype, power_of_two)
    values = round_to_fp8(x, expand_scale(scale, x.shape, rows, cols), dtype)
    return values.contiguous(), in_scale_layout(scale, rows, cols, power_of_two)


def block_amax(x: Tensor, rows: int, cols: int) -> Tensor:
    """Largest magnitude in each block, ``[..., ceil(M / rows), ceil(K / cols)]``; NaN where the block has one."""
    if rows == 0:
        return functional.pad(x.abs().flatten(-2), (0, 1)).amax(-1)[..., None, None]
    M, K = x.shape[-2:]
    padded = functional.pad(x.abs(), (0, -K % cols, 0, -M % rows))
    blocks_M, blocks_K = padded.shape[-2] // rows, padded.shape[-1] // cols
    return padded.reshape(*x.shape[:-2], blocks_M, rows, blocks_K, cols).amax((-3, -1))


def block_scale(amax: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """Scale in float32 for the largest magnitude of a block: the rule both quantize and its fused forms follow."""
    scale = (amax.clamp(min=LEAST_AMAX) / torch.finfo(dtype).max).to(torch.float32)
    if not power_of_two:
        return scale
    # any mantissa carries into the exponent; it is then cut off
    up = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(scale.isfinite(), up, float("nan"))


def round_to_fp8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``x / scale`` in FP8, saturated; NaN where the scale is no finite number. ``scale`` has the shape of ``x``."""
    largest = torch.finfo(dtype).max
    # x / inf would be 0, which looks like a number
    divisor = torch.where(scale.isfinite(), scale, float("nan")).to(x.dtype)
    return (x / divisor).clamp(-largest, largest).to(dtype)


def expand_scale(scale: Tensor, shape: torch.Size, rows: int, cols: int) -> Tensor:
    """The scale of every element, ``[..., M, K]``, from one of every block."""
    if rows == 0:
        return scale.expand(shape)
    *outer, M, K = shape
    blocks_M, blocks_K = scale.shape[-2:]
    whole = scale[..., :, None, :, None].expand(*outer, blocks_M, rows, blocks_K, cols)
    return whole.reshape(*outer, blocks_M * rows, blocks_K * cols)[..., :M, :K]


def scale_shape(shape: Sequence[Any], rows: int, cols: int) -> tuple[Any, ...]:
    """Shape of the scales of ``[..., M, K]``."""
    *outer, M, K = shape
    blocks = (1, 1) if rows == 0 else ((M + rows - 1) // rows, (K + cols - 1) // cols)
    return (*outer, *blocks)


def quantized_bytes(shape: Sequence[Any], rows: int, cols: int, power_of_two: bool) -> Any:
    """Bytes of the values and scales of ``[..., M, K]``."""
    return math.prod(shape) + math.prod(scale_shape(shape, rows, cols)) * (1 if power_of_two else 4)


def empty_scale(x: Tensor, rows: int, cols: int, power_of_two: bool) -> Tensor:
    """Memory for the scales of ``x [..., M, K]``, as the matrix product reads them.

    1x128: columns contiguous, each padded to 16 bytes of float32, which is what TMA asks of strides. Else row-major.
    """
    dtype = torch.float8_e8m0fnu if power_of_two else torch.float32
    *outer, M, blocks_K = shape = scale_shape(x.shape, rows, cols)
    if (rows, cols) == (1, 128):
        whole = torch.empty((*outer, blocks_K, (M + 3) // 4 * 4), dtype=dtype, device=x.device).mT
        # not [..., :M, :], which is min(M, ...) long where M is symbolic
        return whole.as_strided(shape, whole.stride())
    return torch.empty(shape, dtype=dtype, device=x.device)


def in_scale_layout(scale: Tensor, rows: int, cols: int, power_of_two: bool) -> Tensor:
    """Scales computed in float32, with the dtype and memory of :func:`empty_scale`."""
    dtype = torch.float8_e8m0fnu if power_of_two else torch.float32
    if (rows, cols) == (1, 128):
        M = scale.shape[-2]
        padded = functional.pad(scale.mT, (0, -M % 4))
        # contiguous() would leave the strides of a tensor without elements as they are
        return padded.clone(memory_format=torch.contiguous_format).to(dtype).mT[..., :M, :]
    return scale.contiguous().to(dtype)


def as_batch(x: Tensor) -> Tensor:
    """``[..., M, K]`` as kernels take it, ``[B, M, K]``; a copy only where no view can have three dimensions."""
    # not -1, which torch cannot tell where M or K is 0
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


@triton.jit
def _quantize_kernel(
    x_ptr,
    amax_ptr,
    values_ptr,
    scale_ptr,
    x_stride_b,
    x_stride_m,
    x_stride_k,
    scale_stride_b,
    scale_stride_m,
    scale_stride_k,
    M,
    K,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FP8_MAX: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per tile. A tile is one block, or several side by side in the direction in which blocks measure 1."""
    # an empty matrix has a tile too: of a whole matrix there always is a scale
    tiles_m = tl.maximum(tl.cdiv(M, BLOCK_M), 1)
    b = (tl.program_id(0) // tiles_m).to(tl.int64)
    tile_m = (tl.program_id(0) % tiles_m).to(tl.int64)
    tile_k = tl.program_id(1).to(tl.int64)
    x_ptr += b * x_stride_b
    values_ptr += b * M * K
    scale_ptr += b * scale_stride_b
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (m < M)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + m[:, None] * x_stride_m + k[None, :] * x_stride_k, mask=mask, other=0.0).to(tl.float32)
    if ROWS == 0:
        # a tensor of one element, so that it has a shape
        bits = tl.load(amax_ptr + b + tl.zeros((1, 1), tl.int32))
        scale, stored = scale_from_amax_bits(bits, FP8_MAX, POWER_OF_TWO)
        if tile_m + tile_k == 0:
            tl.store(scale_ptr + tl.zeros((1, 1), tl.int32), stored)
    elif ROWS == 1:
        scale, stored = scale_from_amax_bits(amax_bits(x, 1), FP8_MAX, POWER_OF_TWO)
        tl.store(scale_ptr + m * scale_stride_m + tile_k * scale_stride_k, stored, mask=m < M)
        scale = scale[:, None]
    elif COLS == 1:
        scale, stored = scale_from_amax_bits(amax_bits(x, 0), FP8_MAX, POWER_OF_TWO)
        tl.store(scale_ptr + tile_m * scale_stride_m + k * scale_stride_k, stored, mask=k < K)
        scale = scale[None, :]
    else:
        bits = tl.max(amax_bits(x, 1)[None, :], 1)
        scale, stored = scale_from_amax_bits(bits, FP8_MAX, POWER_OF_TWO)
        one = tl.zeros((1,), tl.int32)
        tl.store(scale_ptr + tile_m * scale_stride_m + tile_k * scale_stride_k + one, stored)
        scale = scale[:, None]
    values = quotient_for_fp8(x, scale, FP8_MAX).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + m[:, None] * K + k[None, :], values, mask=mask)


@triton.jit
def _amax_kernel(
    x_ptr,
    amax_ptr,
    x_stride_b,
    x_stride_m,
    x_stride_k,
    M,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
):
    """Largest magnitude of each matrix; one program goes through ``TILES`` tiles of a row of tiles."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // tiles_m).to(tl.int64)
    x_ptr += b * x_stride_b
    m = (tl.program_id(0) % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1).to(tl.int64) * BLOCK_K * TILES
    bits = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    for tile in range(TILES):
        k = first + tile * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = (m < M)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * x_stride_m + k[None, :] * x_stride_k, mask=mask, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    # integers: the result does not depend on who comes first
    tl.atomic_max(amax_ptr + b, tl.max(tl.max(bits, 1), 0))


def _launch(x: Tensor, dtype: torch.dtype, rows: int, cols: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = empty_scale(x, rows, cols, power_of_two)
    if scale.numel() == 0:
        return values, scale
    x, scale_BMK = as_batch(x), as_batch(scale)
    B, M, K = x.shape
    amax = torch.zeros((B,), dtype=torch.int32, device=x.device) if rows == 0 else x
    if rows == 0 and values.numel():
        tiles = min(triton.cdiv(K, 128), 8)
        grid = (B * triton.cdiv(M, 32), triton.cdiv(K, 128 * tiles))
        _amax_kernel[grid](x, amax, *x.stride(), M, K, BLOCK_M=32, BLOCK_K=128, TILES=tiles, num_warps=4)
    if (rows, cols) == (128, 128) and x.stride(-1) != 1:
        # to turn tiles around takes more registers than there are
        x = x.contiguous()
    block_m, block_k, num_warps = tile_of(M, rows, cols)
    grid = (B * max(triton.cdiv(M, block_m), 1), max(triton.cdiv(K, block_k), 1))
    _quantize_kernel[grid](
        x,
        amax,
        values,
        scale_BMK.view(torch.uint8) if power_of_two else scale_BMK,
        *x.stride(),
        *scale_BMK.stride(),
        M,
        K,
        ROWS=rows,
        COLS=cols,
        FP8_MAX=torch.finfo(dtype).max,
        POWER_OF_TWO=power_of_two,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=num_warps,
    )
    return values, scale


def tile_of(M: int, rows: int, cols: int) -> tuple[int, int, int]:
    """Rows and columns of a tile made of blocks, and its warps."""
    if (rows, cols) == (128, 128):
        # 64 elements a thread
        return 128, 128, 8
    if cols == 1:
        # 128 bytes of each row in bfloat16
        return 128, 64, 8
    return flat_tile_of(M)


def flat_tile_of(M: int) -> tuple[int, int, int]:
    """Rows and columns of a tile in which no row knows of another, and its warps."""
    # 16 elements a thread; a decode step has few rows
    return min(triton.next_power_of_2(max(M, 1)), 16), 128, 4 if M > 4 else 1


def _check(x: Tensor, dtype: torch.dtype, rows: int, cols: int, power_of_two: bool) -> None:
    check_blocks("quantize", dtype, rows, cols)
    if x.ndim < 2:
        raise ValueError(f"quantize: want x [..., M, K], got {list(x.shape)}")
    if not x.is_floating_point() or x.element_size() < 2:
        raise TypeError(f"quantize: want x in float16, bfloat16, float32 or float64, got {x.dtype}")


def check_blocks(op: str, dtype: torch.dtype, rows: int, cols: int) -> None:
    """Refuse what is no format of FP8 or no block of ours."""
    if dtype not in FP8_DTYPES:
        raise TypeError(f"{op}: want dtype float8_e4m3fn or float8_e5m2, got {dtype}")
    if (rows, cols) not in BLOCKS:
        raise ValueError(f"{op}: want blocks of 1x128, 128x1, 128x128 or 0x0 (all), got {rows}x{cols}")


def _fake(x: Tensor, dtype: torch.dtype, rows: int, cols: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    return values, empty_scale(x, rows, cols, power_of_two)


def _cost(x: Tensor, dtype: torch.dtype, rows: int, cols: int, power_of_two: bool) -> Cost:
    # the scale of a whole matrix is known only once all of it was read
    reads = 2 if rows == 0 else 1
    # magnitude, comparison, division, two bounds
    return Cost(flops=5 * x.numel(), bytes=reads * tensor_bytes(x) + quantized_bytes(x.shape, rows, cols, power_of_two))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, torch.dtype, int, int, bool]]:
    e4m3, e5m2 = FP8_DTYPES
    for i, (rows, cols) in enumerate(BLOCKS):
        # one row; no rows; blocks that are not full; whole blocks; 576 columns
        for j, shape in enumerate([(1, 128), (0, 128), (5, 200), (256, 256), (3, 576), (130, 1)]):
            x = torch.randn(shape, device=device, dtype=dtype)
            yield x, (e4m3, e5m2)[(i + j) % 2], rows, cols, (i + j // 2) % 2 == 1
        # columns contiguous, and rows that lie apart
        yield torch.randn(150, 140, device=device, dtype=dtype).t(), e4m3, rows, cols, False
        yield torch.randn(9, 300, device=device, dtype=dtype)[::2, 7:], e4m3, rows, cols, True
        # several matrices, those transposed, and none
        yield torch.randn(2, 3, 7, 140, device=device, dtype=dtype), e5m2, rows, cols, i % 2 == 0
        yield torch.randn(3, 130, 5, device=device, dtype=dtype).mT, e4m3, rows, cols, False
        yield torch.randn(0, 4, 128, device=device, dtype=dtype), e4m3, rows, cols, False


quantize = define(
    "quantize(Tensor x, ScalarType dtype, int rows, int cols, bool power_of_two) -> (Tensor values, Tensor scale)",
    reference=quantize_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    tolerance=BITWISE,
)
"""Round to FP8 with a scale for each block, computed from the values. Defined bit by bit.

A block that holds NaN has the scale NaN; one that holds an infinity has the scale inf (NaN with ``power_of_two``, whose
format has no inf). All values of such a block are NaN: what is no number is passed on, and never becomes one.

It has no gradient: a gradient of ``values`` would be float8 itself. The straight-through gradient belongs to the pair
of this op and ``dequantize``; see :func:`deepfuse.ops.dequantize.straight_through`.

Args:
    x: ``[..., M, K]``, one matrix or many, any strides; float16, bfloat16 or float32 (float64 by the reference).
    dtype: ``float8_e4m3fn`` or ``float8_e5m2``.
    rows, cols: of a block; 1x128, 128x1, 128x128, or 0x0 for one scale a matrix. Blocks at the edge may be partial.
    power_of_two: round scales up to a power of two, and store them as ``float8_e8m0fnu`` (UE8M0).

Returns:
    ``values [..., M, K]``, contiguous. ``scale [..., ceil(M / rows), ceil(K / cols)]`` (``[..., 1, 1]`` for 0x0),
    float32 or ``float8_e8m0fnu``; multiply by it to dequantize. For 1x128 each matrix of it is column-major with
    strides ``(1, ceil(M / 4) * 4)``, else it is contiguous.

Raises:
    ValueError: ``x`` has fewer than two dimensions, or no such block.
    TypeError: ``x`` is not floating point of 16 bits or more, or ``dtype`` is no FP8 format.
"""

quantize.provide("triton", _launch, priority={"cuda": 10}, supports=float32_at_most)
