"""Read the pages of each sequence out of the paged latent cache, one sequence after the other.

    rows[(b * P + p) * 64 + i] = cache[block_table[b, p], i],   starts[b] = b * P * 64

Dims: B sequences, P pages a sequence (padded), C latent rank, R rotary width.
Source: paged attention, Kwon et al. 2023 (arXiv:2309.06180), section 4.1.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ops.append_latent import PAGE_SIZE


def gather_latent_ref(cache: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    B, P = block_table.shape
    starts_B = torch.arange(B, dtype=torch.int32, device=cache.device) * (P * PAGE_SIZE)
    return cache[block_table].flatten(0, 2), starts_B


@triton.jit
def _gather_latent_kernel(
    cache_ptr, block_table_ptr, rows_ptr, starts_ptr, page_stride, P, PAGE: tl.constexpr,
    PAGE_ELEMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per page of the table and block of its elements."""
    entry, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    page = tl.load(block_table_ptr + entry).to(tl.int64)
    element = block * BLOCK + tl.arange(0, BLOCK)
    mask = element < PAGE_ELEMENTS
    values = tl.load(cache_ptr + page * page_stride + element, mask=mask, other=0.0)
    tl.store(rows_ptr + entry * PAGE_ELEMENTS + element, values, mask=mask)
    if (block == 0) & (entry % P == 0):
        tl.store(starts_ptr + entry // P, (entry * PAGE).to(tl.int32))


def _launch(cache: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    (B, P), D = block_table.shape, cache.shape[2]
    rows = torch.empty((B * P * PAGE_SIZE, D), dtype=cache.dtype, device=cache.device)
    starts = torch.empty((B,), dtype=torch.int32, device=cache.device)
    if rows.numel() == 0:
        return rows, starts.zero_()
    if cache.stride()[1:] != (D, 1):
        cache = cache.contiguous()
    # 16 elements a thread: two vectors of eight in flight, and enough programs for the pages of one short sequence
    block, num_warps = 2048, 4
    _gather_latent_kernel[(B * P, triton.cdiv(PAGE_SIZE * D, block))](
        cache, block_table.contiguous(), rows, starts, cache.stride(0), P, PAGE=PAGE_SIZE,
        PAGE_ELEMENTS=PAGE_SIZE * D, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip
    return rows, starts


def _check(cache: Tensor, block_table: Tensor) -> None:
    if cache.ndim != 3 or cache.shape[1] != PAGE_SIZE or block_table.ndim != 2:
        raise ValueError(
            f"gather_latent: want cache [pages, {PAGE_SIZE}, C + R] and block_table [B, P], got "
            f"{list(cache.shape)} and {list(block_table.shape)}"
        )


def _fake(cache: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    B, P = block_table.shape
    return cache.new_empty(B * P * PAGE_SIZE, cache.shape[2]), block_table.new_empty(B, dtype=torch.int32)


def _cost(cache: Tensor, block_table: Tensor) -> Cost:
    rows = block_table.numel() * PAGE_SIZE * cache.shape[2] * cache.element_size()
    return Cost(flops=0, bytes=2 * rows + tensor_bytes(block_table))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    cache = torch.randn(6, PAGE_SIZE, 24, device=device, dtype=dtype)
    for B, P in [(1, 1), (2, 3), (3, 2), (0, 1)]:
        yield cache, torch.randint(0, 6, (B, P), device=device)


gather_latent = define(
    "gather_latent(Tensor cache, Tensor block_table) -> (Tensor, Tensor)",
    reference=gather_latent_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
)
"""Gather pages into rows.

Args:
    cache: ``[pages, 64, C + R]``.
    block_table: ``[B, P]`` int64, page numbers.

Returns:
    ``rows [B * P * 64, C + R]`` and ``starts [B]`` int32, the first row of each sequence (``k_start`` of attention).

Raises:
    ValueError: shapes do not fit.
"""

gather_latent.provide("triton", _launch, priority={"cuda": 10})
