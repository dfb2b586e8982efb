"""Sort token copies by the expert they go to, so that each expert's rows lie together.

    order    = stable argsort of experts.flatten();  rows[m] = x[order[m] // K]
    inverse  = where each (token, choice) landed;    offsets[e] = end of expert e's rows

Dims: T tokens, K experts per token, M = T * K rows, D width, E experts.
Source: dropless dispatch, Gale et al. 2022 (arXiv:2211.15841), section 5.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.provider import at_most
from deepfuse.ir.sizes import check_value

COMPARE_ROWS = 64
"""Up to so many rows, counting smaller keys (M^2 comparisons) beats a sort's call on a CPU."""
KERNEL_COMPARE_ROWS = 4096
"""The same on a GPU: one launch, in which a thread compares 2048 pairs at most, for the three of a counting sort."""


def expert_permute_ref(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    expert_M = experts.flatten()
    order_M = expert_M.argsort(stable=True)
    inverse_M = torch.empty_like(order_M).scatter(0, order_M, torch.arange(order_M.shape[0], device=x.device))
    return x[order_M // experts.shape[1]], order_M, inverse_M, _offsets(expert_M, num_experts)


def _offsets(expert_M: Tensor, num_experts: int) -> Tensor:
    at_or_before_ME = expert_M[:, None] <= torch.arange(num_experts, device=expert_M.device)
    return at_or_before_ME.sum(0, dtype=torch.int32)


def compare_few(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same without a sort: a row's place is the number of rows that go before it."""
    expert_M = experts.flatten()
    place_M = torch.arange(expert_M.shape[0], device=x.device)
    before = (expert_M[None] < expert_M[:, None]) | (
        (expert_M[None] == expert_M[:, None]) & (place_M[None] < place_M[:, None])
    )
    inverse_M = before.sum(-1)
    order_M = ((inverse_M[None] == place_M[:, None]) * place_M[None]).sum(-1)
    return x[order_M // experts.shape[1]], order_M, inverse_M, _offsets(expert_M, num_experts)


def few_rows(x: Tensor, experts: Tensor, num_experts: int) -> str | None:
    """``None`` where :func:`compare_few` is the faster way, or why not."""
    return None if at_most(experts.numel(), COMPARE_ROWS) else f"rows are not known to be at most {COMPARE_ROWS}"


@triton.jit
def _expert_permute_compare_kernel(
    expert_ptr, order_ptr, inverse_ptr, offsets_ptr, M, E, BLOCK: tl.constexpr, BLOCK_KEYS: tl.constexpr
):
    """A row's place, and an expert's end, is the number of rows with a smaller key; 64 of them a program."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = i < M
    # keys in order of (expert, row); an expert ends where the key of the next one's first row would be
    bound = tl.load(expert_ptr + i, mask=is_row, other=0).to(tl.int32) * M + i
    bound = tl.where(is_row, bound, (i - M + 1) * M)
    smaller = tl.zeros((BLOCK, BLOCK_KEYS), tl.int32)
    for first in range(0, M, BLOCK_KEYS):
        j = first + tl.arange(0, BLOCK_KEYS)
        key = tl.load(expert_ptr + j, mask=j < M, other=0).to(tl.int32) * M + j
        smaller += ((key[None, :] < bound[:, None]) & (j < M)[None, :]).to(tl.int32)
    place = tl.sum(smaller, 1)
    tl.store(inverse_ptr + i, place.to(tl.int64), mask=is_row)
    tl.store(order_ptr + place, i.to(tl.int64), mask=is_row)
    tl.store(offsets_ptr + i - M, place, mask=(i >= M) & (i < M + E))


@triton.jit
def _expert_permute_count_kernel(expert_ptr, counts_ptr, M, E, blocks, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """How many of a block's rows go to each expert: ``counts[e, block]``."""
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(expert_ptr + i, mask=i < M, other=0).to(tl.int32)
    e = tl.arange(0, BLOCK_E)
    counts = tl.histogram(expert, BLOCK_E, mask=i < M)
    tl.store(counts_ptr + e.to(tl.int64) * blocks + block, counts, mask=e < E)


@triton.jit
def _expert_permute_place_kernel(
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


@triton.jit
def _expert_permute_rows_kernel(x_ptr, inverse_ptr, rows_ptr, x_stride, D, K: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program per token and piece of its row: read once, written to each of its K places."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + t * x_stride + d, mask=d < D, other=0.0)
    for k in range(K):
        row = tl.load(inverse_ptr + t * K + k)
        tl.store(rows_ptr + row * D + d, x, mask=d < D)


def _launch(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order, inverse, offsets = sort_by_expert(experts, num_experts)
    return _launch_rows(x, inverse, experts.shape[1]), order, inverse, offsets


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """``order``, ``inverse`` and ``offsets``."""
    sort = _compare_sort if experts.numel() <= KERNEL_COMPARE_ROWS else _counting_sort
    return sort(experts.contiguous(), num_experts)


def _compare_sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    M = experts.numel()
    order, inverse = experts.new_empty(M), experts.new_empty(M)
    offsets = experts.new_empty(num_experts, dtype=torch.int32)
    block = 64
    _expert_permute_compare_kernel[(triton.cdiv(M + num_experts, block),)](
        experts, order, inverse, offsets, M, num_experts, BLOCK=block, BLOCK_KEYS=64, num_warps=4
    )
    return order, inverse, offsets


def _counting_sort(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    M = experts.numel()
    order, inverse = experts.new_empty(M), experts.new_empty(M)
    offsets = experts.new_empty(num_experts, dtype=torch.int32)
    # pairs within a block are compared, 128 a thread, and all programs count once more into each expert
    block = 128
    blocks = triton.cdiv(M, block)
    counts = experts.new_empty(num_experts * blocks, dtype=torch.int32)
    block_e = triton.next_power_of_2(num_experts)
    _expert_permute_count_kernel[(blocks,)](
        experts, counts, M, num_experts, blocks, BLOCK=block, BLOCK_E=block_e, num_warps=4
    )
    ends = counts.cumsum(0, dtype=torch.int32)
    _expert_permute_place_kernel[(blocks,)](
        experts, ends, order, inverse, offsets, M, num_experts, blocks, BLOCK=block, BLOCK_E=block_e, num_warps=4
    )
    return order, inverse, offsets


def _launch_rows(x: Tensor, inverse: Tensor, experts_per_token: int) -> Tensor:
    T, D = x.shape
    rows = x.new_empty(inverse.shape[0], D)
    if rows.numel() == 0:
        return rows
    if x.stride(1) != 1:
        x = x.contiguous()
    # eight elements a thread, which is 16 bytes of bfloat16; wider rows go to several programs
    block_d = min(triton.next_power_of_2(D), 1024)
    _expert_permute_rows_kernel[(T, triton.cdiv(D, block_d))](
        x, inverse, rows, x.stride(0), D, K=experts_per_token, BLOCK_D=block_d, num_warps=max(block_d // 256, 1)
    )
    return rows


def _check(x: Tensor, experts: Tensor, num_experts: int) -> None:
    if x.ndim != 2 or experts.ndim != 2:
        raise ValueError(
            f"expert_permute: want x [T, D] and experts [T, K], got {list(x.shape)} and {list(experts.shape)}"
        )
    check_value(
        experts.shape[0] == x.shape[0],
        lambda: f"expert_permute: want experts of {x.shape[0]} tokens, got {experts.shape[0]}",
    )
    if experts.dtype != torch.int64:
        raise TypeError(f"expert_permute: want int64 experts, got {experts.dtype}")


def _fake(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M = experts.numel()
    order = experts.new_empty(M)
    return x.new_empty(M, x.shape[1]), order, order.new_empty(M), experts.new_empty(num_experts, dtype=torch.int32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.experts_per_token = inputs[1].shape[1]
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, drows: Tensor, *rest: Any) -> tuple[Tensor, None, None]:
    (inverse,) = ctx.saved_tensors
    compute = torch.promote_types(drows.dtype, torch.float32)
    dx = drows[inverse].unflatten(0, (-1, ctx.experts_per_token)).to(compute).sum(1)
    return dx.to(drows.dtype), None, None


def _cost(x: Tensor, experts: Tensor, num_experts: int) -> Cost:
    rows = experts.numel() * x.shape[1] * x.element_size()
    return Cost(flops=0, bytes=tensor_bytes(x) + rows + 3 * tensor_bytes(experts) + 4 * num_experts)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, int]]:
    for T, K, D, E in [(1, 2, 8, 4), (7, 3, 20, 5), (0, 2, 8, 4), (50, 4, 16, 16)]:
        experts = torch.stack([torch.randperm(E, device=device)[:K] for _ in range(T)]) if T else torch.empty(0, K)
        yield torch.randn(T, D, device=device, dtype=dtype), experts.to(device, torch.int64), E
    # every token to one expert, the others empty
    yield torch.randn(6, 8, device=device, dtype=dtype), torch.full((6, 1), 2, device=device), 4


expert_permute = define(
    "expert_permute(Tensor x, Tensor experts, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=expert_permute_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    setup_context=_setup_context,
    backward=_backward,
)
"""Gather rows by expert.

Args:
    x: ``[T, D]``.
    experts: ``[T, K]`` int64, below ``num_experts``; the experts of a token differ.
    num_experts: E.

Returns:
    ``rows [M, D]``; ``order [M]`` int64, the flat (token, choice) of each row; ``inverse [M]`` int64, the row of each
    flat (token, choice); ``offsets [E]`` int32, end of each expert's rows (as ``grouped_matmul`` takes them).

Raises:
    ValueError: shapes do not fit.
    TypeError: ``experts`` is not int64.
"""

expert_permute.provide("triton", _launch, priority={"cuda": 10})
expert_permute.provide("compare", compare_few, priority={"cpu": 10}, supports=few_rows, inline=True)
