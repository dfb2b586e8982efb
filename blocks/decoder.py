"""One decoder layer: attention and feed-forward, each behind a norm and beside a residual stream."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from deepfuse.blocks.attention import ATTENTION
from deepfuse.blocks.batch import Batch
from deepfuse.blocks.config import Config
from deepfuse.blocks.mlp import MLP
from deepfuse.blocks.moe import MoE
from deepfuse.blocks.norm import RMSNorm

FEED_FORWARD: dict[str, Callable[[Config], nn.Module]] = {
    "dense": lambda config: MLP(config.hidden_size, config.intermediate_size),
    "sparse": MoE,
}
"""Kinds of feed-forward blocks, by ``Config.mlp_layer_types``; a new one is a new entry."""


def _kind(field: str, kinds: Mapping[str, Callable[[Config], nn.Module]], name: str) -> Callable[[Config], nn.Module]:
    if name not in kinds:
        raise ValueError(f"config: want {field} out of {list(kinds)}, got {name!r}")
    return kinds[name]


class DecoderLayer(nn.Module):
    """``h + attention(norm(h))``, then ``h + mlp(norm(h))``; parameter names are those of the checkpoints."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.self_attn = _kind("attention", ATTENTION, config.attention)(config)
        self.mlp = _kind("mlp_layer_types", FEED_FORWARD, config.feed_forward(layer))(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, delta: Tensor | None, h: Tensor, batch: Batch, cache: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The layer on the stream ``h + delta``, ``[T, D]`` each; returns the pair for the next layer.

        What a block adds travels beside the stream up to the next norm, so that addition and norm are one op.
        """
        x, h = (self.input_layernorm(h), h) if delta is None else self.input_layernorm.add(delta, h)
        x, h = self.post_attention_layernorm.add(self.self_attn(x, batch, cache), h)
        return (self.mlp(x, batch) if isinstance(self.mlp, MoE) else self.mlp(x)), h
