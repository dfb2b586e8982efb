"""Router: which experts each token goes to, and with which weights.

    s = sigmoid(logits) or softmax(logits)                      affinities
    choice = s + bias                                           the bias steers the choice only
    groups: of n_group groups of experts keep the topk_group best, by the sum of the two best choices (V3) or the best
    experts = the num_experts_per_tok best choices within the kept groups; ties go to the lower index
    weights = s[experts] (/ their sum) * routed_scaling_factor

Dims: T tokens, E experts, G groups, K experts per token.
Source: DeepSeek-V3 (arXiv:2412.19437), eq. 12-16 and section 2.1.2; DeepSeek-V2 (arXiv:2405.04434), section 2.2.2.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define

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
    return _weights(scores_TE, experts_TK, norm_topk_prob, routed_scaling_factor), experts_TK.contiguous()


def _best(x: Tensor, k: int) -> Tensor:
    """Mask of the ``k`` largest of each row; ties go to the lower index."""
    best = torch.sort(x, stable=True, dim=-1, descending=True).indices[..., :k]
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, best, True)


def _weights(scores_TE: Tensor, experts_TK: Tensor, norm_topk_prob: bool, routed_scaling_factor: float) -> Tensor:
    weights_TK = scores_TE.gather(-1, experts_TK)
    if norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + TINY)
    return weights_TK * routed_scaling_factor


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


def _fake(logits: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], rest[4])
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, ctx.scoring_func, _, _, _, _, ctx.norm, ctx.scaling = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dweights: Tensor, dexperts: Any) -> tuple[Any, ...]:
    logits, experts_TK = ctx.saved_tensors
    scores_TE = SCORES[ctx.scoring_func](logits)
    dchosen_TK = dweights * ctx.scaling
    if ctx.norm:
        chosen_TK = scores_TE.gather(-1, experts_TK)
        total_T1 = chosen_TK.sum(-1, keepdim=True) + TINY
        dchosen_TK = (dchosen_TK - (dchosen_TK * chosen_TK).sum(-1, keepdim=True) / total_T1) / total_T1
    dscores_TE = torch.zeros_like(scores_TE).scatter_add(-1, experts_TK, dchosen_TK)
    if ctx.scoring_func == "sigmoid":
        dlogits = dscores_TE * scores_TE * (1 - scores_TE)
    else:
        dlogits = scores_TE * (dscores_TE - (dscores_TE * scores_TE).sum(-1, keepdim=True))
    return dlogits, *[None] * 8


def _cost(logits: Tensor, bias: Tensor | None, *rest: Any) -> Cost:
    chosen = logits.shape[0] * rest[4]
    return Cost(flops=8 * logits.numel(), bytes=tensor_bytes(logits, bias) + chosen * (logits.element_size() + 8))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    # the router runs in float32 whatever the model's dtype
    for T, E, G, kept, K in [(1, 8, 1, 1, 2), (5, 16, 4, 2, 3), (0, 8, 2, 1, 2), (9, 12, 3, 3, 4), (4, 256, 8, 4, 8)]:
        logits = torch.randn(T, E, device=device, dtype=torch.promote_types(dtype, torch.float32))
        yield logits, torch.randn(E, device=device) * 0.1, "sigmoid", "top2_sum", G, kept, K, True, 2.5
        yield logits, None, "softmax", "max", G, kept, K, False, 1.0


route = define(
    "route(Tensor logits, Tensor? bias, str scoring_func, str group_score, int n_group, int topk_group,"
    " int num_experts_per_tok, bool norm_topk_prob, float routed_scaling_factor) -> (Tensor, Tensor)",
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

Returns:
    ``weights [T, K]`` in the dtype of ``logits``, ``experts [T, K]`` int64, best choice first. The gradient reaches
    ``logits`` through the weights alone.

Raises:
    ValueError: shapes do not fit, or the numbers contradict each other.
    TypeError: ``logits`` is narrower than float32.
"""
