"""A checkpoint as GGUF, for llama.cpp: its architecture ``deepseek2``, which is that of DeepSeek-V2 and V3.

``kv_b_proj [H * (N + V), R]`` lies there as two tensors: the key half ``[H, R, N]``, transposed, and the value half
``[H, V, R]``; the experts' weights are stacked. The cache is that of one head as wide as the latent and its rotary key.
Multi-token-prediction layers are left out, as llama.cpp leaves them. Matrices are in one dtype; norms, router and biases
in float32. The tokens are written, the rules that split text into them are not: models are compared by token ids.

Dims: H heads, N and V nope and value widths, R ranks of the latent.
Source: the names of tensors and keys in the package gguf, and llama.cpp's `conversion/deepseek.py`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import deepfuse as df
from deepfuse.runtime.config_json import read_config

ARCHITECTURE = "deepseek2"
GATING = {"softmax": 1, "sigmoid": 2}
"""``ExpertGatingFuncType`` of the format."""
NORMAL, CONTROL = 1, 3
"""``TokenType`` of the format."""
OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
ALWAYS_FLOAT32 = ("ffn_gate_inp",)
"""Beside vectors."""


def export(folder: Path, path: Path, dtype: torch.dtype) -> None:
    """Write the checkpoint of ``folder`` to ``path``, its matrices in ``dtype`` (float32 or bfloat16).

    Raises:
        ValueError: the configuration has something that is not written here.
    """
    import gguf  # no dependency of ours: the suite says where it is missing

    config = read_config(folder)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for key, value in {**keys(config), **vocabulary(folder, config)}.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    for name, tensor in tensors(config, stored):
        wide = dtype == torch.float32 or tensor.ndim == 1 or name.split(".")[-2] in ALWAYS_FLOAT32
        kind = gguf.GGMLQuantizationType.F32 if wide else gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def keys(config: df.Config) -> dict[str, Any]:
    """What the format says of a model beside its tensors and tokens."""
    if config.rope_scaling is not None or not config.rope_interleave or config.attention_bias:
        raise ValueError(
            "gguf_export: want no rope_scaling, no attention_bias and rope_interleave, got "
            f"{config.rope_scaling}, {config.attention_bias}, {config.rope_interleave}"
        )
    if config.n_routed_experts is None:
        raise ValueError("gguf_export: want n_routed_experts, got None")
    found = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "leading_dense_block_count": config.first_k_dense_replace,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.freq_base": float(config.rope_theta),
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts or 0,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "expert_gating_func": GATING[config.scoring_func],
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": config.norm_topk_prob,
    }
    if config.q_lora_rank is not None:
        found["attention.q_lora_rank"] = config.q_lora_rank
    return {f"{ARCHITECTURE}.{key}": value for key, value in found.items()}


def vocabulary(folder: Path, config: df.Config) -> dict[str, Any]:
    """Tokens by id, and the merges; ids that the tokenizer does not use have names of their own."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model = tokenizer["model"]
    special = {added["content"] for added in tokenizer["added_tokens"]}
    by_id = {i: token for token, i in model["vocab"].items()} | {
        t["id"]: t["content"] for t in tokenizer["added_tokens"]
    }
    tokens = [by_id.get(i, f"[UNUSED{i}]") for i in range(config.vocab_size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in special else NORMAL for token in tokens],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
    }


def tensors(config: df.Config, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the format, from those of a checkpoint (by Hugging Face's names, weights not in FP8)."""
    for name, short in OUTER_NAMES.items():
        if name != "lm_head" or not config.tie_word_embeddings:
            yield f"{short}.weight", stored[f"{name}.weight"]
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        for name, short in LAYER_NAMES.items():
            if f"{prefix}{name}.weight" in stored:
                yield f"blk.{i}.{short}.weight", stored[f"{prefix}{name}.weight"]
        kv_b = stored[f"{prefix}self_attn.kv_b_proj.weight"]
        heads = kv_b.view(config.num_attention_heads, -1, config.kv_lora_rank)
        k_HNR, v_HVR = heads.split([config.qk_nope_head_dim, config.v_head_dim], 1)
        yield f"blk.{i}.attn_k_b.weight", k_HNR.transpose(1, 2).contiguous()
        yield f"blk.{i}.attn_v_b.weight", v_HVR.contiguous()
        if i < config.first_k_dense_replace:
            continue
        bias = stored.get(f"{prefix}mlp.gate.e_score_correction_bias")
        if bias is not None:
            yield f"blk.{i}.exp_probs_b.bias", bias
        for name, short in EXPERTS.items():
            experts = [stored[f"{prefix}mlp.experts.{e}.{name}.weight"] for e in range(config.n_routed_experts or 0)]
            yield f"blk.{i}.{short}.weight", torch.stack(experts)
