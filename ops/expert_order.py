"""The order of rows by expert, as kernels find it: a row's place is the number of keys that are smaller than its own.

    key[m] = expert[m] * M + m          keys differ, and stand in the stable order of the experts

Few rows are counted by the kernels that move them, in the launch that moves them. More are sorted first: all pairs
compared in one launch, or a counting sort in three.
Dims: T tokens, K experts per token, M = T * K rows, E experts.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTED_ROWS = 1024
"""Up to so many rows a program that moves a token's counts for itself: the keys of one tile, 128 to a thread."""
COUNTED_KEYS = 2**20
"""And all programs together read at most so many experts: 8 MiB, from the level-2 cache. With K = 8 and seven programs a
token, DeepSeek-V3's, these are 1024 rows, for which 16 MB go through memory anyway; twice the rows would read four times
as much."""
COUNTED_PLACES = 16
"""Of so many rows a program counts the places at a time: a token's."""
COMPARED_ROWS = 4096
"""Up to so many rows all pairs are compared, 2048 by a thread at most: one launch for the three of a counting sort."""


@triton.jit
def _is_below(expert_ptr, bound, first, M, BLOCK_KEYS: tl.constexpr):
    """1.0 where the keys of a tile of rows are smaller than ``bound [BLOCK]``: ``[BLOCK, BLOCK_KEYS]``, to be summed.

    Floats, for LLVM counts truth values as the bits of an integer that it puts together in a thread's local memory.
    """
    j = first + tl.arange(0, BLOCK_KEYS)
    key = tl.load(expert_ptr + j, mask=j < M, other=0).to(tl.int32) * M + j
    # no bound is above the largest
    key = tl.where(j < M, key, 2147483647)
    return (key[None, :] < bound[:, None]).to(tl.float32)


@triton.jit
def token_places(
    expert_ptr, order_ptr, inverse_ptr, t, T, keep, K: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """The places of a token's K rows; where ``COUNT``, they are found, and written down by the program that keeps."""
    k = tl.arange(0, BLOCK)
    if COUNT:
        m = t.to(tl.int32) * K + k
        key = tl.load(expert_ptr + m, mask=k < K, other=0).to(tl.int32) * (T * K) + m
        place = tl.sum(_is_below(expert_ptr, key, 0, T * K, BLOCK_KEYS), 1).to(tl.int32)
        if keep:
            tl.store(inverse_ptr + m, place.to(tl.int64), mask=k < K)
            tl.store(order_ptr + place, m.to(tl.int64), mask=k < K)
    else:
        place = tl.load(inverse_ptr + t * K + k, mask=k < K, other=0).to(tl.int32)
    return place


@triton.jit
def nth_place(place, k, BLOCK: tl.constexpr):
    """One of the places of a token."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == k, place, 0)).to(tl.int64)


@triton.jit
def find_offsets(expert_ptr, offsets_ptr, block, M, E, BLOCK: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """A block of experts' ends: an expert ends where the key of the next one's first row would be."""
    e = block.to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    offset = tl.sum(_is_below(expert_ptr, (e + 1) * M, 0, M, BLOCK_KEYS), 1)
    tl.store(offsets_ptr + e, offset.to(tl.int32), mask=e < E)


@triton.jit
def _expert_order_compare_kernel(
    expert_ptr, order_ptr, inverse_ptr, offsets_ptr, M, E, BLOCK: tl.constexpr, BLOCK_KEYS: tl.constexpr
):
    """Rows' places, and experts' ends; 64 of them a program."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = i < M
    key = tl.load(expert_ptr + i, mask=is_row, other=0).to(tl.int32) * M + i
    # as in find_offsets
    bound = tl.where(is_row, key, (i - M + 1) * M)
    below = tl.zeros((BLOCK, BLOCK_KEYS), tl.float32)
    for first in range(0, M, BLOCK_KEYS):
        below += _is_below(expert_ptr, bound, first, M, BLOCK_KEYS)
    place = tl.sum(below, 1).to(tl.int32)
    tl.store(inverse_ptr + i, place.to(tl.int64), mask=is_row)
    tl.store(order_ptr + place, i.to(tl.int64), mask=is_row)
    tl.store(offsets_ptr + i - M, place, mask=(i >= M) & (i < M + E))


@triton.jit
def _expert_order_count_kernel(expert_ptr, counts_ptr, M, E, blocks, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """How many of a block's rows go to each expert: ``counts[e, block]``."""
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(expert_ptr + i, mask=i < M, other=0).to(tl.int32)
    e = tl.arange(0, BLOCK_E)
    counts = tl.histogram(expert, BLOCK_E, mask=i < M)
    tl.store(counts_ptr + e.to(tl.int64) * blocks + block, counts, mask=e < E)


@triton.jit
def _expert_order_place_kernel(
    expert_ptr, ends_ptr, order_ptr, inverse_ptr, offsets_ptr, M, E, blocks, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr
):
    """``ends[e, block]``: where the block's rows of expert e end, the counts summed in the order of the result."""
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(expert_ptr + i, mask=i < M, other=0)
    # read again along the other axis; -1 is no expert
    j = block * BLOCK + tl.arange(0, BLOCK)
    other = tl.load(expert_ptr + j, mask=j < M, other=-1)
    behind = (expert[:, None] == other[None, :]) & (i[:, None] < j[None, :])
    end = tl.load(ends_ptr + expert * blocks + block, mask=i < M, other=0)
    place = (end - 1 - tl.sum(behind.to(tl.int32), 1)).to(tl.int64)
    tl.store(inverse_ptr + i, place, mask=i < M)
    tl.store(order_ptr + place, i, mask=i < M)
    if block == 0:
        e = tl.arange(0, BLOCK_E)
        offset = tl.load(ends_ptr + e.to(tl.int64) * blocks + blocks - 1, mask=e < E, other=0)
        tl.store(offsets_ptr + e, offset, mask=e < E)


def find_order(
    experts: Tensor, num_experts: int, pieces: int
) -> tuple[tuple[Tensor, Tensor, Tensor], int, dict[str, Any]]:
    """``order``, ``inverse`` and ``offsets``, for a kernel with ``pieces`` programs a token; experts are contiguous.

    Returns:
        The three; programs that the kernel needs more, times ``pieces``, for it finds the three itself; its constants:
        ``COUNT``, whether it does, ``BLOCK``, at least K, and ``BLOCK_KEYS``.
    """
    (T, K), M = experts.shape, experts.numel()
    block = max(triton.next_power_of_2(K), COUNTED_PLACES)
    keys = T * pieces * M
    count = M <= COUNTED_ROWS and 0 < keys <= COUNTED_KEYS and block == COUNTED_PLACES
    # few widths, as each is compiled
    constants = {"COUNT": count, "BLOCK": block, "BLOCK_KEYS": max(triton.next_power_of_2(M), 64) if count else 1}
    if count:
        return _empty_order(experts, num_experts), triton.cdiv(num_experts, block * pieces), constants
    sort = _compare_sort if M <= COMPARED_ROWS else _counting_sort
    return sort(experts, num_experts), 0, constants


def _empty_order(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    M = experts.numel()
    return experts.new_empty(M), experts.new_empty(M), experts.new_empty(num_experts, dtype=torch.int32)


def _compare_sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    M = experts.numel()
    order, inverse, offsets = _empty_order(experts, num_experts)
    block = 64
    _expert_order_compare_kernel[(triton.cdiv(M + num_experts, block),)](
        experts, order, inverse, offsets, M, num_experts, BLOCK=block, BLOCK_KEYS=64, num_warps=4
    )
    return order, inverse, offsets


def _counting_sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    M = experts.numel()
    order, inverse, offsets = _empty_order(experts, num_experts)
    # pairs within a block are compared, 128 a thread, and all programs count once more into each expert
    block = 128
    blocks = triton.cdiv(M, block)
    counts = experts.new_empty(num_experts * blocks, dtype=torch.int32)
    block_e = triton.next_power_of_2(num_experts)
    _expert_order_count_kernel[(blocks,)](
        experts, counts, M, num_experts, blocks, BLOCK=block, BLOCK_E=block_e, num_warps=4
    )
    ends = counts.cumsum(0, dtype=torch.int32)
    _expert_order_place_kernel[(blocks,)](
        experts, ends, order, inverse, offsets, M, num_experts, blocks, BLOCK=block, BLOCK_E=block_e, num_warps=4
    )
    return order, inverse, offsets
