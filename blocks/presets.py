"""Published models as configurations; change one with ``dataclasses.replace``.

Source: the ``config.json`` of each release; Kimi-K2 (arXiv:2507.20534), table 2; Moonlight (arXiv:2502.16982), table 8.
"""

from collections.abc import Callable, Mapping

from deepfuse.blocks.config import Config, RopeScaling


def v3_tiny() -> Config:
    """The model shipped with the library: the real architecture, 4.8 million parameters."""
    return Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=384,
        moe_intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=8,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        num_nextn_predict_layers=1,
    )


def v3_671b() -> Config:
    """DeepSeek-V3 and R1."""
    return Config(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=128,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        first_k_dense_replace=3,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_scaling=RopeScaling(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0),
        max_position_embeddings=163840,
        num_nextn_predict_layers=1,
    )


def v2() -> Config:
    """DeepSeek-V2."""
    return Config(
        model_type="deepseek_v2",
        vocab_size=102400,
        hidden_size=5120,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=60,
        num_attention_heads=128,
        num_key_value_heads=128,
        n_shared_experts=2,
        n_routed_experts=160,
        num_experts_per_tok=6,
        n_group=8,
        topk_group=3,
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
        first_k_dense_replace=1,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_scaling=RopeScaling(
            factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707
        ),
        max_position_embeddings=163840,
        bos_token_id=100000,
        eos_token_id=100001,
    )


def v2_lite() -> Config:
    """DeepSeek-V2-Lite."""
    return Config(
        model_type="deepseek_v2",
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_shared_experts=2,
        n_routed_experts=64,
        num_experts_per_tok=6,
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
        first_k_dense_replace=1,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_scaling=RopeScaling(
            factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707
        ),
        max_position_embeddings=163840,
        bos_token_id=100000,
        eos_token_id=100001,
    )


def kimi_k2() -> Config:
    """Kimi-K2."""
    return Config(
        model_type="kimi_k2",
        vocab_size=163840,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=64,
        num_key_value_heads=64,
        n_routed_experts=384,
        num_experts_per_tok=8,
        routed_scaling_factor=2.827,
        first_k_dense_replace=1,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_theta=50000.0,
        rope_scaling=RopeScaling(
            factor=32.0, original_max_position_embeddings=4096, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0
        ),
        max_position_embeddings=131072,
        bos_token_id=163584,
        eos_token_id=163585,
    )


def moonlight() -> Config:
    """Moonlight-16B-A3B."""
    return Config(
        vocab_size=163840,
        hidden_size=2048,
        intermediate_size=11264,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_shared_experts=2,
        n_routed_experts=64,
        num_experts_per_tok=6,
        routed_scaling_factor=2.446,
        first_k_dense_replace=1,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_theta=50000.0,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        bos_token_id=163584,
        eos_token_id=163585,
    )


PRESETS: Mapping[str, Callable[[], Config]] = {
    "v3-tiny": v3_tiny,
    "v2-lite": v2_lite,
    "v2": v2,
    "v3-671b": v3_671b,
    "kimi-k2": kimi_k2,
    "moonlight": moonlight,
}
"""By the name ``build`` takes."""
