"""Dense feed-forward block: ``down(silu(gate(x)) * up(x))``. Dims: T tokens, D model width, I inner width."""

from torch import Tensor, nn

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.collectives import same_over
from deepfuse.blocks.linear import Linear
from deepfuse.ops.swiglu import swiglu


class MLP(nn.Module):
    """``[T, D] -> [T, D]`` (Shazeer 2020, arXiv:2002.05202)."""

    side_by_side = (("gate_proj.weight", "up_proj.weight"),)
    """Weights of one input, which may lie one behind the other."""
    tensor: Axis | None = None
    """Processes that each have some of the inner width."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = same_over(x, self.tensor)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
