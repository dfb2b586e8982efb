"""Experts dealt out to the processes of an axis: a rewrite of a model, in place, by every process the same.

Names of parameters stay; each process's hold its share of the experts. Router and shared expert are whole on every one.
"""

import torch
from torch import nn

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.dropless import Dropless
from deepfuse.blocks.moe import MoE


@torch.no_grad()
def to_expert_parallel(model: nn.Module, axis: Axis) -> list[str]:
    """Keep this process's share of each layer's experts, and send tokens to where theirs are.

    Args:
        model: on any device; on the meta device nothing is copied. Before ``to_fp8`` or after it.
        axis: named ``expert``; process i of R has experts ``i * E / R`` up to ``(i + 1) * E / R``.

    Returns:
        The names of the mixtures of experts.

    Raises:
        ValueError: the processes do not divide the experts, or the model has none.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError("expert parallelism: want a model with routed experts, got none; leave out the axis 'expert'")
    for _, layer in layers:
        share = axis.share(layer.num_experts, "n_routed_experts")
        layer.exchange = Dropless(layer.num_experts, axis)
        for name, whole in list(layer.experts.named_parameters()):
            part = nn.Parameter(whole[share].clone(), requires_grad=whole.requires_grad)
            setattr(layer.experts, name, part)
    return [name for name, _ in layers]
