"""A matrix of its own for each group of rows, both in FP8: ``y[m] = dequant(weight)[group of m] @ dequant(x)[m]``.

    group e owns rows offsets[e-1] .. offsets[e]

Products are FP8; their sums are multiplied by both scales and added up in float32 every 128 of K, since the tensor
cores of Hopper keep about 14 bits while they accumulate.
Dims: M rows, E groups (experts), K inputs, N outputs, B = ceil(K / 128) blocks of K.
Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.2; groups as in ``grouped_matmul``.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.interpreter import interpreted
from deepfuse.ir.op import define
from deepfuse.ir.private import materialize
from deepfuse.ir.provider import at_most, float32_result_at_most
from deepfuse.ops.dequantize import check_scale, dequantize_ref, in_memory, widen_scale
from deepfuse.ops.fp8_matmul import gluon_refuses
from deepfuse.ops.grouped_matmul import few_rows, group_of_rows, rows_of_tile
from deepfuse.ops.groups import groups
from deepfuse.ops.k_major import k_major
from deepfuse.ops.quantize import FP8_DTYPES, quantize_ref, scale_shape


def fp8_grouped_matmul_ref(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    check_ends("fp8_grouped_matmul", offsets, x.shape[0])
    compute = torch.promote_types(dtype, torch.float32)
    x_MK = dequantize_ref(x, x_scale, 1, 128, compute)
    y_MN = x_MK.new_zeros(x.shape[0], weight.shape[1])
    for e, rows in groups(offsets):
        # a matrix at a time: all of them in float32 may be more than memory holds
        torch.mm(x_MK[rows], dequantize_ref(weight[e], weight_scale[e], 128, 128, compute).t(), out=y_MN[rows])
    return y_MN.to(dtype)


def _gather(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    """Fused by Inductor into one loop: no copy of a weight is made."""
    group_M = group_of_rows(x.shape[0], offsets)
    compute = torch.promote_types(dtype, torch.float32)
    weight_MNK = dequantize_ref(weight[group_M], weight_scale[group_M], 128, 128, compute)
    x_MK = materialize(dequantize_ref(x, x_scale, 1, 128, compute))
    return (weight_MNK * x_MK[:, None]).sum(-1).to(dtype)


def check_ends(op: str, offsets: Tensor, M: int) -> None:
    """Refuse offsets that are no ends of groups. Reads them, which only a reference may."""
    ends = offsets.tolist()
    if ends and (ends != sorted(ends) or ends[0] < 0 or ends[-1] != M):
        raise ValueError(f"{op}: want offsets that never decrease and end at M = {M}, got {ends}")


@triton.jit
def _fp8_grouped_matmul_kernel(
    x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, ends_ptr, y_ptr, x_stride, x_scale_stride_e, x_scale_stride_m,
    x_scale_stride_k, weight_stride_e, weight_stride_n, weight_scale_stride_e, weight_scale_stride_n,
    weight_scale_stride_k, M, E, N, K, capacity, row_tiles, MASKED: tl.constexpr, WHOLE_K: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RASTER: tl.constexpr, SWAP: tl.constexpr,
    DOT_FLOAT32: tl.constexpr,
):  # fmt: skip
    """One tile of one group's rows a program. The grid holds as many tiles as there can be; the surplus returns.

    MASKED: group e's rows begin at ``e * capacity``, and ``ends`` are their counts; rows past them become zeros.
    SWAP: the tile is computed transposed, so that the 64 rows that tensor cores want are the weight's.
    """
    # RASTER row tiles go through the columns together: x and weight are then read again from L2, not from memory
    band = tl.program_id(0) // (RASTER * tl.cdiv(N, BLOCK_N)) * RASTER
    in_band = tl.program_id(0) % (RASTER * tl.cdiv(N, BLOCK_N))
    band_tiles = tl.minimum(row_tiles - band, RASTER)
    tile = band + in_band % band_tiles
    n0 = (in_band // band_tiles) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)

    if MASKED:
        tiles_per_group = tl.cdiv(capacity, BLOCK_M)
        group = tile // tiles_per_group
        m = (tile % tiles_per_group) * BLOCK_M + tl.arange(0, BLOCK_M)
        count = tl.minimum(tl.load(ends_ptr + group), capacity)
        live = m < count
        m_read = tl.maximum(tl.minimum(m, count - 1), 0)
        written = m < capacity
        depth = tl.where(tl.sum(live.to(tl.int32), 0) > 0, K, 0)
        x_ptr += group.to(tl.int64) * capacity * x_stride
        y_ptr += group.to(tl.int64) * capacity * N
        x_scale_ptr += group.to(tl.int64) * x_scale_stride_e
    else:
        group, begin, end = rows_of_tile(ends_ptr, tile, E, BLOCK_E, BLOCK_M)
        if group >= E:
            return
        m = begin + tl.arange(0, BLOCK_M)
        # wrong offsets must not reach what is not x
        live = (m >= 0) & (m < tl.minimum(end, M))
        m_read = tl.maximum(tl.minimum(m, tl.minimum(end, M) - 1), 0)
        written = live
        depth = K

    # of rows: pointers to every element would take the registers of the sums. Beyond the last row the last is read again,
    # so that loads need no mask; what comes of it is not stored
    m_read, n_read = m_read.to(tl.int64), tl.minimum(n, N - 1).to(tl.int64)
    x_rows = x_ptr + m_read * x_stride
    weight_rows = weight_ptr + group.to(tl.int64) * weight_stride_e + n_read * weight_stride_n
    x_scale_ptrs = x_scale_ptr + m_read * x_scale_stride_m
    # one number for the tile, read once a row: a scalar in a pipelined loop was seen to race (tritonbench 1163)
    weight_scale_ptrs = (
        weight_scale_ptr
        + group.to(tl.int64) * weight_scale_stride_e
        + (n0 // BLOCK_K).to(tl.int64) * weight_scale_stride_n
        + tl.zeros((BLOCK_M,), tl.int64)
    )
    acc = tl.zeros((BLOCK_N if SWAP else BLOCK_M, BLOCK_M if SWAP else BLOCK_N), tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if WHOLE_K:
            x, weight = tl.load(x_rows[:, None] + k[None, :]), tl.load(weight_rows[:, None] + k[None, :])
        else:
            x = tl.load(x_rows[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0)
            weight = tl.load(weight_rows[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0)
        scale = widen_scale(tl.load(x_scale_ptrs)) * widen_scale(tl.load(weight_scale_ptrs))
        if DOT_FLOAT32:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        # a fresh accumulator each time
        if SWAP:
            acc += tl.dot(weight, tl.trans(x), input_precision="ieee") * scale[None, :]
        else:
            acc += tl.dot(x, tl.trans(weight), input_precision="ieee") * scale[:, None]
        x_scale_ptrs += x_scale_stride_k
        weight_scale_ptrs += weight_scale_stride_k
    y = acc.to(y_ptr.dtype.element_ty)
    if SWAP:
        y = tl.trans(y)
    if MASKED:
        y = tl.where(live[:, None], y, 0.0)
    tl.store(y_ptr + m.to(tl.int64)[:, None] * N + n[None, :], y, mask=written[:, None] & (n < N)[None, :])


def _launch(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[1], dtype=dtype)
    return launch_groups(x, x_scale[None], weight, weight_scale, offsets, y, capacity=None)


def launch_groups(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    ends: Tensor,
    y: Tensor,
    *,
    capacity: int | None,
) -> Tensor:
    """Fill ``y [M, N]``: groups end at ``ends``, or with a ``capacity`` have so many rows, of which ``ends`` count.

    ``x_scale`` is ``[1, M, B]``, or ``[E, capacity, B]``.
    """
    M, (E, N, K) = x.shape[0], weight.shape
    if y.numel() == 0:
        return y
    if K == 0:
        return y.zero_()
    x, weight = k_major(x), k_major(weight)
    # zeros where K was no multiple of 16
    K = x.shape[1]
    # of the rows a group has on average, so that few rows of a tile are padding
    rows = triton.next_power_of_2(triton.cdiv(M, E) if capacity is None else capacity)
    block_m, block_n, num_warps, num_stages = _tile(rows)
    # a group wastes less than one tile
    row_tiles = M // block_m + min(E, M) if capacity is None else E * triton.cdiv(capacity, block_m)
    x_scale, weight_scale = in_memory(x_scale), in_memory(weight_scale)
    _fp8_grouped_matmul_kernel[(row_tiles * triton.cdiv(N, block_n),)](
        x,
        x_scale,
        weight,
        weight_scale,
        ends.contiguous(),
        y,
        x.stride(0),
        *x_scale.stride(),
        *weight.stride()[:2],
        *weight_scale.stride(),
        M,
        E,
        N,
        K,
        capacity or 0,
        row_tiles,
        MASKED=capacity is not None,
        WHOLE_K=K % 128 == 0,
        BLOCK_E=triton.next_power_of_2(E),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=128,
        RASTER=8,
        SWAP=block_m < 64,
        DOT_FLOAT32=interpreted(),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return y


def _tile(rows: int) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, warps and stages, from the rows of a group.

    A sum and what it adds to take twice the registers of one: 128 a thread for 128 x 128 in eight warps.
    """
    if rows <= 32:
        # reads the weight once and little else: 100 KiB in flight a program, two programs a multiprocessor
        return max(rows, 16), 128, 4, 5
    if rows <= 64:
        return 64, 128, 8, 4
    return 128, 128, 8, 4


def _gluon(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    # here, since Gluon takes as long to import as all ops together
    from deepfuse.ops.fp8_grouped_matmul_gluon import launch

    return launch(x, x_scale, weight, weight_scale, offsets, dtype)


def _gluon_supports(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, dtype: torch.dtype
) -> str | None:
    E, N, _ = weight.shape
    if not isinstance(E, int) or at_most(x.shape[0], 32 * E):
        return "made for more than 32 rows a group"
    return gluon_refuses(x, x_scale, weight, N, dtype)


def _check(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, dtype: torch.dtype
) -> None:
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or offsets.shape != weight.shape[:1]:
        raise ValueError(
            "fp8_grouped_matmul: want x [M, K], weight [E, N, K] and offsets [E], got "
            f"{list(x.shape)}, {list(weight.shape)} and {list(offsets.shape)}"
        )
    check_groups("fp8_grouped_matmul", x, x_scale, weight, weight_scale, offsets, dtype)


def check_groups(
    op: str, x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, ends: Tensor, dtype: torch.dtype
) -> None:
    """What both layouts want of scales and dtypes."""
    if x.dtype not in FP8_DTYPES or weight.dtype not in FP8_DTYPES or ends.dtype != torch.int32:
        raise TypeError(
            f"{op}: want float8 x and weight and int32 offsets or counts, got {x.dtype}, {weight.dtype} and {ends.dtype}"
        )
    check_scale(op, "x_scale", x_scale, (*x.shape[:-1], _blocks(x.shape[-1])))
    check_scale(op, "weight_scale", weight_scale, scale_shape(weight.shape, 128, 128))
    if x_scale.dtype != weight_scale.dtype:
        raise TypeError(f"{op}: want two scales of one dtype, got {x_scale.dtype} and {weight_scale.dtype}")
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):  # float64 by the reference
        raise TypeError(f"{op}: want a result in bfloat16 or float32, got {dtype}")


def _blocks(size: int) -> int:
    return (size + 127) // 128


def _fake(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1], dtype=dtype)


def _cost(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Cost:
    M, (E, N, K) = x.shape[0], weight.shape
    # with fewer rows than at most one weight a row is read
    read = min(M, E) if isinstance(M, int) else E
    scales_N, scales_K = scale_shape(weight.shape[1:], 128, 128)
    weights = read * (N * K * weight.element_size() + scales_N * scales_K * weight_scale.element_size())
    return Cost(flops=2 * M * N * K, bytes=tensor_bytes(x, x_scale) + weights + M * N * dtype.itemsize)


def _samples(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, torch.dtype]]:
    # rows of each group: one row; empty groups; all in one; more than a tile, several blocks of both widths, uneven
    for counts, N, K, power_of_two in [
        ([1], 8, 16, False),
        ([2, 0, 3, 1], 12, 20, True),
        ([0, 5, 0], 144, 128, False),
        ([0, 0], 8, 8, False),
        ([9, 140, 1], 72, 304, False),
    ]:
        weight = torch.randn(len(counts), N, K, device=device) / max(K, 1) ** 0.5
        offsets = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
        x = torch.randn(sum(counts), K, device=device)
        yield (
            *quantize_ref(x, torch.float8_e4m3fn, 1, 128, power_of_two),
            *quantize_ref(weight, torch.float8_e4m3fn, 128, 128, power_of_two),
            offsets,
            dtype,
        )


fp8_grouped_matmul = define(
    "fp8_grouped_matmul(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor offsets, ScalarType dtype)"
    " -> Tensor",
    reference=fp8_grouped_matmul_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    inline_reference=False,
)
"""Multiply each group's rows by its matrix, in FP8.

Args:
    x: ``[M, K]`` float8, rows sorted by group.
    x_scale: ``[M, ceil(K / 128)]``, one for each row and 128 columns; ``quantize`` gives the memory layout.
    weight: ``[E, N, K]`` float8. Copied where K is not contiguous, as in the gradient of the input, or no multiple of 16.
    weight_scale: ``[E, ceil(N / 128), ceil(K / 128)]``, one for each 128 x 128; dtype of ``x_scale``.
    offsets: ``[E]`` int32, end of each group's rows, never decreasing; the last is M. Stays on the device: no
        synchronisation.
    dtype: of the result, bfloat16 or float32.

Returns:
    ``[M, N]``; each 128 of K summed by themselves, then added up in float32.

Raises:
    ValueError: shapes do not fit; from the reference also, offsets are out of range. On a GPU, where nobody looks at
        them, rows that no group owns stay undefined, and offsets past M reach no memory but y's.
    TypeError: a dtype is another, or the two scales' differ.
"""

# not before "triton" until it has been measured against it
fp8_grouped_matmul.provide("gluon", _gluon, priority={"cuda": 5}, supports=_gluon_supports)
fp8_grouped_matmul.provide("triton", _launch, priority={"cuda": 10}, supports=float32_result_at_most)
fp8_grouped_matmul.provide("gather", _gather, priority={"cpu": 10}, supports=few_rows, inline=True)
