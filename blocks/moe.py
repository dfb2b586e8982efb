"""Mixture of experts: every token goes through the shared experts and through its best routed experts.

The steps stand in the graph one by one (route, permute, expert matmuls, unpermute), so that passes can see and move
them; those between router and shared expert are an exchange's (``exchange.py``). Experts are fused in memory,
``[E, 2I, D]`` and ``[E, D, I]``; on disk each has its own tensors.
Dims: T tokens, D model width, E experts, K experts per token, I expert width, M = T * K rows.
Source: DeepSeek-V3 (arXiv:2412.19437), eq. 12-20.
"""

import torch
from torch import Tensor, nn

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.balance import SequenceBalance
from deepfuse.blocks.batch import Batch
from deepfuse.blocks.collectives import same_over, sum_over
from deepfuse.blocks.config import Config
from deepfuse.blocks.exchange import Local
from deepfuse.blocks.mlp import MLP
from deepfuse.blocks.replicas import Replicas
from deepfuse.ops.grouped_matmul import grouped_matmul
from deepfuse.ops.linear import linear
from deepfuse.ops.route import route
from deepfuse.ops.swiglu import swiglu


class Router(nn.Module):
    """``[T, D] -> (weights [T, K] float32, experts [T, K])``; runs in float32 whatever the model's dtype."""

    e_score_correction_bias: Tensor | None
    tokens_per_expert: Tensor

    def __init__(self, config: Config):
        super().__init__()
        assert config.n_routed_experts is not None
        self.config = config
        self.balance: SequenceBalance | None = None
        """Of a router in training: the sequence-wise balance loss, which then is in its gradients."""
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if config.has_router_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        # load of each expert since the trainer last looked; balances the bias (section 2.1.2 of the V3 report)
        load = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("tokens_per_expert", load, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        logits = linear(x.float(), self.weight.float(), None)
        if self.balance is not None and self.training:
            logits = self.balance.joined(logits, c.num_experts_per_tok, c.scoring_func)
        return route(
            logits,
            self.e_score_correction_bias,
            c.scoring_func,
            c.group_score,
            c.n_group,
            c.topk_group,
            c.num_experts_per_tok,
            c.norm_topk_prob,
            c.routed_scaling_factor,
            0,  # the shared experts are computed apart
        )


class Experts(nn.Module):
    """The routed experts' weights, and their matmuls over rows sorted by expert."""

    reads_fp8 = False
    """Whether they read the FP8 numbers of rows that come with these, and lose nothing where only these come."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, rows: Tensor, offsets: Tensor, quantized: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """``rows [M, D]``, ``offsets [E]`` int32 -> ``[M, D]``.

        ``quantized``: values and scales of the rows, in blocks of 1x128, where they have been FP8 already.
        """
        gate, up = grouped_matmul(rows, self.gate_up_proj, offsets).chunk(2, dim=-1)
        return grouped_matmul(swiglu(gate, up), self.down_proj, offsets)


class MoE(nn.Module):
    """Mixture of shared and routed experts; parameter names are those of the checkpoints."""

    one_more_expert = (
        ("experts.gate_up_proj", "shared_experts.gate_proj.weight", "shared_experts.up_proj.weight"),
        ("experts.down_proj", "shared_experts.down_proj.weight"),
    )
    """Weights that may lie one behind the other, so that a shared expert of an expert's width is expert E."""
    tensor: Axis | None = None
    """Processes that each have some of every expert's inner width, of the shared ones too."""
    sends_padding = True
    """Whether padding goes to experts as tokens do; where these take but so many rows, it would take the tokens' room."""

    def __init__(self, config: Config):
        super().__init__()
        assert config.n_routed_experts is not None
        self.num_experts = config.n_routed_experts
        self.gate = Router(config)
        self.exchange: nn.Module = Local(self.num_experts)
        """How tokens reach their experts; another where these lie on several processes."""
        self.counter: nn.Module | None = None
        """Counts the tokens of each expert, where a served model is asked to."""
        self.replicas: Replicas | None = None
        """Where experts are placed: the slots among which the exchange carries tokens instead."""
        self.experts = Experts(self.num_experts, config.hidden_size, config.moe_intermediate_size)
        shared = (config.n_shared_experts or 0) * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, shared) if shared else None

    def forward(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        """``[T, D] -> [T, D]``; ``batch`` says which of the T are tokens, all of them where ``None``."""
        weights, experts = self.gate(x)
        if self.counter is not None:
            self.counter(experts, batch)
        nowhere = self.num_experts
        if self.replicas is not None:
            experts, nowhere = self.replicas(experts), self.replicas.num_slots
        if batch is not None and not self.sends_padding:
            experts = torch.where(batch.tokens()[:, None], experts, nowhere)
        x, weights = same_over(x, self.tensor), same_over(weights, self.tensor)
        out, load = self.exchange(x, weights, experts, self.experts)
        if self.training:
            self.gate.tokens_per_expert.add_(load)
        # one sum over processes for all experts, the shared ones as well
        return sum_over(out if self.shared_experts is None else out + self.shared_experts(x), self.tensor)
