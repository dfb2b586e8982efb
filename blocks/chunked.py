"""An exchange in chunks of tokens, each by itself: while one chunk travels, the experts compute another.

    out[chunk] = exchange(x[chunk], ...)        each with a dispatch, experts and a combine of its own

Chunks do not read each other, so that ``overlap_all_to_all`` may put their collectives in turn and the experts of one under
the messages of the other. What an expert's matmuls lose by having fewer rows, and its weights' second read, is the price.
Numerics: a token's own are the same; the experts' weight gradients are summed chunk by chunk.
Dims: T tokens, D model width, E experts, K experts per token.
Source: pipelined experts, Tutel (arXiv:2206.03382), section 3.3.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Chunked(nn.Module):
    """As the exchange that it is made of."""

    def __init__(self, exchange: nn.Module, chunks: int):
        """``chunks``: of tokens, as many in each as come out even."""
        super().__init__()
        if chunks < 2:
            raise ValueError(f"chunked exchange: want chunks >= 2, got {chunks}")
        self.exchange, self.chunks = exchange, chunks
        self.num_experts: int = exchange.num_experts  # type: ignore[assignment]

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, ffn: nn.Module) -> tuple[Tensor, Tensor]:
        """As :class:`~deepfuse.blocks.exchange.Local`'s: ``[T, D]`` and ``[E]``."""
        T = x.shape[0]
        each = T // self.chunks
        sizes = [each] * (self.chunks - 1)
        sizes.append(T - sum(sizes))
        parts = zip(x.split(sizes), weights.split(sizes), experts.split(sizes), strict=True)
        # weights that are gathered over processes, once for all chunks
        with parametrize.cached():
            done = [self.exchange(*part, ffn) for part in parts]
        return torch.cat([out for out, _ in done]), torch.stack([load for _, load in done]).sum(0)
