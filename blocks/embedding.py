"""The embedding where each process has some of the vocabulary.

    y = sum over processes of (weight[id - first] where first <= id < first + V, else 0)

Dims: T tokens, V entries of one process, D model width.
Source: Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
"""

from torch import Tensor, nn

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.collectives import sum_over


class VocabularyParallelEmbedding(nn.Module):
    """``[...] -> [..., D]``; ``weight [V, D]``."""

    def __init__(self, weight: nn.Parameter, axis: Axis):
        """``weight``: the entries of this process of ``axis``, which are dealt out in order."""
        super().__init__()
        self.weight, self.tensor = weight, axis

    def forward(self, input_ids: Tensor) -> Tensor:
        V = self.weight.shape[0]
        mine = input_ids - self.tensor.rank * V
        others = (mine < 0) | (mine >= V)
        rows = nn.functional.embedding(mine.masked_fill(others, 0), self.weight)
        return sum_over(rows.masked_fill(others.unsqueeze(-1), 0), self.tensor)
