"""How many parameters a configuration has, counted on the meta device."""

from dataclasses import dataclass

import torch

from deepfuse.blocks.config import Config
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.moe import MoE, Router


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Numbers of parameters, expert biases included (as published counts have them)."""

    total: int
    """Of the main model, without multi-token prediction."""
    active: int
    """Of the main model, with the chosen experts only; embedding and head included."""
    mtp: int
    """Of the multi-token-prediction modules, which share embedding and head."""


def count_parameters(config: Config) -> ParameterCounts:
    """Count without allocating anything."""
    with torch.device("meta"):
        model = CausalLM(config)
    L = config.num_hidden_layers
    mtp = _count(*model.model.layers[L:])
    total = _count(model) - mtp
    idle = 0
    for layer in model.model.layers[:L]:
        if isinstance(layer.mlp, MoE):
            experts = _count(layer.mlp.experts)
            idle += experts - experts * config.num_experts_per_tok // layer.mlp.num_experts
    return ParameterCounts(total=total, active=total - idle, mtp=mtp)


def _count(*modules: torch.nn.Module) -> int:
    count = 0
    for root in modules:
        count += sum(p.numel() for p in root.parameters())
        for module in root.modules():
            if isinstance(module, Router) and module.e_score_correction_bias is not None:
                count += module.e_score_correction_bias.numel()
    return count
