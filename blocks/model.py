"""The causal language model. Dims: T tokens, D model width, R rows asked for, L layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.batch import Batch
from deepfuse.blocks.collectives import gather_columns, same_over
from deepfuse.blocks.config import Config
from deepfuse.blocks.cut import Cut, taken, whole_shape
from deepfuse.blocks.decoder import DecoderLayer
from deepfuse.blocks.linear import Linear
from deepfuse.blocks.mtp import MTP
from deepfuse.blocks.norm import RMSNorm
from deepfuse.blocks.rotary import Rotary
from deepfuse.blocks.two_batch import joined, parts_of, split, weights_once
from deepfuse.ops.linear import linear


class Decoder(nn.Module):
    """Embedding, layers, multi-token-prediction modules (behind the layers, as in the checkpoints) and final norm."""

    def __init__(self, config: Config, mtp_layers: int):
        super().__init__()
        L = config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers: list[nn.Module] = [DecoderLayer(config, i) for i in range(L)]
        layers += [MTP(config) for _ in range(mtp_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Rotary(config)


class CausalLM(nn.Module):
    """Tokens to logits; parameter names are those of the checkpoints."""

    tensor: Axis | None = None
    """Processes that each have some of the vocabulary."""

    def __init__(self, config: Config, *, mtp_layers: int | None = None):
        """``mtp_layers`` may be fewer than the configuration names: some checkpoints leave these modules out."""
        super().__init__()
        self.config = config
        # by name: how a parameter, before it is quantized, is this process's part of the whole one
        self.cuts: dict[str, tuple[Cut, ...]] = {}
        self.model = Decoder(config, config.num_nextn_predict_layers if mtp_layers is None else mtp_layers)
        # tied: the head reads the embedding's weight
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        q_start: Tensor,
        *,
        slots: Tensor | None = None,
        block_table: Tensor | None = None,
        seqlens: Tensor | None = None,
        caches: Sequence[Tensor] = (),
        rows: Tensor | None = None,
        first_half: int | None = None,
        second_start: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            input_ids: ``[T]`` int64, the tokens of all sequences one after the other.
            positions, q_start, slots, block_table, seqlens: see :class:`~deepfuse.blocks.batch.Batch`.
            caches: one latent cache a layer, written in place; none to keep nothing.
            rows: ``[R]`` int64, the tokens whose logits are wanted; ``None`` for all.
            first_half, second_start: see :meth:`stream`.

        Returns:
            ``[R, vocab_size]`` float32.
        """
        h, delta, _ = self.stream(
            input_ids,
            positions,
            q_start,
            slots=slots,
            block_table=block_table,
            seqlens=seqlens,
            caches=caches,
            first_half=first_half,
            second_start=second_start,
        )
        if rows is not None:
            h, delta = h[rows], delta[rows]
        return self.logits(self.model.norm.add(delta, h)[0])

    def stream(
        self,
        input_ids: Tensor,
        positions: Tensor,
        q_start: Tensor,
        *,
        slots: Tensor | None = None,
        block_table: Tensor | None = None,
        seqlens: Tensor | None = None,
        caches: Sequence[Tensor] = (),
        first_half: int | None = None,
        second_start: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, list[Batch]]:
        """The residual stream before the final norm as a pair to be added, ``[T, D]`` each, and the batch, or its halves.

        ``first_half``, ``second_start``: of two halves that go through the layers by turns, as
        :func:`~deepfuse.blocks.two_batch.parts_of` has them; ``None``: all together.
        """
        cos, sin = self.model.rotary_emb(positions)
        batch = Batch(positions, q_start, cos, sin, slots, block_table, seqlens)
        h = self.model.embed_tokens(input_ids)
        parts = parts_of(batch, first_half, second_start)
        streams: list[tuple[Any, Tensor]] = [(None, part) for part in split(h, parts)]
        with weights_once(parts):
            for i in range(self.config.num_hidden_layers):
                layer, cache = self.model.layers[i], caches[i] if caches else None
                streams = [layer(*stream, part, cache) for stream, part in zip(streams, parts, strict=True)]
        return joined([h for _, h in streams]), joined([delta for delta, _ in streams]), parts

    def logits(self, x: Tensor) -> Tensor:
        """``[R, D]``, normed -> ``[R, vocab_size]`` float32."""
        head, x = self.lm_head, same_over(x, self.tensor)
        logits = linear(x, self.model.embed_tokens.weight, None) if head is None else head(x)
        return gather_columns(logits, self.tensor).float()

    @torch.no_grad()
    def initialize(self, seed: int = 0) -> None:
        """Draw weights: normal with ``initializer_range``, as section 4.2 of the V3 report; norms one, biases zero.

        A process that has parts of the weights gets those of the whole model's, of which it has one at a time.
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                cuts = self.cuts.get(name, ())
                noise = torch.empty(whole_shape(parameter.shape, cuts), dtype=torch.float32, device="cpu")
                noise.normal_(std=self.config.initializer_range, generator=generator)
                parameter.copy_(taken(noise, cuts))
