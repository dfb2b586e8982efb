"""Experts on several processes, each of which takes a fixed number of rows from each process: the rest is dropped.

    C = min(T, ceil(T * K / E * capacity_factor))             rows of one process for one expert
    slots [E, C], empty ones zero  ->  all-to-all of equal parts  ->  experts  ->  all-to-all  ->  weighted sums

All shapes follow from T, nothing waits for a count: the graph is static, and a CUDA graph may hold it. What is dropped
are the choices with the lowest routing weight (``drop="affinity"``, of equal ones the later token's), or those of the
last tokens (``"position"``). A dropped choice adds nothing: with all dropped, a token keeps the residual stream alone.
All processes must have equally many rows of tokens; those that are padding choose E, which is no expert.
Dims: T tokens, D model width, E experts, K experts per token, M = T * K, R processes, L = E / R experts of a process.
Source: expert capacity, Lepikhin et al. 2020 (arXiv:2006.16668), section 2.2; dropping by affinity, DeepSeek-V2
(arXiv:2405.04434), section 2.2.4.
"""

import math
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.collectives import all_to_all
from deepfuse.blocks.dropless import count
from deepfuse.blocks.message import Dispatch, Message
from deepfuse.blocks.slots import from_slots, sources

Drop = Literal["affinity", "position"]


class Capacity(nn.Module):
    """Each expert takes up to C rows of each process."""

    dropped: Tensor

    def __init__(
        self,
        num_experts: int,
        axis: Axis,
        *,
        capacity_factor: float,
        drop: Drop = "affinity",
        dispatch: Dispatch = "auto",
    ):
        super().__init__()
        axis.share(num_experts, "n_routed_experts")
        if not 0 < capacity_factor < math.inf:
            raise ValueError(
                f"capacity: want a finite capacity_factor > 0, got {capacity_factor}; 1 drops whatever is above the mean "
                "load of an expert, mode 'dropless' nothing"
            )
        if drop not in get_args(Drop):
            raise ValueError(f"capacity: want drop out of {list(get_args(Drop))}, got {drop!r}")
        self.num_experts, self.axis, self.drop, self.dispatch = num_experts, axis, drop, dispatch
        # of integers alone, which may be symbols
        self.factor = Fraction(str(capacity_factor))
        # choices dropped, and all choices, since somebody last looked
        self.register_buffer("dropped", torch.zeros(2, dtype=torch.int64), persistent=False)

    def capacity(self, tokens: int, choices: int) -> int:
        """C, for so many tokens of a process and choices of each."""
        # no token chooses an expert twice; which of the two is less does not depend on tokens, which may be a symbol
        if choices * self.factor >= self.num_experts:
            return tokens
        return -(-tokens * choices * self.factor.numerator // (self.num_experts * self.factor.denominator))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, ffn: nn.Module) -> tuple[Tensor, Tensor]:
        """As :class:`~deepfuse.blocks.exchange.Local`'s; the load counts what was chosen, dropped or not.

        ``experts [T, K]``: E where there is nothing to send, and nothing is added.
        """
        E, R = self.num_experts, self.axis.size
        L, C = E // R, self.capacity(*experts.shape)
        # those that chose nothing are counted behind the experts
        load = count(experts, E + 1)
        slot = self._slots(weights, experts, load, C)
        load = load[:E]
        self.dropped.add_(torch.stack((load.sum() - (slot >= 0).sum(), load.sum())))
        source = sources(slot, E * C)
        rows = Message.of(x, self.dispatch, ffn).in_slots(source, slot).sent([L * C] * R, [L * C] * R, self.axis)
        ends = torch.arange(1, L + 1, dtype=torch.int32, device=x.device) * (R * C)
        # by expert and then by process, and back
        rows_here, quantized = rows.reordered(lambda part: _swapped(part, R, L)).opened()
        y = ffn(rows_here, ends, quantized)
        y = all_to_all(_swapped(y, L, R), [L * C] * R, [L * C] * R, self.axis)
        return from_slots(y, source, slot, weights), load

    def _slots(self, weights: Tensor, experts: Tensor, load: Tensor, capacity: int) -> Tensor:
        """``[T, K]``: the slot of each choice among E * C, or -1; ``load [E + 1]``."""
        chosen = experts.flatten()
        if self.drop == "affinity":
            first = weights.detach().flatten().argsort(descending=True, stable=True)
            order = first[chosen[first].argsort(stable=True)]
        else:
            order = chosen.argsort(stable=True)
        rank = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
        place = rank - (load.cumsum(0) - load)[chosen]
        fits = (place < capacity) & (chosen < self.num_experts)
        return torch.where(fits, chosen * capacity + place, -1).view_as(experts)


def drop_counts(model: nn.Module) -> list[Tensor]:
    """Of each exchange of a model that may drop: ``[2]`` int64, choices dropped and all choices."""
    return [module.dropped for module in model.modules() if isinstance(module, Capacity)]


def _swapped(rows: Tensor, outer: int, inner: int) -> Tensor:
    """``[outer * inner * n, D]`` -> ``[inner * outer * n, D]``."""
    return rows.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)
