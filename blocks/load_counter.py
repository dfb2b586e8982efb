"""How many tokens chose each expert of a served model: what a placement of experts is chosen from.

    tokens[e] += how often e stands in experts [T, K], without padding

A router in training counts for itself, to balance its bias. This counts in the graphs of inference too, and only where it
is asked for: a few small kernels a layer.
Dims: T tokens, E experts, K experts per token.
"""

import torch
from torch import Tensor, nn

from deepfuse.blocks.batch import Batch
from deepfuse.blocks.dropless import count
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.moe import MoE


class LoadCounter(nn.Module):
    """Of one layer and one process, since somebody last set it to zero."""

    tokens: Tensor

    def __init__(self, num_experts: int, device: torch.device):
        super().__init__()
        self.register_buffer("tokens", torch.zeros(num_experts, dtype=torch.int64, device=device), persistent=False)

    def forward(self, experts: Tensor, batch: Batch | None) -> None:
        """``experts [T, K]``; ``batch`` says which of the T are tokens, all of them where ``None``."""
        E = self.tokens.shape[0]
        if batch is not None:
            experts = torch.where(batch.tokens()[:, None], experts, E)
        # padding is counted behind the experts
        self.tokens.add_(count(experts, E + 1)[:E])


def counting(model: CausalLM, *, on: bool) -> None:
    """Let the layers with experts count, but for those of multi-token prediction; or none.

    Raises:
        ValueError: there are none.
    """
    layers = model.model.layers[: model.config.num_hidden_layers]
    found = [module for module in layers.modules() if isinstance(module, MoE)]
    if on and not found:
        raise ValueError("build: want count_loads for a model with routed experts, got one without")
    for module in found:
        module.counter = LoadCounter(module.num_experts, module.gate.weight.device) if on else None
