"""Where to put the experts of a layer when some are asked for more often: copies of the hottest, spread evenly over ranks.

Each rank has as many slots as any other, and a slot holds one expert. Slots beyond one for each expert go, one at a time,
to the expert whose copies have most to do; copies share their expert's load equally. Slots are packed into ranks, the
heaviest first, each into the lightest rank with room (without a copy of it, where there is one); then slots of the
heaviest and of the lightest rank change places as long as that helps. So the busiest rank has at most the mean and one
slot more, which is at most twice what any placement has. With groups of experts of which a token keeps few (node-limited
routing), whole groups are packed into nodes first, so that a token still visits few nodes; then all this holds in a node.

Source: DeepSeek-V3 (arXiv:2412.19437), section 3.4, and EPLB, its authors' balancer, which has the same two policies;
heaviest first is Graham 1969.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from deepfuse.blocks.placement import Bins, Placement, busiest, check_loads, in_order
from deepfuse.runtime.placement_file import load_loads

__all__ = ["Placement", "place_experts"]


def place_experts(
    loads: Tensor | str | os.PathLike[str],
    ranks: int,
    *,
    redundant: int = 0,
    ranks_per_node: int | None = None,
    n_group: int = 1,
) -> Placement:
    """Choose copies and places; the busiest rank never has more than with the experts in order and no copies.

    Args:
        loads: ``[L, E]``, how much each expert of each layer was asked for, in any unit; or the file of
            ``Model.expert_loads(path)``.
        ranks: that share the experts, ``(E + redundant) / ranks`` slots each.
        redundant: slots beyond one for each expert, over all ranks.
        ranks_per_node: ``None``: all ranks are on one node.
        n_group: groups of experts, in order. Where nodes divide them, each stays on one node; else nodes do not matter.

    Raises:
        ValueError: sizes that do not fit each other, or loads that are negative, infinite or not numbers.
        FileNotFoundError: there is no such file.
    """
    loads = loads if isinstance(loads, Tensor) else load_loads(loads)
    check_loads(loads)
    E = loads.shape[1]
    if ranks < 1 or redundant < 0 or (E + redundant) % ranks:
        raise ValueError(
            f"placement: want ranks that divide {E} experts + redundant, and redundant >= 0, got {ranks} and {redundant}"
        )
    per_node = ranks if ranks_per_node is None else ranks_per_node
    if per_node < 1 or ranks % per_node or n_group < 1 or E % n_group:
        raise ValueError(
            f"placement: want ranks_per_node that divides {ranks} ranks and n_group that divides {E} experts, "
            f"got {ranks_per_node} and {n_group}"
        )
    nodes = ranks // per_node
    if n_group % nodes or redundant % nodes:
        nodes = 1
    chosen = []
    for row in loads.double().tolist():
        placed = _place(row, ranks, redundant, nodes, n_group)
        plain = _filled(row, in_order(E, ranks), (E + redundant) // ranks, ranks // nodes)
        best = min(placed, plain, key=lambda bins: busiest(row, bins))
        chosen.append([expert for experts in best for expert in experts])
    return Placement(torch.tensor(chosen, dtype=torch.int64), ranks, loads.double())


def _place(loads: Sequence[float], ranks: int, redundant: int, nodes: int, n_group: int) -> Bins:
    size = len(loads) // n_group
    groups = [range(g * size, (g + 1) * size) for g in range(n_group)]
    found: list[Sequence[int]] = []
    for node in _packed([sum(loads[e] for e in g) for g in groups], list(range(n_group)), nodes):
        experts = [e for g in node for e in groups[g]]
        slots = _copied(loads, experts, redundant // nodes, ranks // nodes)
        shares = [loads[e] / slots.count(e) for e in slots]
        found += _packed(shares, slots, ranks // nodes)
    return found


def _copied(loads: Sequence[float], experts: Sequence[int], redundant: int, ranks: int) -> list[int]:
    """The experts and their copies, more than one for each rank only where all have as many."""
    copies = dict.fromkeys(experts, 1)
    for _ in range(redundant):
        hottest = max([e for e in experts if copies[e] < ranks] or experts, key=lambda e: loads[e] / copies[e])
        copies[hottest] += 1
    return [e for e in experts for _ in range(copies[e])]


def _packed(weights: Sequence[float], labels: Sequence[int], bins: int) -> Bins:
    """Labels in bins of equal numbers and about equal weight."""
    room = len(weights) // bins
    inside: list[list[int]] = [[] for _ in range(bins)]
    total = [0.0] * bins
    for i in sorted(range(len(weights)), key=lambda i: -weights[i]):
        free = [b for b in range(bins) if len(inside[b]) < room]
        into = min(free, key=lambda b: (any(labels[j] == labels[i] for j in inside[b]), total[b]))
        inside[into].append(i)
        total[into] += weights[i]
    while _swapped(weights, inside):
        pass
    return [[labels[i] for i in held] for held in inside]


def _swapped(weights: Sequence[float], inside: list[list[int]]) -> bool:
    """Let the heaviest and the lightest bin change the two places that bring them closest; whether that helped."""
    total = [sum(weights[i] for i in held) for held in inside]
    heavy, light = total.index(max(total)), total.index(min(total))
    gap = total[heavy] - total[light]
    pairs = [(a, b) for a in range(len(inside[heavy])) for b in range(len(inside[light]))]

    def left(pair: tuple[int, int]) -> float:
        return abs(gap - 2 * (weights[inside[heavy][pair[0]]] - weights[inside[light][pair[1]]]))

    a, b = min(pairs, key=left)
    # by more than the roundoff of the sums, so that it ends
    if gap - left((a, b)) <= 1e-9 * total[heavy]:
        return False
    inside[heavy][a], inside[light][b] = inside[light][b], inside[heavy][a]
    return True


def _filled(loads: Sequence[float], dealt: Bins, slots: int, of_node: int) -> Bins:
    """The experts in order, and in what is left of each rank copies of its own; of its node's hottest where it has none."""
    found = []
    for rank, experts in enumerate(dealt):
        first = rank // of_node * of_node
        on_node = [e for held in dealt[first : first + of_node] for e in held]
        own = experts or [max(on_node, key=loads.__getitem__)]
        found.append([own[i % len(own)] for i in range(slots)])
    return found
