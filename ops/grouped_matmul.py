"""A matrix of its own for each group of rows: ``y[m] = weight[group of m] @ x[m]``.

    group e owns rows offsets[e-1] .. offsets[e]

Dims: M rows, E groups (experts), K inputs, N outputs.
Source: Gale et al. 2022 (arXiv:2211.15841), section 4; offsets as in ``torch.nn.functional.grouped_mm``.

Two ops, since the gradient with respect to the weight is another product over the same groups; they share their tiles,
samples and the conditions of ``grouped_mm``.
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
from deepfuse.ir.provider import at_most

GATHER_ROWS = 64
"""Up to so many rows each reads its group's weight in place, by index, as a fused reduction."""
TORCH_GROUPS = 1023
"""``grouped_mm`` on CUDA takes no more."""


def grouped_matmul_ref(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for e, rows in groups(offsets):
        torch.mm(x[rows], weight[e].t(), out=y[rows])
    return y


def grouped_matmul_wgrad_ref(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    dweight = x.new_zeros(offsets.shape[0], dy.shape[1], x.shape[1])
    for e, rows in groups(offsets):
        torch.mm(dy[rows].t(), x[rows], out=dweight[e])
    return dweight


def groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Number and rows of each group that has rows."""
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        if end > begin:
            yield e, slice(begin, end)
        begin = end


def _gather(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Fused by Inductor into one loop: no copy of a weight is made."""
    compute = torch.promote_types(x.dtype, torch.float32)
    row_M = torch.arange(x.shape[0], device=x.device)
    group_M = (offsets[None] <= row_M[:, None]).sum(-1)
    weight_MNK, x_MK = weight[group_M], materialize(x.to(compute))
    return (weight_MNK.to(compute) * x_MK[:, None]).sum(-1).to(x.dtype)


def _gather_supports(x: Tensor, weight: Tensor, offsets: Tensor) -> str | None:
    if not at_most(x.shape[0], GATHER_ROWS):
        return f"rows are not known to be at most {GATHER_ROWS}"
    return None


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

    e = tl.arange(0, BLOCK_E)
    end_E = tl.load(offsets_ptr + e, mask=e < E, other=0)
    begin_E = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles_E = tl.cdiv(end_E - begin_E, BLOCK_M)
    group = tl.sum((tl.cumsum(tiles_E, 0) <= tile).to(tl.int32), 0)
    if group >= E:
        return
    tile_in_group = tile - tl.sum(tl.where(e < group, tiles_E, 0), 0)
    begin = tl.sum(tl.where(e == group, begin_E, 0), 0)
    end = tl.sum(tl.where(e == group, end_E, 0), 0)

    m = begin + tile_in_group * BLOCK_M + tl.arange(0, BLOCK_M)
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
        if DOT_FLOAT32:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
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
    block_m, block_n, block_k, num_stages = _largest_tile(x, N, K)
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


@triton.jit
def _grouped_matmul_wgrad_kernel(
    dy_ptr,
    x_ptr,
    offsets_ptr,
    dweight_ptr,
    dy_stride,
    x_stride,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_FLOAT32: tl.constexpr,
):
    """One tile of one group's gradient a program; groups without rows get zeros."""
    e = tl.program_id(2).to(tl.int64)
    begin = tl.load(offsets_ptr + e - 1, mask=e > 0, other=0)
    end = tl.load(offsets_ptr + e)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m = tl.arange(0, BLOCK_M)
    dy_ptrs = dy_ptr + (begin + m).to(tl.int64)[None, :] * dy_stride + n[:, None]
    x_ptrs = x_ptr + (begin + m).to(tl.int64)[:, None] * x_stride + k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m0 in range(begin, end, BLOCK_M):
        dy = tl.load(dy_ptrs, mask=(n < N)[:, None] & (m < end - m0)[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=(m < end - m0)[:, None] & (k < K)[None, :], other=0.0)
        if DOT_FLOAT32:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(dy, x, acc, input_precision="ieee")
        dy_ptrs += BLOCK_M * dy_stride
        x_ptrs += BLOCK_M * x_stride
    dweight_ptrs = dweight_ptr + (e * N + n)[:, None] * K + k[None, :]
    tl.store(dweight_ptrs, acc.to(dweight_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


def _largest_tile(x: Tensor, N: int, K: int) -> tuple[int, int, int, int]:
    """Tile of the result, depth of its sum, and number of stages."""
    if x.element_size() >= 4:
        # summed without tensor cores: 32 accumulators a thread of four warps
        return 64, 64, 32, 3
    if N % 16 or K % 16:
        # triton knows only of multiples of 16 that rows are aligned: no asynchronous copies, tiles wait in registers
        return 64, 64, 32, 2
    # 64 accumulators a thread of eight warps, 128 KiB of shared memory
    return 128, 128, 64, 4


def _launch_wgrad(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    E, N, K = offsets.shape[0], dy.shape[1], x.shape[1]
    dweight = x.new_empty(E, N, K)
    if dweight.numel() == 0:
        return dweight
    if dy.stride(1) != 1:
        dy = dy.contiguous()
    if x.stride(1) != 1:
        x = x.contiguous()
    # the rows are what is summed over
    block_n, block_k, block_m, num_stages = _largest_tile(x, N, K)
    _grouped_matmul_wgrad_kernel[(triton.cdiv(N, block_n), triton.cdiv(K, block_k), E)](
        dy,
        x,
        offsets.contiguous(),
        dweight,
        dy.stride(0),
        x.stride(0),
        N,
        K,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        DOT_FLOAT32=interpreted(),
        num_warps=8 if block_n * block_k > 64 * 128 else 4,
        num_stages=num_stages,
    )
    return dweight


def _torch(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[1])
    transposed = weight.stride(1) == 1
    weight_EKN = _aligned(weight.transpose(1, 2)) if transposed else _aligned(weight).transpose(1, 2)
    return functional.grouped_mm(_aligned(x), weight_EKN, offs=offsets.contiguous())


def _torch_wgrad(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_zeros(offsets.shape[0], dy.shape[1], x.shape[1])
    return functional.grouped_mm(_aligned(dy).t(), _aligned(x), offs=offsets.contiguous())


def _aligned(x: Tensor) -> Tensor:
    """``x`` with rows that begin at multiples of 16 bytes; a copy where it is a view whose rows do not."""
    in_place = x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1] and x.data_ptr() % 16 == 0
    if in_place and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _torch_supports(x: Tensor, weight: Tensor, offsets: Tensor) -> str | None:
    return _torch_refuses(x, *weight.shape)


def _torch_wgrad_supports(dy: Tensor, x: Tensor, offsets: Tensor) -> str | None:
    return _torch_refuses(x, offsets.shape[0], dy.shape[1], x.shape[1])


def _torch_refuses(x: Tensor, E: Any, N: Any, K: Any) -> str | None:
    if any(not isinstance(size, int) or size * x.element_size() % 16 for size in (N, K)):
        return f"grouped_mm wants rows of a multiple of 16 bytes, got {N} and {K} elements of {x.dtype}"
    if x.device.type != "cuda":
        return f"grouped_mm does not take {x.dtype}" if x.dtype == torch.float64 else None
    if x.dtype != torch.bfloat16:
        return f"grouped_mm reads the offsets on the host for {x.dtype}"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(x.device)[0] != 9:
        return "grouped_mm is taken on compute capability 9 alone: others lack kernels, or fill empty groups' gradients"
    return None if at_most(E, TORCH_GROUPS) else f"grouped_mm takes {TORCH_GROUPS} groups, got {E}"


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
    item = x.element_size()
    return Cost(flops=2 * M * N * K, bytes=tensor_bytes(x) + (read * N * K + M * N) * item)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    # rows of each group: one row; empty groups; all in one; uneven, and more than a tile
    for counts, N, K in [
        ([1], 8, 16),
        ([2, 0, 3, 1], 12, 20),
        ([0, 5, 0], 16, 8),
        ([0, 0], 8, 8),
        ([9, 70, 1], 40, 64),
    ]:
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

grouped_matmul.provide("triton", _launch, priority={"cuda": 10})
# CUTLASS on a GPU; on a CPU the reference's loop, in C++ (1.3 for 1.8 ms: 16384 rows, 16 matrices 256 x 256 of bfloat16)
grouped_matmul.provide("torch", _torch, priority={"cuda": 20, "cpu": 5}, supports=_torch_supports)
grouped_matmul.provide("gather", _gather, priority={"cpu": 10}, supports=_gather_supports, inline=True)


def _wgrad_check(dy: Tensor, x: Tensor, offsets: Tensor) -> None:
    if dy.ndim != 2 or x.ndim != 2 or offsets.ndim != 1:
        raise ValueError(
            "grouped_matmul_wgrad: want dy [M, N], x [M, K] and offsets [E], got "
            f"{list(dy.shape)}, {list(x.shape)} and {list(offsets.shape)}"
        )
    torch._check(
        dy.shape[0] == x.shape[0], lambda: f"grouped_matmul_wgrad: want x of {dy.shape[0]} rows, got {x.shape[0]}"
    )
    if dy.dtype != x.dtype or offsets.dtype != torch.int32:
        raise TypeError(
            "grouped_matmul_wgrad: want dy and x of one dtype and int32 offsets, got "
            f"{dy.dtype}, {x.dtype} and {offsets.dtype}"
        )


def _wgrad_fake(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], dy.shape[1], x.shape[1])


def _wgrad_cost(dy: Tensor, x: Tensor, offsets: Tensor) -> Cost:
    M, N, K, E = x.shape[0], dy.shape[1], x.shape[1], offsets.shape[0]
    return Cost(flops=2 * M * N * K, bytes=tensor_bytes(dy, x) + E * N * K * x.element_size())


def _wgrad_samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for x, weight, offsets in _samples(device, dtype):
        dy = torch.randn(x.shape[0], weight.shape[1], device=device, dtype=dtype)
        # scaled so that sums over rows stay near one, where the default tolerance is made for
        yield dy / max(x.shape[0], 1) ** 0.5, x, offsets


grouped_matmul_wgrad = define(
    "grouped_matmul_wgrad(Tensor dy, Tensor x, Tensor offsets) -> Tensor",
    reference=grouped_matmul_wgrad_ref,
    check=_wgrad_check,
    fake=_wgrad_fake,
    cost=_wgrad_cost,
    samples=_wgrad_samples,
    inline_reference=False,
)
"""Gradient of ``grouped_matmul`` with respect to its weight: ``dweight[e] = sum over rows of e of dy[m] x[m]^T``.

Args:
    dy: ``[M, N]``; x: ``[M, K]``; offsets: ``[E]`` int32, as in ``grouped_matmul``.

Returns:
    ``[E, N, K]``, dtype of ``x``; accumulated in float32; zero for empty groups.

Raises:
    ValueError: shapes do not fit.
    TypeError: dtypes differ, or ``offsets`` is not int32.
"""

grouped_matmul_wgrad.provide("triton", _launch_wgrad, priority={"cuda": 10})
grouped_matmul_wgrad.provide("torch", _torch_wgrad, priority={"cuda": 20, "cpu": 5}, supports=_torch_wgrad_supports)
