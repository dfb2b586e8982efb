"""A matrix of its own for each group of rows: ``y[m] = weight[group of m] @ x[m]``.

    group e owns rows offsets[e-1] .. offsets[e]

Dims: M rows, E groups (experts), K inputs, N outputs.
Source: Gale et al. 2022 (arXiv:2211.15841), section 4; offsets as in ``torch.nn.functional.grouped_mm``.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.interpreter import interpreted
from deepfuse.ir.op import define
from deepfuse.ir.private import materialize
from deepfuse.ir.provider import at_most, float32_at_most
from deepfuse.ops.dot import dot
from deepfuse.ops.grouped_matmul_onednn import grouped, refuses
from deepfuse.ops.grouped_matmul_wgrad import (
    GROUPS,
    aligned,
    grouped_matmul_wgrad,
    grouped_mm_refuses,
    largest_tile,
)
from deepfuse.ops.groups import groups

GATHER_ROWS = 64
"""Up to so many rows each reads its group's weight in place, by index, as a fused reduction."""


def grouped_matmul_ref(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for e, rows in groups(offsets):
        torch.mm(x[rows], weight[e].t(), out=y[rows])
    return y


def _gather(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Fused by Inductor into one loop: no copy of a weight is made."""
    compute = torch.promote_types(x.dtype, torch.float32)
    weight_MNK, x_MK = weight[group_of_rows(x.shape[0], offsets)], materialize(x.to(compute))
    return (weight_MNK.to(compute) * x_MK[:, None]).sum(-1).to(x.dtype)


def group_of_rows(M: int, offsets: Tensor) -> Tensor:
    """``[M]``: the group of each row."""
    row_M = torch.arange(M, device=offsets.device)
    return (offsets[None] <= row_M[:, None]).sum(-1)


def few_rows(x: Tensor, *args: Any) -> str | None:
    return None if at_most(x.shape[0], GATHER_ROWS) else f"rows are not known to be at most {GATHER_ROWS}"


@triton.jit
def rows_of_tile(offsets_ptr, tile, E, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of a tile of ``BLOCK_M`` rows, counted through all groups: its group (E past the last), first row and the group's end."""
    e = tl.arange(0, BLOCK_E)
    end_E = tl.load(offsets_ptr + e, mask=e < E, other=0)
    begin_E = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles_E = tl.cdiv(end_E - begin_E, BLOCK_M)
    group = tl.sum((tl.cumsum(tiles_E, 0) <= tile).to(tl.int32), 0)
    tile_in_group = tile - tl.sum(tl.where(e < group, tiles_E, 0), 0)
    begin = tl.sum(tl.where(e == group, begin_E, 0), 0)
    end = tl.sum(tl.where(e == group, end_E, 0), 0)
    return group, begin + tile_in_group * BLOCK_M, end


@triton.jit
def _grouped_matmul_kernel(
    x_ptr,
    weight_ptr,
    offsets_ptr,
    y_ptr,
    x_stride,
    weight_stride_e,
    weight_stride_n,
    weight_stride_k,
    E,
    N,
    K,
    row_tiles,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RASTER: tl.constexpr,
    DOT_FLOAT32: tl.constexpr,
):
    """One tile of one group's rows a program. The grid holds as many tiles as there can be; the surplus returns."""
    # RASTER row tiles go through the columns together: x and weight are then read again from L2, not from memory
    band = tl.program_id(0) // (RASTER * tl.cdiv(N, BLOCK_N)) * RASTER
    in_band = tl.program_id(0) % (RASTER * tl.cdiv(N, BLOCK_N))
    band_tiles = tl.minimum(row_tiles - band, RASTER)
    tile = band + in_band % band_tiles
    n = (in_band // band_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)

    group, begin, end = rows_of_tile(offsets_ptr, tile, E, BLOCK_E, BLOCK_M)
    if group >= E:
        return
    m = begin + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :]
    weight_ptrs = (
        weight_ptr
        + group.to(tl.int64) * weight_stride_e
        + n.to(tl.int64)[None, :] * weight_stride_n
        + k.to(tl.int64)[:, None] * weight_stride_k
    )
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs, mask=(m < end)[:, None] & (k < K - k0)[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=(k < K - k0)[:, None] & (n < N)[None, :], other=0.0)
        acc = dot(x, weight, acc, DOT_FLOAT32)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * weight_stride_k
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(m < end)[:, None] & (n < N)[None, :])


def _launch(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    M, (E, N, K) = x.shape[0], weight.shape
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    block_m, block_n, block_k, num_stages = largest_tile(x, N, K)
    # of the rows a group has on average, so that few rows of a tile are padding
    block_m = min(max(triton.next_power_of_2(triton.cdiv(M, E)), 16), block_m)
    # a group wastes less than one tile
    row_tiles = M // block_m + min(E, M)
    _grouped_matmul_kernel[(row_tiles * triton.cdiv(N, block_n),)](
        x,
        weight,
        offsets.contiguous(),
        y,
        x.stride(0),
        *weight.stride(),
        E,
        N,
        K,
        row_tiles,
        BLOCK_E=triton.next_power_of_2(E),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        RASTER=8,
        DOT_FLOAT32=interpreted(),
        num_warps=8 if block_m * block_n > 64 * 128 else 4,
        num_stages=num_stages,
    )
    return y


def _torch(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[1])
    transposed = weight.stride(1) == 1
    weight_EKN = aligned(weight.transpose(1, 2)) if transposed else aligned(weight).transpose(1, 2)
    return functional.grouped_mm(aligned(x), weight_EKN, offs=offsets.contiguous())


def _torch_supports(x: Tensor, weight: Tensor, offsets: Tensor) -> str | None:
    return grouped_mm_refuses(x, *weight.shape)


def _check(x: Tensor, weight: Tensor, offsets: Tensor) -> None:
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or offsets.shape != weight.shape[:1]:
        raise ValueError(
            "grouped_matmul: want x [M, K], weight [E, N, K] and offsets [E], got "
            f"{list(x.shape)}, {list(weight.shape)} and {list(offsets.shape)}"
        )
    if x.dtype != weight.dtype or offsets.dtype != torch.int32:
        raise TypeError(
            "grouped_matmul: want x and weight of one dtype and int32 offsets, got "
            f"{x.dtype}, {weight.dtype} and {offsets.dtype}"
        )


def _fake(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, offsets = ctx.saved_tensors
    return grouped_matmul(dy, weight.transpose(1, 2), offsets), grouped_matmul_wgrad(dy, x, offsets), None


def _cost(x: Tensor, weight: Tensor, offsets: Tensor) -> Cost:
    M, (E, N, K) = x.shape[0], weight.shape
    # with fewer rows than groups, at most one weight a row is read
    read = min(M, E) if isinstance(M, int) else E
    moved = tensor_bytes(x) + read * N * K * weight.element_size() + M * N * x.element_size()
    return Cost(flops=2 * M * N * K, bytes=moved)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for counts, N, K in GROUPS:
        weight = torch.randn(len(counts), N, K, device=device, dtype=dtype) / K**0.5
        offsets = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
        yield torch.randn(sum(counts), K, device=device, dtype=dtype), weight, offsets
        # the gradient's side: the same weight read transposed
        yield torch.randn(sum(counts), N, device=device, dtype=dtype), weight.transpose(1, 2), offsets


grouped_matmul = define(
    "grouped_matmul(Tensor x, Tensor weight, Tensor offsets) -> Tensor",
    reference=grouped_matmul_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    setup_context=_setup_context,
    backward=_backward,
    inline_reference=False,
)
"""Multiply each group's rows by its matrix.

Args:
    x: ``[M, K]``, rows sorted by group.
    weight: ``[E, N, K]``, dtype of ``x``; may be transposed in its last two dimensions.
    offsets: ``[E]`` int32, end of each group's rows; the last is M. Stays on the device: no synchronisation.

Returns:
    ``[M, N]``, dtype of ``x``; accumulated in float32.

Raises:
    ValueError: shapes do not fit.
    TypeError: dtypes differ, or ``offsets`` is not int32.
"""

grouped_matmul.provide("triton", _launch, priority={"cuda": 10}, supports=float32_at_most)
# CUTLASS on a GPU; on a CPU the reference's loop, in C++ (1.3 for 1.8 ms: 16384 rows, 16 matrices 256 x 256 of bfloat16)
grouped_matmul.provide("torch", _torch, priority={"cuda": 20, "cpu": 5}, supports=_torch_supports)
grouped_matmul.provide("onednn", grouped, priority={"cpu": 6}, supports=lambda x, weight, offsets: refuses(x))
grouped_matmul.provide("gather", _gather, priority={"cpu": 10}, supports=few_rows, inline=True)
