"""How tokens reach the experts that they chose, and how the results come back: here, where each process has all experts.

An exchange is a module without parameters that a mixture of experts calls with its experts. Those for experts on
several processes lie beside this one: ``dropless.py``, ``capacity.py``, ``node_limited.py``.
Dims: T tokens, D model width, E experts, K experts per token, M = T * K rows.
"""

from torch import Tensor, nn

from deepfuse.ops.expert_permute import expert_permute
from deepfuse.ops.expert_unpermute import expert_unpermute


class Local(nn.Module):
    """Every process computes all experts of its own tokens."""

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, ffn: nn.Module) -> tuple[Tensor, Tensor]:
        """Send tokens through experts.

        Args:
            x: ``[T, D]``.
            weights: ``[T, K]`` float32, of the router.
            experts: ``[T, K]`` int64, out of all E.
            ffn: the experts of this process, :class:`~deepfuse.blocks.moe.Experts` or a kind of it in FP8.

        Returns:
            ``[T, D]``, each token's weighted sum; ``[E]``, how many of this process's tokens chose each expert.
        """
        rows, order, inverse, offsets = expert_permute(x, experts, self.num_experts)
        load = offsets.diff(prepend=offsets.new_zeros(1))
        return expert_unpermute(ffn(rows, offsets), order, inverse, weights), load
