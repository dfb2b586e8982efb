"""Read the pages of each sequence out of the paged latent cache, one sequence after the other.

    rows[(b * P + p) * 64 + i] = cache[block_table[b, p], i],   starts[b] = b * P * 64

Dims: B sequences, P pages a sequence (padded), C latent rank, R rotary width.
Source: paged attention, Kwon et al. 2023 (arXiv:2309.06180), section 4.1.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ops.append_latent import PAGE_SIZE


def gather_latent_ref(cache: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    B, P = block_table.shape
    starts_B = torch.arange(B, dtype=torch.int32, device=cache.device) * (P * PAGE_SIZE)
    return cache[block_table].flatten(0, 2), starts_B


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
