"""The sequence-wise balance loss: against one sequence's tokens all choosing the same experts.

    s'[t, e] = s[t, e] / sum_j s[t, j]
    f[e]     = E / (K L) * how many of the L tokens have s[t, e] among their K largest      (no gradient)
    P[e]     = mean over t of s'[t, e]
    loss     = alpha * sum_e f[e] P[e],  its mean over the sequences; alpha at least, where all experts are equal

The K largest are those of the affinities themselves, without bias and groups, as the paper has it; so f is not the load
that the experts get. The loss joins in the backward pass: logits go on as they are, and their gradient has the loss's
added, which counts beside a loss that is a mean over tokens.
Dims: T tokens, E experts, K experts per token, B sequences of L tokens.
Source: DeepSeek-V3 (arXiv:2412.19437), eq. 17-20; how it joins: `AddAuxiliaryLoss` of DeepSeek-V2's modeling code.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from deepfuse.ops.route import SCORES


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], grads[0].new_ones((), dtype=ctx.dtype)


class SequenceBalance(nn.Module):
    """The loss as a router has it."""

    seen: Tensor

    def __init__(self, alpha: float, seq_len: int, sequences: int | None = None):
        """Tokens are whole sequences of ``seq_len``, one after the other; ``alpha`` is 1e-4 for DeepSeek-V3.

        ``sequences``: of a step, over which the mean is, where a router gets these in halves; ``None``: those of each call.
        """
        super().__init__()
        if not 0 <= alpha < math.inf or seq_len < 1:
            raise ValueError(f"balance loss: want a finite alpha >= 0 and seq_len >= 1, got {alpha} and {seq_len}")
        self.alpha, self.seq_len, self.sequences = alpha, seq_len, sequences
        # losses without alpha, and how many, since somebody last looked
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float32), persistent=False)

    def joined(self, logits: Tensor, num_experts_per_tok: int, scoring_func: str) -> Tensor:
        """``logits [T, E]`` as they are, whose gradient will have the loss's added."""
        loss = sequence_balance_loss(logits, self.seq_len, num_experts_per_tok, scoring_func)
        # where a step's sequences come in halves, each counts as much as it has of them
        share = 1.0 if self.sequences is None else logits.shape[0] / (self.seq_len * self.sequences)
        self.seen.add_(torch.stack((share * loss.detach(), torch.full_like(loss, share))))
        return _Joined.apply(logits, self.alpha * share * loss)  # type: ignore[no-untyped-call, no-any-return]


def sequence_balance_loss(logits: Tensor, seq_len: int, num_experts_per_tok: int, scoring_func: str) -> Tensor:
    """Mean over sequences of ``sum_e f[e] P[e]``, without alpha.

    Args:
        logits: ``[T, E]`` float32, of a router; T is a multiple of ``seq_len``.
        scoring_func: ``sigmoid`` or ``softmax``.

    Raises:
        ValueError: tokens are no whole sequences.
    """
    T, E = logits.shape
    if T % seq_len:
        raise ValueError(f"balance loss: want tokens of whole sequences of seq_len = {seq_len}, got {T}")
    scores = SCORES[scoring_func](logits)
    largest = torch.zeros_like(scores).scatter(1, scores.detach().topk(num_experts_per_tok, 1).indices, 1.0)
    f_BE = largest.unflatten(0, (-1, seq_len)).mean(1) * (E / num_experts_per_tok)
    P_BE = (scores / scores.sum(1, keepdim=True)).unflatten(0, (-1, seq_len)).mean(1)
    return (f_BE * P_BE).sum(1).mean()
