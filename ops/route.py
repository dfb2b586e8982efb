"""Router: which experts each token goes to, and with which weights.

    s = sigmoid(logits) or softmax(logits)                      affinities
    choice = s + bias                                           the bias steers the choice only
    groups: of n_group groups of experts keep the topk_group best, by the sum of the two best choices (V3) or the best
    experts = the num_experts_per_tok best choices within the kept groups; ties go to the lower index
    weights = s[experts] (/ their sum) * routed_scaling_factor
    behind them the n_shared_experts that every token goes to: experts E, E + 1, ... with weight 1

Dims: T tokens, E experts, G groups, K experts per token, S shared experts.
Source: DeepSeek-V3 (arXiv:2412.19437), eq. 12-16 and section 2.1.2; DeepSeek-V2 (arXiv:2405.04434), section 2.2.2.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.provider import at_most

SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(-1),
}
GROUP_SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "top2_sum": lambda choice_TGE: choice_TGE.topk(min(2, choice_TGE.shape[-1]), -1).values.sum(-1),
    "max": lambda choice_TGE: choice_TGE.amax(-1),
}
TINY = 1e-20
"""Keeps the normalisation of weights finite when every chosen affinity underflows (transformers' value)."""
COMPARE_PAIRS = 2**14
"""Up to so many pairs of experts over all tokens, ranks by comparison (one fused kernel) beat the calls of a sort on a
CPU: 18 for 46 us at one token and 16 experts in 4 groups on one core, 49 for 65 us at 64 tokens, but 63 for 49 us at
one token and 256 experts."""


def route_ref(
    logits: Tensor,
    bias: Tensor | None,
    scoring_func: str,
    group_score: str,
    n_group: int,
    topk_group: int,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    n_shared_experts: int,
) -> tuple[Tensor, Tensor]:
    scores_TE = SCORES[scoring_func](logits)
    choice_TE = scores_TE if bias is None else scores_TE + bias
    if topk_group < n_group:
        groups_TGE = choice_TE.unflatten(-1, (n_group, -1))
        kept_TG = _best(GROUP_SCORES[group_score](groups_TGE), topk_group)
        # -inf and not 0: with the bias a choice may be negative, and 0 would beat it
        choice_TE = groups_TGE.masked_fill(~kept_TG[..., None], float("-inf")).flatten(-2)
    # a stable sort, so that ties fall the same way everywhere
    experts_TK = torch.sort(choice_TE, stable=True, dim=-1, descending=True).indices[:, :num_experts_per_tok]
    weights_TK = _weights(scores_TE, experts_TK, norm_topk_prob, routed_scaling_factor)
    return _with_shared(weights_TK, experts_TK.contiguous(), logits.shape[1], n_shared_experts)


def _with_shared(
    weights_TK: Tensor, experts_TK: Tensor, num_experts: int, n_shared_experts: int
) -> tuple[Tensor, Tensor]:
    if not n_shared_experts:
        return weights_TK, experts_TK
    shape = (weights_TK.shape[0], n_shared_experts)
    shared_S = torch.arange(num_experts, num_experts + n_shared_experts, device=weights_TK.device)
    return torch.cat([weights_TK, weights_TK.new_ones(shape)], 1), torch.cat([experts_TK, shared_S.expand(shape)], 1)


def _best(x: Tensor, k: int) -> Tensor:
    """Mask of the ``k`` largest of each row; ties go to the lower index."""
    best = torch.sort(x, stable=True, dim=-1, descending=True).indices[..., :k]
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, best, True)


def _weights(scores_TE: Tensor, experts_TK: Tensor, norm_topk_prob: bool, routed_scaling_factor: float) -> Tensor:
    weights_TK = scores_TE.gather(-1, experts_TK)
    if norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + TINY)
    return weights_TK * routed_scaling_factor


def _compare(
    logits: Tensor,
    bias: Tensor | None,
    scoring_func: str,
    group_score: str,
    n_group: int,
    topk_group: int,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    n_shared_experts: int,
) -> tuple[Tensor, Tensor]:
    """The same without a sort: the k-th best is the one that k others go before."""
    scores_TE = SCORES[scoring_func](logits)
    choice_TE = scores_TE if bias is None else scores_TE + bias
    if topk_group < n_group:
        groups_TGE = choice_TE.unflatten(-1, (n_group, -1))
        if group_score == "top2_sum":
            # zeros beside the two leave their sum exact
            best_TG = groups_TGE.where(_ranks(groups_TGE) < 2, 0).sum(-1)
        else:
            best_TG = groups_TGE.amax(-1)
        kept_TG = _ranks(best_TG) < topk_group
        choice_TE = groups_TGE.masked_fill(~kept_TG[..., None], float("-inf")).flatten(-2)
    slot_K1 = torch.arange(num_experts_per_tok, device=logits.device)[:, None]
    chosen_TKE = _ranks(choice_TE)[:, None] == slot_K1
    experts_TK = (chosen_TKE * torch.arange(logits.shape[1], device=logits.device)).sum(-1)
    weights_TK = scores_TE[:, None].where(chosen_TKE, 0).sum(-1)
    if norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + TINY)
    return _with_shared(weights_TK * routed_scaling_factor, experts_TK, logits.shape[1], n_shared_experts)


def _ranks(x: Tensor) -> Tensor:
    """How many of its row go before each element in a stable descending sort, where NaN is the largest.

    Counted in the dtype of ``x``, which Inductor vectorises together with the comparisons.
    """
    x = x.where(x >= float("-inf"), float("inf"))
    place = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
    mine, other = x[..., :, None], x[..., None, :]
    before = (other > mine) | ((other == mine) & (place < place[:, None]))
    return before.sum(-1, dtype=x.dtype)


def _compare_supports(logits: Tensor, *rest: Any) -> str | None:
    pairs = logits.shape[0] * logits.shape[1] ** 2
    return None if at_most(pairs, COMPARE_PAIRS) else f"tokens * experts^2 is not known to be at most {COMPARE_PAIRS}"


@triton.jit
def _route_best(x, place, free):
    """Place of the largest of ``x`` where ``free``; ties go to the lowest. Some place is free."""
    largest = tl.max(tl.where(free, x, float("-inf")))
    return tl.min(tl.where(free & (x == largest), place, 2147483647))


@triton.jit
def _route_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    experts_ptr,
    logits_stride,
    group_size,
    n_group,
    num_experts,
    routed_scaling_factor,
    tiny,
    SIGMOID: tl.constexpr,
    TOP2_SUM: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    NORM: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per token; its experts are held in registers, a group a row."""
    t = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    place = tl.arange(0, BLOCK_S)[None, :] + tl.zeros((BLOCK_G, 1), tl.int32)
    e = g[:, None] * group_size + place
    mask = (g < n_group)[:, None] & (place < group_size)
    logits = tl.load(logits_ptr + t * logits_stride + e, mask=mask, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        scores = tl.exp(logits - tl.max(logits))
        scores = scores / tl.sum(scores)
    choice = scores
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + e, mask=mask, other=0.0).to(tl.float32)
    # NaN counts as the largest, as in the reference's sort; no place would equal it
    choice = tl.where(choice >= float("-inf"), choice, float("inf"))

    free = mask
    if TOPK_GROUP > 0:
        largest = tl.max(tl.where(mask, choice, float("-inf")), 1)
        best = largest
        if TOP2_SUM:
            first = tl.min(tl.where(mask & (choice == largest[:, None]), place, BLOCK_S), 1)
            rest = tl.where(mask & (place != first[:, None]), choice, float("-inf"))
            best += tl.where(group_size > 1, tl.max(rest, 1), 0.0)
            best = tl.where(best >= float("-inf"), best, float("inf"))
        kept = g < 0
        for _ in range(TOPK_GROUP):
            kept |= g == _route_best(best, g, (g < n_group) & ~kept)
        choice = tl.where(kept[:, None], choice, float("-inf"))

    slot = tl.arange(0, BLOCK_K)
    experts = tl.zeros((BLOCK_K,), tl.int32)
    weights = tl.zeros((BLOCK_K,), tl.float32)
    for k in range(K):
        expert = _route_best(choice, e, free)
        score = tl.sum(tl.where(mask & (e == expert), scores, 0.0))
        experts = tl.where(slot == k, expert, experts)
        weights = tl.where(slot == k, score, weights)
        free = free & (e != expert)
    if NORM:
        weights = weights / (tl.sum(weights) + tiny)
    weights = tl.where(slot < K, weights * routed_scaling_factor, 1.0)
    experts = tl.where(slot < K, experts, num_experts + slot - K)
    to = t * (K + SHARED) + slot
    tl.store(weights_ptr + to, weights, mask=slot < K + SHARED)
    tl.store(experts_ptr + to, experts.to(tl.int64), mask=slot < K + SHARED)


def _launch(
    logits: Tensor,
    bias: Tensor | None,
    scoring_func: str,
    group_score: str,
    n_group: int,
    topk_group: int,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    n_shared_experts: int,
) -> tuple[Tensor, Tensor]:
    (T, E), K, S = logits.shape, num_experts_per_tok, n_shared_experts
    weights, experts = logits.new_empty(T, K + S), logits.new_empty(T, K + S, dtype=torch.int64)
    if T == 0:
        return weights, experts
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    grouped = topk_group < n_group
    rows = n_group if grouped else 1
    block_g, block_s = triton.next_power_of_2(rows), triton.next_power_of_2(E // rows)
    _route_kernel[(T,)](
        logits,
        None if bias is None else bias.contiguous(),
        weights,
        experts,
        logits.stride(0),
        E // rows,
        rows,
        E,
        routed_scaling_factor,
        TINY,
        SIGMOID=scoring_func == "sigmoid",
        TOP2_SUM=group_score == "top2_sum",
        TOPK_GROUP=topk_group if grouped else 0,
        NORM=norm_topk_prob,
        K=K,
        SHARED=S,
        BLOCK_G=block_g,
        BLOCK_S=block_s,
        BLOCK_K=triton.next_power_of_2(K + S),
        # one warp to 16 experts a thread: its reductions need no shared memory
        num_warps=min(max(block_g * block_s // 512, 1), 8),
    )
    return weights, experts


def _launch_supports(logits: Tensor, *rest: Any) -> str | None:
    return None if logits.dtype == torch.float32 else f"computes in float32, got {logits.dtype}"


def _check(
    logits: Tensor,
    bias: Tensor | None,
    scoring_func: str,
    group_score: str,
    n_group: int,
    topk_group: int,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    n_shared_experts: int,
) -> None:
    if logits.ndim != 2 or (bias is not None and bias.shape != logits.shape[1:]):
        got = None if bias is None else list(bias.shape)
        raise ValueError(f"route: want logits [T, E] and bias [E] or None, got {list(logits.shape)} and {got}")
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"route: want float32 logits (rounded affinities change the choice), got {logits.dtype}")
    if scoring_func not in SCORES:
        raise ValueError(f"route: want scoring_func out of {list(SCORES)}, got {scoring_func!r}")
    if group_score not in GROUP_SCORES:
        raise ValueError(f"route: want group_score out of {list(GROUP_SCORES)}, got {group_score!r}")
    E = logits.shape[1]
    if n_group < 1 or E % n_group or not 1 <= topk_group <= n_group:
        raise ValueError(
            f"route: want n_group dividing the {E} experts and 1 <= topk_group <= n_group, got n_group {n_group} and "
            f"topk_group {topk_group}"
        )
    if not 1 <= num_experts_per_tok <= topk_group * (E // n_group):
        raise ValueError(
            f"route: want 1 <= num_experts_per_tok <= {topk_group * (E // n_group)}, the experts of {topk_group} "
            f"groups, got {num_experts_per_tok}"
        )
    if n_shared_experts < 0:
        raise ValueError(f"route: want n_shared_experts >= 0, got {n_shared_experts}")


def _fake(logits: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], rest[4] + rest[7])
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, ctx.scoring_func, _, _, _, ctx.chosen, ctx.norm, ctx.scaling, _ = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dweights: Tensor, dexperts: Any) -> tuple[Any, ...]:
    logits, experts = ctx.saved_tensors
    scores_TE = SCORES[ctx.scoring_func](logits)
    # weights of shared experts are constants
    experts_TK, dchosen_TK = experts[:, : ctx.chosen], dweights[:, : ctx.chosen] * ctx.scaling
    if ctx.norm:
        chosen_TK = scores_TE.gather(-1, experts_TK)
        total_T1 = chosen_TK.sum(-1, keepdim=True) + TINY
        dchosen_TK = (dchosen_TK - (dchosen_TK * chosen_TK).sum(-1, keepdim=True) / total_T1) / total_T1
    dscores_TE = torch.zeros_like(scores_TE).scatter_add(-1, experts_TK, dchosen_TK)
    if ctx.scoring_func == "sigmoid":
        dlogits = dscores_TE * scores_TE * (1 - scores_TE)
    else:
        dlogits = scores_TE * (dscores_TE - (dscores_TE * scores_TE).sum(-1, keepdim=True))
    return dlogits, *[None] * 9


def _cost(logits: Tensor, bias: Tensor | None, *rest: Any) -> Cost:
    chosen = logits.shape[0] * (rest[4] + rest[7])
    return Cost(flops=8 * logits.numel(), bytes=tensor_bytes(logits, bias) + chosen * (logits.element_size() + 8))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    # the router runs in float32 whatever the model's dtype
    for T, E, G, kept, K in [(1, 8, 1, 1, 2), (5, 16, 4, 2, 3), (0, 8, 2, 1, 2), (9, 12, 3, 3, 4), (4, 256, 8, 4, 8)]:
        logits = torch.randn(T, E, device=device, dtype=torch.promote_types(dtype, torch.float32))
        yield logits, torch.randn(E, device=device) * 0.1, "sigmoid", "top2_sum", G, kept, K, True, 2.5, (T + 1) % 3
        yield logits, None, "softmax", "max", G, kept, K, False, 1.0, 0


route = define(
    "route(Tensor logits, Tensor? bias, str scoring_func, str group_score, int n_group, int topk_group,"
    " int num_experts_per_tok, bool norm_topk_prob, float routed_scaling_factor, int n_shared_experts) -> (Tensor, Tensor)",
    reference=route_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    setup_context=_setup_context,
    backward=_backward,
)
"""Choose experts.

Args:
    logits: ``[T, E]`` float32, ``x @ gate.T``.
    bias: ``[E]`` float32 or ``None``: ``e_score_correction_bias``; takes part in the choice, not in the weights.
    scoring_func: ``sigmoid`` (V3) or ``softmax`` (V2).
    group_score: ``top2_sum`` (V3) or ``max`` (V2).
    n_group, topk_group, num_experts_per_tok, norm_topk_prob, routed_scaling_factor: as in ``config.json``.
    n_shared_experts: S, of those whose weights stand behind the routed experts'; 0 where they are computed apart.

Returns:
    ``weights [T, K + S]`` in the dtype of ``logits``, ``experts [T, K + S]`` int64: best choice first, then the shared
    experts, whose weights are 1, neither normalised nor scaled. The gradient reaches ``logits`` through the weights of
    the chosen alone.

Raises:
    ValueError: shapes do not fit, or the numbers contradict each other.
    TypeError: ``logits`` is narrower than float32.
"""

route.provide("triton", _launch, priority={"cuda": 10}, supports=_launch_supports)
route.provide("compare", _compare, priority={"cpu": 10}, supports=_compare_supports, inline=True)
