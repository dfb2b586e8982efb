"""Experts dealt out to the processes of an axis: a rewrite of a model, in place, by every process the same.

Names of parameters stay; each process's hold its share of the experts. Router and shared expert are whole on every one.
"""

from typing import Literal, get_args

import torch
from torch import nn

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.capacity import Capacity, Drop
from deepfuse.blocks.chunked import Chunked
from deepfuse.blocks.cut import Cut, taken
from deepfuse.blocks.dropless import Dropless
from deepfuse.blocks.fp8 import FP8Experts
from deepfuse.blocks.message import Dispatch
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.moe import MoE
from deepfuse.blocks.node_limited import NodeLimited
from deepfuse.blocks.placement import Placement
from deepfuse.blocks.replicas import Replicas

Mode = Literal["dropless", "capacity", "node_limited"]


@torch.no_grad()
def to_expert_parallel(
    model: CausalLM,
    axis: Axis,
    mode: Mode = "dropless",
    *,
    capacity_factor: float = 1.25,
    drop: Drop = "affinity",
    dispatch: Dispatch = "auto",
    nodes: tuple[Axis, Axis] | None = None,
    chunks: int = 1,
    placement: Placement | None = None,
) -> list[str]:
    """Keep this process's share of each layer's experts, and send tokens to where theirs are.

    Args:
        model: not quantized yet; on any device. On the meta device nothing is copied.
        axis: named ``expert``; process i of R has experts ``i * E / R`` up to ``(i + 1) * E / R``, or the i-th part of
            the slots of ``placement``.
        mode: ``dropless``; ``capacity``: what experts take is bounded, and the rest dropped (``capacity.py``); or
            ``node_limited``: a token travels once to each node (``node_limited.py``).
        capacity_factor, drop: in mode ``capacity``, the bound as a multiple of the mean load, and what is dropped:
            choices of the lowest weight (``affinity``), or of the last tokens (``position``).
        dispatch: ``fp8``: rows travel to experts as FP8; ``auto``: where the experts would quantize them anyway.
        nodes: in mode ``node_limited``, and only there, the processes of this one's place in each node, and those of its
            node; together those of ``axis``, node by node.
        chunks: of a layer's tokens, which travel one after the other (``chunked.py``).
        placement: of experts in slots, for inference: of the layers with experts, in order, but for those of multi-token
            prediction, which a served model does not run: they have the experts in order, over again from the first. A
            capacity is then a slot's, a multiple of the mean load of a slot.

    Returns:
        The names of the mixtures of experts.

    Raises:
        ValueError: the processes do not divide the experts, or nodes not their groups; the model has none or has FP8
            weights; a setting is none of these; or the placement is of another model or axis, or has a group on two nodes.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError("expert parallelism: want a model with routed experts, got none; leave out the axis 'expert'")
    if mode not in get_args(Mode):
        raise ValueError(f"expert parallelism: want mode out of {list(get_args(Mode))}, got {mode!r}")
    if dispatch not in get_args(Dispatch):
        raise ValueError(f"expert parallelism: want dispatch out of {list(get_args(Dispatch))}, got {dispatch!r}")
    if (nodes is None) != (mode != "node_limited"):
        raise ValueError(
            f"expert parallelism: want nodes with mode 'node_limited' and with no other, got {mode!r} with{'out' * (nodes is None)}"
        )
    if nodes is not None:
        _check_nodes(axis, *nodes, model.config.n_group)
    rows = [None] * len(layers) if placement is None else _rows(placement, model, axis, nodes)
    if any(isinstance(layer.experts, FP8Experts) for _, layer in layers):
        raise ValueError(
            "expert parallelism: want a model to be cut before its weights are FP8, got one with FP8 weights"
        )
    for (name, layer), row in zip(layers, rows, strict=True):
        cut, slots = Cut(axis, 0), layer.num_experts
        if placement is not None and row is not None:
            cut, slots = Cut(axis, 0, slots=row), placement.slots
            layer.replicas = Replicas(row, layer.num_experts, most=placement.most_copies, rank=axis.rank)
        if nodes is not None:
            layer.exchange = NodeLimited(slots, *nodes, dispatch=dispatch)
        elif mode == "capacity":
            layer.exchange = Capacity(slots, axis, capacity_factor=capacity_factor, drop=drop, dispatch=dispatch)
            layer.sends_padding = False
        else:
            layer.exchange = Dropless(slots, axis, dispatch=dispatch)
        if chunks > 1:
            layer.exchange = Chunked(layer.exchange, chunks)
        for part, whole in list(layer.experts.named_parameters()):
            kept = taken(whole, [cut]).clone()
            setattr(layer.experts, part, nn.Parameter(kept, requires_grad=whole.requires_grad))
            key = f"{name}.experts.{part}"
            model.cuts[key] = (*model.cuts.get(key, ()), cut)
    return [name for name, _ in layers]


def _check_nodes(axis: Axis, across: Axis, within: Axis, n_group: int) -> None:
    size, rank = across.size * within.size, across.rank * within.size + within.rank
    if (size, rank) != (axis.size, axis.rank):
        raise ValueError(
            f"expert parallelism: want the {axis.size} processes of axis {axis.name!r} node by node, got {across.size} "
            f"nodes of {within.size}, where process {axis.rank} is number {rank}"
        )
    if n_group % across.size:
        raise ValueError(
            f"expert parallelism: want whole groups of experts on each of {across.size} nodes, which bounds how many of them "
            f"a token visits, got n_group = {n_group}; mode 'dropless' needs no groups"
        )


def _rows(placement: Placement, model: CausalLM, axis: Axis, nodes: tuple[Axis, Axis] | None) -> list[tuple[int, ...]]:
    """Of each layer with experts: the expert of each slot."""
    config, numbers = model.config, []
    for i, layer in enumerate(model.model.layers):
        numbers += [i] if any(isinstance(module, MoE) for module in layer.modules()) else []
    E, L = config.n_routed_experts, sum(i < config.num_hidden_layers for i in numbers)
    if (len(placement.loads), placement.experts, placement.ranks) != (L, E, axis.size):
        raise ValueError(
            f"placement: want one of the model's {L} layers of {E} experts over the {axis.size} processes of axis "
            f"{axis.name!r}, got one of {len(placement.loads)} layers of {placement.experts} experts over {placement.ranks}; "
            "choose it anew with place_experts"
        )
    rows = [tuple(row) for row in placement.expert_of_slot.tolist()]
    if nodes is not None:
        for number, row in enumerate(rows):
            _check_groups(number, row, placement.slots // nodes[0].size, placement.experts // config.n_group)
    repeated = tuple(slot % placement.experts for slot in range(placement.slots))
    return rows + [repeated] * (len(numbers) - L)


def _check_groups(layer: int, row: tuple[int, ...], of_node: int, of_group: int) -> None:
    home: dict[int, int] = {}
    for slot, expert in enumerate(row):
        group, node = expert // of_group, slot // of_node
        if home.setdefault(group, node) != node:
            raise ValueError(
                f"placement: want each group of experts on one node with mode 'node_limited', got group {group} of layer {layer} "
                f"on nodes {home[group]} and {node}; choose it with place_experts(..., ranks_per_node=..., n_group=...), "
                "and as many redundant experts for each node"
            )
