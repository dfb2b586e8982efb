"""Read the pages of each sequence out of the paged latent cache in FP8, dequantized, one sequence after the other.

    rows[(b * P + p) * 64 + i] = dequantize(cache[block_table[b, p], i]),   starts[b] = b * P * 64

Dims: B sequences, P pages a sequence (padded), C latent rank, R rotary width, W bytes of a row.
Source: paged attention, Kwon et al. 2023 (arXiv:2309.06180), section 4.1; rows as in ``append_latent_fp8``.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.ops.append_latent_fp8 import (
    cache_is_aligned,
    cache_views,
    check_row,
    num_scales,
    packed_rows,
    row_bytes,
    unpacked_rows,
)
from deepfuse.ops.gather_latent import gather_latent_ref


def gather_latent_fp8_ref(cache: Tensor, block_table: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, starts_B = gather_latent_ref(cache, block_table)
    return torch.cat(unpacked_rows(rows, rank, dtype), -1), starts_B


@triton.jit
def _gather_latent_fp8_kernel(
    values_ptr, scales_ptr, rope_ptr, block_table_ptr, rows_ptr, starts_ptr, page_bytes, row_bytes, P, C, R,
    SCALES: tl.constexpr, PAGE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program per page of the table and some tokens of it. The cache comes as views of float8, float32, bfloat16."""
    entry, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    page = tl.load(block_table_ptr + entry).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    b, c, r = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_B * 128), tl.arange(0, BLOCK_R)
    row = page * page_bytes + t[:, None] * row_bytes
    values = tl.load(values_ptr + row + c[None, :], mask=(c < C)[None, :], other=0.0).to(tl.float32)
    scales = tl.load(scales_ptr + (row + C) // 4 + b[None, :], mask=(b < SCALES)[None, :], other=0.0)
    k_rope = tl.load(rope_ptr + (row + C) // 2 + 2 * SCALES + r[None, :], mask=(r < R)[None, :], other=0.0)
    blocks = tl.reshape(values, (BLOCK_T, BLOCK_B, 128)) * scales[:, :, None]
    latent = tl.reshape(blocks, (BLOCK_T, BLOCK_B * 128)).to(rows_ptr.dtype.element_ty)
    out = rows_ptr + (entry * PAGE + t)[:, None] * (C + R)
    tl.store(out + c[None, :], latent, mask=(c < C)[None, :])
    tl.store(out + C + r[None, :], k_rope.to(tl.float32).to(rows_ptr.dtype.element_ty), mask=(r < R)[None, :])
    if (block == 0) & (entry % P == 0):
        tl.store(starts_ptr + entry // P, (entry * PAGE).to(tl.int32))


def _launch(cache: Tensor, block_table: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, starts = _fake(cache, block_table, rank, dtype)
    if rows.numel() == 0:
        return rows, starts.zero_()
    (B, P), R = block_table.shape, rows.shape[1] - rank
    blocks = triton.next_power_of_2(num_scales(rank))
    # 16 elements a thread, as many as a thread reads at once
    block_t, num_warps = 4, max(blocks, 1)
    _gather_latent_fp8_kernel[(B * P, PAGE_SIZE // block_t)](
        *cache_views(cache), block_table.contiguous(), rows, starts, cache.stride(0), cache.stride(1), P, rank, R,
        SCALES=num_scales(rank), PAGE=PAGE_SIZE, BLOCK_T=block_t, BLOCK_B=blocks,
        BLOCK_R=triton.next_power_of_2(R), num_warps=num_warps,
    )  # fmt: skip
    return rows, starts


def _supports(cache: Tensor, block_table: Tensor, rank: int, dtype: torch.dtype) -> str | None:
    return "computes in float32" if dtype == torch.float64 else cache_is_aligned(cache)


def _check(cache: Tensor, block_table: Tensor, rank: int, dtype: torch.dtype) -> None:
    if cache.ndim != 3 or cache.shape[1] != PAGE_SIZE or block_table.ndim != 2:
        raise ValueError(
            f"gather_latent_fp8: want cache [pages, {PAGE_SIZE}, W] and block_table [B, P], got "
            f"{list(cache.shape)} and {list(block_table.shape)}"
        )
    check_row("gather_latent_fp8", cache, rank, _rotary_width(cache, rank))
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"gather_latent_fp8: want dtype float16, bfloat16, float32 or float64, got {dtype}")


def _rotary_width(cache: Tensor, rank: int) -> int:
    """R, from the bytes that the latent leaves of a row."""
    return max((cache.shape[2] - row_bytes(rank, 0)) // 2, 0)


def _fake(cache: Tensor, block_table: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    B, P = block_table.shape
    rows = cache.new_empty((B * P * PAGE_SIZE, rank + _rotary_width(cache, rank)), dtype=dtype)
    return rows, block_table.new_empty(B, dtype=torch.int32)


def _cost(cache: Tensor, block_table: Tensor, rank: int, dtype: torch.dtype) -> Cost:
    S = block_table.numel() * PAGE_SIZE
    written = S * (rank + _rotary_width(cache, rank)) * dtype.itemsize
    return Cost(flops=S * rank, bytes=S * cache.shape[2] + written + tensor_bytes(block_table))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, int, torch.dtype]]:
    for B, P, C, R in [(1, 1, 16, 8), (2, 3, 160, 4), (3, 2, 512, 64), (0, 1, 16, 8)]:
        rows = packed_rows(torch.randn(6 * PAGE_SIZE, C, device=device), torch.randn(6 * PAGE_SIZE, R, device=device))
        yield rows.unflatten(0, (6, PAGE_SIZE)), torch.randint(0, 6, (B, P), device=device), C, dtype


gather_latent_fp8 = define(
    "gather_latent_fp8(Tensor cache, Tensor block_table, int rank, ScalarType dtype) -> (Tensor, Tensor)",
    reference=gather_latent_fp8_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
)
"""Gather pages of the cache in FP8 into rows of numbers.

Args:
    cache: ``[pages, 64, W]`` uint8, as ``append_latent_fp8`` writes it.
    block_table: ``[B, P]`` int64, page numbers.
    rank: C, numbers of a latent; a multiple of 4.
    dtype: of the result, to which ``value * scale`` is rounded once; float16, bfloat16 or float32 (float64 by the
        reference).

Returns:
    ``rows [B * P * 64, C + R]`` and ``starts [B]`` int32, as ``gather_latent`` gives them.

Raises:
    ValueError: shapes do not fit.
    TypeError: ``cache`` is not uint8, or ``dtype`` no such dtype.
"""

gather_latent_fp8.provide("triton", _launch, priority={"cuda": 10}, supports=_supports)
