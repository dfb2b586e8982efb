"""A matrix of its own for each head: ``y[t, h] = x[t, h] @ weight[h]``.

Absorbed attention applies ``W^UK`` to queries and ``W^UV`` to mixed latents this way.
Dims: T tokens, H heads, K inputs, N outputs.
Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.2.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.interpreter import interpreted
from deepfuse.ir.op import define
from deepfuse.ir.private import materialize
from deepfuse.ir.provider import at_most, float32_at_most
from deepfuse.ops.absorbed_weight import weight_tile
from deepfuse.ops.dot import dot
from deepfuse.ops.linear import MATVEC_ROWS


def head_matmul_ref(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1).contiguous()


def _matvec(x: Tensor, weight: Tensor) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    rows_HK, weight_HKN = materialize(x.to(compute)).unbind(0), weight.to(compute)
    return torch.stack([(row_HK[..., None] * weight_HKN).sum(1) for row_HK in rows_HK]).to(x.dtype)


def _matvec_supports(x: Tensor, weight: Tensor) -> str | None:
    rows_fit = at_most(x.shape[0], MATVEC_ROWS) and x.shape[0] > 0
    return None if rows_fit else f"tokens are not 1 to {MATVEC_ROWS}"


@triton.jit
def head_product(
    x_tile, weights, scale_ptr, first_row, mask_t, mask_n, x_step, weight_step, scale_stride, num_scales, K,
    FP8: tl.constexpr, DOT_FLOAT32: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``x @ weight`` of one head, float32, of the tiles that begin here, walked along K by steps of ``BLOCK_K``.

    Of a weight in FP8, K are rows from ``first_row`` on, and the tile's columns lie in one block.
    """
    k = tl.arange(0, BLOCK_K)
    y = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_tile, mask=mask_t & (start + k[None, :] < K), other=0.0)
        mask = (start + k[:, None] < K) & mask_n
        row = first_row + start
        weight = weight_tile(
            weights, scale_ptr, row, k[:, None], K - start, mask, scale_stride, num_scales, FP8, x.dtype
        )
        y = dot(x, weight, y, DOT_FLOAT32)
        x_tile += x_step
        weights += weight_step
    return y


@triton.jit
def _head_matmul_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    x_stride_t,
    x_stride_h,
    x_stride_k,
    weight_stride_h,
    weight_stride_k,
    weight_stride_n,
    T,
    H,
    K,
    N,
    DOT_FLOAT32: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per head, block of tokens and block of outputs; it walks along K."""
    h = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + h * x_stride_h + t[:, None] * x_stride_t + k[None, :] * x_stride_k
    weights = weight_ptr + h * weight_stride_h + k[:, None] * weight_stride_k + n[None, :] * weight_stride_n
    mask_t, mask_n = t[:, None] < T, n[None, :] < N
    y = head_product(
        x_tile, weights, weight_ptr, 0, mask_t, mask_n, BLOCK_K * x_stride_k, BLOCK_K * weight_stride_k, 0, 0, K,
        False, DOT_FLOAT32, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    y_tile = y_ptr + (t[:, None] * H + h) * N + n[None, :]
    tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=mask_t & mask_n)


def _launch(x: Tensor, weight: Tensor) -> Tensor:
    T, H, K = x.shape
    N = weight.shape[2]
    y = x.new_empty(T, H, N)
    if y.numel() == 0:
        return y
    tiles = tiles_for(T, N, K, x.dtype, weight.dtype)
    _head_matmul_kernel[(H, triton.cdiv(T, tiles["BLOCK_T"]), triton.cdiv(N, tiles["BLOCK_N"]))](
        x,
        weight,
        y,
        *x.stride(),
        *weight.stride(),
        T,
        H,
        K,
        N,
        DOT_FLOAT32=interpreted(),
        **tiles,
    )
    return y


def tiles_for(T: int, N: int, K: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> dict[str, int]:
    """Blocks and warps of a kernel around :func:`head_product`."""
    # the weight is what is read: few tokens share one tile of it, in small blocks, so that all processors read, of rows
    # of 128 bytes. From 64 tokens on the tensor cores' widest instruction applies; float32 has none, and keeps to what
    # registers hold. A number of FP8 that lies by itself, as rows of no multiple of 16 make it, takes a pointer
    narrow, in_bytes = dtype != torch.float32, weight_dtype.itemsize == 1
    block_t = min(max(triton.next_power_of_2(T), 16), 128 if narrow else 32)
    if narrow:
        widest = 128 if (in_bytes and N % 16 == 0) or (block_t >= 64 and not in_bytes) else 64
    else:
        widest = 32 if in_bytes else 64
    return {
        "BLOCK_T": block_t,
        "BLOCK_N": min(max(triton.next_power_of_2(N), 16), widest),
        "BLOCK_K": min(max(triton.next_power_of_2(K), 16), 64 if narrow else 32),
        "num_warps": 8 if block_t == 128 else 4,
        "num_stages": 3,
    }


def _check(x: Tensor, weight: Tensor) -> None:
    if x.ndim != 3 or weight.ndim != 3 or x.shape[1:] != weight.shape[:2]:
        raise ValueError(
            f"head_matmul: want x [T, H, K] and weight [H, K, N], got {list(x.shape)} and {list(weight.shape)}"
        )
    if x.dtype != weight.dtype:
        raise TypeError(f"head_matmul: want x and weight of one dtype, got {x.dtype} and {weight.dtype}")


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    dx = head_matmul(dy, weight.transpose(1, 2))
    return dx, torch.bmm(x.permute(1, 2, 0), dy.transpose(0, 1))


def _cost(x: Tensor, weight: Tensor) -> Cost:
    T, (H, K, N) = x.shape[0], weight.shape
    return Cost(flops=2 * T * H * K * N, bytes=tensor_bytes(x, weight) + T * H * N * x.element_size())


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    for T, H, K, N in [(1, 2, 16, 8), (3, 5, 12, 20), (0, 2, 8, 8), (20, 3, 64, 32)]:
        weight = torch.randn(H, K, N, device=device, dtype=dtype) / K**0.5
        yield torch.randn(T, H, K, device=device, dtype=dtype), weight
        # the other side of kv_b_proj: the same weight read transposed
        yield torch.randn(T, H, N, device=device, dtype=dtype), weight.transpose(1, 2)


head_matmul = define(
    "head_matmul(Tensor x, Tensor weight) -> Tensor",
    reference=head_matmul_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    setup_context=_setup_context,
    backward=_backward,
)
"""Multiply each head by its matrix.

Args:
    x: ``[T, H, K]``.
    weight: ``[H, K, N]``, dtype of ``x``; may be a strided view of a larger weight.

Returns:
    ``[T, H, N]``, contiguous, dtype of ``x``.

Raises:
    ValueError: shapes do not fit.
    TypeError: dtypes differ.
"""

head_matmul.provide("matvec", _matvec, priority={"cpu": 10}, supports=_matvec_supports, inline=True)
head_matmul.provide("triton", _launch, priority={"cuda": 10}, supports=float32_at_most)
