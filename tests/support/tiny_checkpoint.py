"""A model of the family small enough to be saved and loaded hundreds of times, and what tests do with its checkpoints."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepfuse.blocks.config import Config, RopeScaling
from deepfuse.blocks.model import CausalLM
from deepfuse.runtime.checkpoint import load_weights, present_mtp_layers
from deepfuse.runtime.config_json import read_config
from deepfuse.runtime.shards import SINGLE

TINY = Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
    q_lora_rank=20,
    kv_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    max_position_embeddings=128,
    num_nextn_predict_layers=1,
)
TINY_V2 = replace(
    TINY,
    model_type="deepseek_v2",
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    n_shared_experts=2,
    num_nextn_predict_layers=0,
)
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=0.7)
CONFIGS = {
    "v3": TINY,
    "v3-tied-yarn": replace(TINY, tie_word_embeddings=True, q_lora_rank=None, rope_scaling=YARN),
    "v3-bias-no-shared": replace(TINY, attention_bias=True, n_shared_experts=0, rope_interleave=False),
    "v2": TINY_V2,
    "v2-greedy": replace(TINY_V2, topk_method="greedy", n_group=1, topk_group=1, q_lora_rank=None),
    "kimi": replace(TINY, model_type="kimi_k2", n_group=1, topk_group=1),
}


def model_of(config: Config, dtype: torch.dtype = torch.float32) -> CausalLM:
    """A model with random weights, the expert biases and norms too."""
    model = CausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.normal_(std=0.1)
            if name.endswith("norm.weight"):
                tensor.add_(1)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def load(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any) -> CausalLM:
    config = read_config(folder)
    with torch.device("meta"):
        model = CausalLM(config, mtp_layers=present_mtp_layers(folder, config))
    load_weights(model, folder, device=device, dtype=dtype, **options)
    return model.eval()


def logits(model: CausalLM) -> Tensor:
    ids = torch.arange(42) * 7 % model.config.vocab_size
    with torch.no_grad():
        return model(ids, torch.arange(21).repeat(2), torch.tensor([0, 21, 42], dtype=torch.int32)).view(2, 21, -1)


def assert_same_state(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite the weights of a checkpoint."""
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / SINGLE, {"format": "pt"})
