"""Gradient of ``grouped_matmul`` with respect to its weight: ``dweight[e] = sum over the rows m of e of dy[m] x[m]^T``.

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
from deepfuse.ir.provider import at_most, float32_at_most
from deepfuse.ir.sizes import check_value
from deepfuse.ops.dot import dot
from deepfuse.ops.grouped_matmul_onednn import grouped_wgrad, refuses
from deepfuse.ops.groups import groups

TORCH_GROUPS = 1023
"""``grouped_mm`` on CUDA takes no more."""
GROUPS = (
    # rows of each group, outputs, inputs: one row; empty groups; all in one; no row; uneven, and more than a tile
    ((1,), 8, 16),
    ((2, 0, 3, 1), 12, 20),
    ((0, 5, 0), 16, 8),
    ((0, 0), 8, 8),
    ((9, 70, 1), 40, 64),
)
"""Sizes of the samples."""


def grouped_matmul_wgrad_ref(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    dweight = x.new_zeros(offsets.shape[0], dy.shape[1], x.shape[1])
    for e, rows in groups(offsets):
        torch.mm(dy[rows].t(), x[rows], out=dweight[e])
    return dweight


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
        acc = dot(dy, x, acc, DOT_FLOAT32)
        dy_ptrs += BLOCK_M * dy_stride
        x_ptrs += BLOCK_M * x_stride
    dweight_ptrs = dweight_ptr + (e * N + n)[:, None] * K + k[None, :]
    tl.store(dweight_ptrs, acc.to(dweight_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


def largest_tile(x: Tensor, N: int, K: int) -> tuple[int, int, int, int]:
    """Tile of the result, depth of its sum, and number of stages."""
    if x.element_size() >= 4:
        # summed without tensor cores: 32 accumulators a thread of four warps
        return 64, 64, 32, 3
    if N % 16 or K % 16:
        # triton knows only of multiples of 16 that rows are aligned: no asynchronous copies, tiles wait in registers
        return 64, 64, 32, 2
    # 64 accumulators a thread of eight warps, 128 KiB of shared memory
    return 128, 128, 64, 4


def _launch(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    E, N, K = offsets.shape[0], dy.shape[1], x.shape[1]
    dweight = x.new_empty(E, N, K)
    if dweight.numel() == 0:
        return dweight
    if dy.stride(1) != 1:
        dy = dy.contiguous()
    if x.stride(1) != 1:
        x = x.contiguous()
    # the rows are what is summed over
    block_n, block_k, block_m, num_stages = largest_tile(x, N, K)
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


def _torch(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_zeros(offsets.shape[0], dy.shape[1], x.shape[1])
    return functional.grouped_mm(aligned(dy).t(), aligned(x), offs=offsets.contiguous())


def aligned(x: Tensor) -> Tensor:
    """``x`` with rows that begin at multiples of 16 bytes; a copy where it is a view whose rows do not."""
    in_place = x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1] and x.data_ptr() % 16 == 0
    if in_place and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _torch_supports(dy: Tensor, x: Tensor, offsets: Tensor) -> str | None:
    return grouped_mm_refuses(x, offsets.shape[0], dy.shape[1], x.shape[1])


def grouped_mm_refuses(x: Tensor, E: Any, N: Any, K: Any) -> str | None:
    if any(not isinstance(size, int) or size * x.element_size() % 16 for size in (N, K)):
        return f"grouped_mm wants rows of a multiple of 16 bytes, got {N} and {K} elements of {x.dtype}"
    if x.device.type != "cuda":
        return f"grouped_mm does not take {x.dtype}" if x.dtype == torch.float64 else None
    if x.dtype != torch.bfloat16:
        return f"grouped_mm reads the offsets on the host for {x.dtype}"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(x.device)[0] != 9:
        return "grouped_mm is taken on compute capability 9 alone: others lack kernels, or fill empty groups' gradients"
    return None if at_most(E, TORCH_GROUPS) else f"grouped_mm takes {TORCH_GROUPS} groups, got {E}"


def _check(dy: Tensor, x: Tensor, offsets: Tensor) -> None:
    if dy.ndim != 2 or x.ndim != 2 or offsets.ndim != 1:
        raise ValueError(
            "grouped_matmul_wgrad: want dy [M, N], x [M, K] and offsets [E], got "
            f"{list(dy.shape)}, {list(x.shape)} and {list(offsets.shape)}"
        )
    check_value(
        x.shape[0] == dy.shape[0], lambda: f"grouped_matmul_wgrad: want x of {dy.shape[0]} rows, got {x.shape[0]}"
    )
    if dy.dtype != x.dtype or offsets.dtype != torch.int32:
        raise TypeError(
            "grouped_matmul_wgrad: want dy and x of one dtype and int32 offsets, got "
            f"{dy.dtype}, {x.dtype} and {offsets.dtype}"
        )


def _fake(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], dy.shape[1], x.shape[1])


def _cost(dy: Tensor, x: Tensor, offsets: Tensor) -> Cost:
    M, N, K, E = x.shape[0], dy.shape[1], x.shape[1], offsets.shape[0]
    return Cost(flops=2 * M * N * K, bytes=tensor_bytes(dy, x) + E * N * K * x.element_size())


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for counts, N, K in GROUPS:
        offsets = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
        M = sum(counts)
        dy = torch.randn(M, N, device=device, dtype=dtype)
        # scaled so that sums over rows stay near one, where the default tolerance is made for
        yield dy / max(M, 1) ** 0.5, torch.randn(M, K, device=device, dtype=dtype), offsets


grouped_matmul_wgrad = define(
    "grouped_matmul_wgrad(Tensor dy, Tensor x, Tensor offsets) -> Tensor",
    reference=grouped_matmul_wgrad_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    inline_reference=False,
)
"""Multiply the transpose of each group's rows of ``dy`` by its rows of ``x``.

Args:
    dy: ``[M, N]``; x: ``[M, K]``; offsets: ``[E]`` int32, as in ``grouped_matmul``.

Returns:
    ``[E, N, K]``, dtype of ``x``; accumulated in float32; zero for empty groups.

Raises:
    ValueError: shapes do not fit.
    TypeError: dtypes differ, or ``offsets`` is not int32.
"""

grouped_matmul_wgrad.provide("triton", _launch, priority={"cuda": 10}, supports=float32_at_most)
grouped_matmul_wgrad.provide("torch", _torch, priority={"cuda": 20, "cpu": 5}, supports=_torch_supports)
grouped_matmul_wgrad.provide("onednn", grouped_wgrad, priority={"cpu": 6}, supports=lambda dy, x, offsets: refuses(x))
