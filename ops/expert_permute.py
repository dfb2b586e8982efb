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
from deepfuse.ops.expert_order import find_offsets, find_order, nth_place, token_places

COMPARE_ROWS = 64
"""Up to so many rows, counting smaller keys (M^2 comparisons) beats a sort's call on a CPU."""


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
def _expert_permute_kernel(
    x_ptr, expert_ptr, order_ptr, inverse_ptr, offsets_ptr, rows_ptr, x_stride, T, D, E, K: tl.constexpr,
    BLOCK_D: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """One program per token and piece of its row: read once, written to each of its K places."""
    t = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    if t < T:
        d = piece * BLOCK_D + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + t * x_stride + d, mask=d < D, other=0.0)
        place = token_places(expert_ptr, order_ptr, inverse_ptr, t, T, piece == 0, K, COUNT, BLOCK, BLOCK_KEYS)
        for k in tl.static_range(K):
            tl.store(rows_ptr + nth_place(place, k, BLOCK) * D + d, x, mask=d < D)
    elif COUNT:
        block = (t - T) * tl.num_programs(1) + piece
        find_offsets(expert_ptr, offsets_ptr, block, T * K, E, BLOCK, BLOCK_KEYS)


def _launch(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (T, K), D = experts.shape, x.shape[1]
    experts = experts.contiguous()
    # eight elements a thread, which is 16 bytes of bfloat16; wider rows go to several programs
    block_d = max(min(triton.next_power_of_2(D), 1024), 1)
    pieces = triton.cdiv(D, block_d)
    places, more, constants = find_order(experts, num_experts, pieces)
    rows = x.new_empty(T * K, D)
    if rows.numel() == 0:
        return rows, *places
    if x.stride(1) != 1:
        x = x.contiguous()
    _expert_permute_kernel[(T + more, pieces)](
        x, experts, *places, rows, x.stride(0), T, D, num_experts, K=K, BLOCK_D=block_d, **constants, num_warps=4
    )
    return rows, *places


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
