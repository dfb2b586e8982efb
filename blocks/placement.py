"""Where the experts of each layer are: slots, of which each rank has as many as any other, and one expert in each.

An expert may be in several slots, and then its copies share what it is asked for equally. A model is cut by such a
placement in ``expert_parallel.py``; ``runtime/placement.py`` chooses one from measured loads.
Dims: L layers with experts, E experts, S >= E slots, R ranks.
Source: DeepSeek-V3 (arXiv:2412.19437), section 3.4, redundant experts.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Bins = Sequence[Sequence[int]]
"""Experts of each rank."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Placement:
    """Of all layers; two are equal where they put the same experts into the same slots of the same ranks.

    Attributes:
        expert_of_slot: ``[L, S]`` int64; slot ``s`` is on rank ``s // (S // ranks)``.
        ranks: that share the slots.
        loads: ``[L, E]`` float64, how much each expert was asked for when this was chosen, in any unit.

    Raises:
        ValueError: an expert has no slot, ranks do not divide the slots, or sizes or loads are impossible.
    """

    expert_of_slot: Tensor
    ranks: int
    loads: Tensor

    def __post_init__(self) -> None:
        check_loads(self.loads)
        (L, E), slots = self.loads.shape, self.expert_of_slot
        if slots.ndim != 2 or slots.shape[0] != L or slots.dtype != torch.int64:
            raise ValueError(
                f"placement: want expert_of_slot [{L}, slots] int64, with the layers of the loads, got "
                f"{list(slots.shape)} {slots.dtype}"
            )
        if type(self.ranks) is not int or self.ranks < 1 or slots.shape[1] % self.ranks:
            raise ValueError(
                f"placement: want ranks that divide the {slots.shape[1]} slots of a layer, got {self.ranks!r}"
            )
        for layer, row in enumerate(slots.tolist()):
            strange, without = sorted(set(row) - set(range(E))), sorted(set(range(E)) - set(row))
            if strange or without:
                got = f"expert {strange[0]}" if strange else f"none for expert {without[0]}"
                raise ValueError(
                    f"placement: want slots for the experts 0 .. {E - 1} and a slot for each, got {got} in layer {layer}"
                )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return self.ranks == other.ranks and torch.equal(self.expert_of_slot, other.expert_of_slot)

    def __hash__(self) -> int:
        return hash(self._digest())

    def __repr__(self) -> str:
        """Short, and of equal placements alone the same: keys of builds have it, and ranks compare it."""
        return f"Placement({self._sizes()}, {len(self.loads)} layers, {self._digest()})"

    def __str__(self) -> str:
        """The balance of each layer, and the mean of all."""
        lines = [f"{self._sizes()}: busiest rank over the mean"]
        before, after = self.before, self.after
        balances = zip(before.tolist(), after.tolist(), strict=True)
        lines += [f"layer {i}: {before:.3f} -> {after:.3f}" for i, (before, after) in enumerate(balances)]
        return "\n".join([*lines, f"mean of {len(lines) - 1} layers: {before.mean():.3f} -> {after.mean():.3f}"])

    @property
    def slots(self) -> int:
        """S, of a layer over all ranks."""
        return self.expert_of_slot.shape[1]

    @property
    def experts(self) -> int:
        """E, of a layer."""
        return self.loads.shape[1]

    @property
    def most_copies(self) -> int:
        """Of any expert of any layer."""
        return max(len(slots) for layer in self.slots_of_expert for slots in layer)

    @property
    def slots_of_expert(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """For each layer and expert its slots, in order."""
        return tuple(slots_of_experts(row, self.experts) for row in self.expert_of_slot.tolist())

    @property
    def before(self) -> Tensor:
        """``[L]`` float64, load of the busiest rank over the mean: with the experts in order and no copies."""
        bins = in_order(self.experts, self.ranks)
        return torch.tensor([_imbalance(row, bins) for row in self.loads.tolist()], dtype=torch.float64)

    @property
    def after(self) -> Tensor:
        """``[L]`` float64, likewise: as placed."""
        placed = self.expert_of_slot.view(len(self.loads), self.ranks, -1).tolist()
        balances = [_imbalance(row, bins) for row, bins in zip(self.loads.tolist(), placed, strict=True)]
        return torch.tensor(balances, dtype=torch.float64)

    def _sizes(self) -> str:
        return f"{self.experts} experts in {self.slots} slots of {self.ranks} ranks"

    def _digest(self) -> str:
        return hashlib.sha256(repr((self.ranks, self.expert_of_slot.tolist())).encode()).hexdigest()[:8]


def check_loads(loads: Tensor) -> None:
    """Raises ValueError where these are no loads ``[L, E]``."""
    if loads.ndim != 2 or 0 in loads.shape or not bool(((loads >= 0) & loads.isfinite()).all()):
        raise ValueError(
            f"placement: want finite loads >= 0 [layers, experts], got {tuple(loads.shape)} from "
            f"{loads.min().item() if loads.numel() else 'nothing'} to {loads.max().item() if loads.numel() else 'nothing'}"
        )


def slots_of_experts(expert_of_slot: Sequence[int], num_experts: int) -> tuple[tuple[int, ...], ...]:
    """For each expert of a layer its slots, in order."""
    found: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(expert_of_slot):
        found[expert].append(slot)
    return tuple(map(tuple, found))


def in_order(num_experts: int, ranks: int) -> Bins:
    """The experts dealt out in order, as evenly as they come out."""
    return [[e for e in range(num_experts) if e * ranks // num_experts == rank] for rank in range(ranks)]


def busiest(loads: Sequence[float], bins: Bins) -> float:
    """Load of the busiest rank, where copies of an expert share its load."""
    copies = [0] * len(loads)
    for held in bins:
        for e in held:
            copies[e] += 1
    return max(sum(loads[e] / copies[e] for e in held) for held in bins)


def _imbalance(loads: Sequence[float], bins: Bins) -> float:
    total = sum(loads)
    return busiest(loads, bins) * len(bins) / total if total else 1.0
