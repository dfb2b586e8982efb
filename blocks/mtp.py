"""Multi-token prediction: a module that, from a token's state and the next token, predicts the one after.

    h' = eh_proj [enorm(Emb(t_{i+1})) ; hnorm(h_i)];   h_next = layer(h');   logits = head(shared_head.norm(h_next))

The released weights concatenate the embedding first, though eq. 21 prints it last. Embedding and head are those of the
main model. ``h_i`` is the stream before the final norm (as in DeepSeek's own later code).
Dims: T tokens, D model width.
Source: DeepSeek-V3 (arXiv:2412.19437), eq. 21-25; names from README_WEIGHTS of the checkpoint.
"""

import torch
from torch import Tensor, nn

from deepfuse.blocks.batch import Batch
from deepfuse.blocks.config import Config
from deepfuse.blocks.decoder import DecoderLayer
from deepfuse.blocks.linear import Linear
from deepfuse.blocks.norm import RMSNorm


class SharedHead(nn.Module):
    """The norm before the (shared) head; a module of its own for the sake of the checkpoint's names."""

    def __init__(self, config: Config):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTP(DecoderLayer):
    """One prediction depth: a decoder layer (always a mixture of experts, where the model has any) and its entry."""

    def __init__(self, config: Config):
        super().__init__(config, config.num_hidden_layers)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config)

    def predict(self, h: Tensor, next_embedding: Tensor, batch: Batch, cache: Tensor | None = None) -> Tensor:
        """``h [T, D]``, the embeddings ``[T, D]`` of the tokens that follow -> the stream ``[T, D]`` of this depth."""
        x = self.eh_proj(torch.cat((self.enorm(next_embedding), self.hnorm(h)), -1))
        delta, h = self.forward(None, x, batch, cache)
        return delta + h
