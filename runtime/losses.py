"""What a step of training makes smaller: of the next token, or of the one after it.

Dims: B sequences, L tokens a sequence.
Source: DeepSeek-V3 (arXiv:2412.19437), section 2.2.
"""

from typing import Any

import torch
from torch import Tensor, nn

from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.two_batch import joined, split, weights_once


def next_token_loss(
    model: CausalLM, tokens: Tensor, positions: Tensor, q_start: Tensor, in_halves: bool = False
) -> Tensor:
    """``tokens [B, L + 2]``: cross-entropy in nats of each token after the first ``L``.

    ``in_halves``: whether the sequences go through the layers in two halves, where there are two (``blocks/two_batch.py``).
    """
    L = tokens.shape[1] - 2
    logits = model(tokens[:, :L].flatten(), positions, q_start, first_half=_first_half(tokens, in_halves))
    return nn.functional.cross_entropy(logits, tokens[:, 1 : L + 1].flatten())


def mtp_loss(model: CausalLM, tokens: Tensor, positions: Tensor, q_start: Tensor, in_halves: bool = False) -> Tensor:
    """Cross-entropy of the token after the next, from the state and the next token (eq. 21-24, depth 1)."""
    L, first_half = tokens.shape[1] - 2, _first_half(tokens, in_halves)
    with torch.no_grad():
        h, delta, parts = model.stream(tokens[:, :L].flatten(), positions, q_start, first_half=first_half)
        embedding = model.model.embed_tokens(tokens[:, 1 : L + 1].flatten())
    mtp: Any = model.model.layers[model.config.num_hidden_layers]
    streams = zip(split(h + delta, parts), split(embedding, parts), parts, strict=True)
    with weights_once(parts):
        h = joined([mtp.predict(*stream) for stream in streams])
    return nn.functional.cross_entropy(model.logits(mtp.shared_head.norm(h)), tokens[:, 2:].flatten())


def _first_half(tokens: Tensor, in_halves: bool) -> int | None:
    """Tokens of the first half of the sequences, of which each has all but two of its row."""
    B, L = tokens.shape[0], tokens.shape[1] - 2
    return (B + 1) // 2 * L if in_halves and B > 1 else None
