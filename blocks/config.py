"""The model's configuration: field names are exactly those of a checkpoint's ``config.json``.

Source: configuration of ``deepseek_v3`` and ``deepseek_v2`` in Hugging Face transformers; DeepSeek-V3
(arXiv:2412.19437), section 4.2; DeepSeek-V2 (arXiv:2405.04434), section 3.1.2 and appendix B.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from deepfuse.ops.route import SCORES

MODEL_TYPES = ("deepseek_v3", "deepseek_v2", "kimi_k2")
TOPK_METHODS = {"noaux_tc": "top2_sum", "group_limited_greedy": "max", "greedy": "max"}
"""How experts are chosen -> how a group of experts is scored (``greedy`` has one group)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """YaRN's extension of the context (Peng et al. 2023, arXiv:2309.00071)."""

    factor: float
    """New context length over the original one."""
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    """Rotations over the original context above which a channel pair is left alone."""
    beta_slow: float = 1.0
    """Rotations below which a channel pair is interpolated by ``factor``."""
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    """Attention temperature: the softmax scale is multiplied by ``(0.1 * mscale_all_dim * ln(factor) + 1) ** 2``."""
    truncate: bool = True
    """Whether the ramp's ends are rounded to whole channel pairs."""

    def __post_init__(self) -> None:
        if not self.factor >= 1 or self.original_max_position_embeddings < 1:
            raise ValueError(
                "rope_scaling: want factor >= 1 and original_max_position_embeddings >= 1, got "
                f"{self.factor} and {self.original_max_position_embeddings}"
            )
        if not (0 < self.beta_slow < math.inf and 0 < self.beta_fast < math.inf):
            raise ValueError(
                f"rope_scaling: want finite beta_fast and beta_slow > 0, got {self.beta_fast} and {self.beta_slow}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A model of the DeepSeek-V2/V3 family."""

    model_type: str = "deepseek_v3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of the dense feed-forward layers."""
    moe_intermediate_size: int
    """Width of one expert."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    """Equal to ``num_attention_heads`` in checkpoints; multi-head latent attention does not use it."""
    n_shared_experts: int | None = 1
    n_routed_experts: int | None = None
    """``None``: every layer is dense."""
    num_experts_per_tok: int = 8
    n_group: int = 1
    topk_group: int = 1
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    """The first layers that are dense instead of mixtures of experts."""
    mlp_layer_types: tuple[str, ...] | None = None
    """Kind of each layer's feed-forward block, keys of ``blocks.decoder.FEED_FORWARD``; ``None``: ``dense`` up to
    ``first_k_dense_replace``, ``sparse`` from there on."""
    kv_lora_rank: int
    q_lora_rank: int | None = None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_interleave: bool = True
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    hidden_act: str = "silu"
    num_nextn_predict_layers: int = 0
    """Multi-token-prediction modules behind the last layer."""
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = None
    attention: str = "mla"
    """Kind of attention, a key of ``blocks.attention.ATTENTION``: ``mla``, or ``mha`` (the baseline)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields of ``config.json`` that this model does not read; written back unchanged."""

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(f"config: {problem}")

    def _problems(self) -> list[str]:
        problems = []

        def want(condition: bool, text: str) -> None:
            if not condition:
                problems.append(text)

        want(self.model_type in MODEL_TYPES, f"want model_type out of {MODEL_TYPES}, got {self.model_type!r}")
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "max_position_embeddings",
        ):
            want(getattr(self, name) >= 1, f"want {name} >= 1, got {getattr(self, name)}")
        for name in ("first_k_dense_replace", "num_nextn_predict_layers", "n_shared_experts"):
            want((getattr(self, name) or 0) >= 0, f"want {name} >= 0, got {getattr(self, name)}")
        for name in ("rms_norm_eps", "initializer_range", "routed_scaling_factor"):
            value = getattr(self, name)
            want(0 <= value < math.inf, f"want a finite {name} >= 0, got {value}")
        # YaRN divides by its logarithm
        want(1 < self.rope_theta < math.inf, f"want a finite rope_theta > 1, got {self.rope_theta}")
        want(
            self.rope_scaling is None or isinstance(self.rope_scaling, RopeScaling),
            f"want rope_scaling a RopeScaling or None, got {self.rope_scaling!r}",
        )
        want(self.qk_rope_head_dim % 2 == 0, f"want an even qk_rope_head_dim, got {self.qk_rope_head_dim}")
        want(
            self.q_lora_rank is None or self.q_lora_rank >= 1, f"want q_lora_rank >= 1 or null, got {self.q_lora_rank}"
        )
        want(self.hidden_act == "silu", f"want hidden_act 'silu', got {self.hidden_act!r}")
        kv_heads = self.num_key_value_heads
        want(
            kv_heads is None or (kv_heads >= 1 and self.num_attention_heads % kv_heads == 0),
            f"want num_attention_heads a multiple of num_key_value_heads, got {self.num_attention_heads} and {kv_heads}",
        )
        kinds = self.mlp_layer_types
        want(
            kinds is None or len(kinds) == self.num_hidden_layers,
            f"want mlp_layer_types for {self.num_hidden_layers} layers, got {kinds}",
        )
        want(
            kinds is None or "sparse" not in kinds or self.n_routed_experts is not None,
            f"want n_routed_experts for the sparse layers of mlp_layer_types, got {self.n_routed_experts}",
        )
        if self.n_routed_experts is not None:
            self._check_experts(want)
        return problems

    def _check_experts(self, want: Any) -> None:
        E = self.n_routed_experts or 0
        want(self.moe_intermediate_size >= 1, f"want moe_intermediate_size >= 1, got {self.moe_intermediate_size}")
        want(self.scoring_func in SCORES, f"want scoring_func out of {list(SCORES)}, got {self.scoring_func!r}")
        want(
            self.topk_method in TOPK_METHODS,
            f"want topk_method out of {list(TOPK_METHODS)}, got {self.topk_method!r}",
        )
        groups_fit = E >= 1 and self.n_group >= 1 and E % self.n_group == 0
        want(groups_fit, f"want n_group dividing n_routed_experts, got {self.n_group} and {E}")
        want(
            1 <= self.topk_group <= self.n_group,
            f"want 1 <= topk_group <= n_group, got topk_group {self.topk_group} and n_group {self.n_group}",
        )
        kept = self.topk_group * (E // max(self.n_group, 1))
        want(
            1 <= self.num_experts_per_tok <= kept,
            f"want 1 <= num_experts_per_tok <= {kept}, the experts of the {self.topk_group} kept groups, got "
            f"{self.num_experts_per_tok}",
        )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers cached per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def group_score(self) -> str:
        return TOPK_METHODS[self.topk_method]

    @property
    def has_router_bias(self) -> bool:
        return self.topk_method == "noaux_tc"

    @property
    def softmax_scale(self) -> float:
        """Of attention scores, with YaRN's temperature."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is not None:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    def feed_forward(self, layer: int) -> str:
        """Kind of a layer's feed-forward block; that of multi-token prediction is asked for as ``num_hidden_layers``."""
        if self.mlp_layer_types is not None and layer < self.num_hidden_layers:
            return self.mlp_layer_types[layer]
        return "sparse" if self.n_routed_experts is not None and layer >= self.first_k_dense_replace else "dense"


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: ``0.1 * mscale * ln(factor) + 1`` (arXiv:2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
