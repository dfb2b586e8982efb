from dataclasses import replace

import pytest
import torch

from deepfuse.blocks.config import Config
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.parameters import count_parameters
from deepfuse.blocks.presets import PRESETS, v3_tiny
from oracle import CONFIGS, oracle_model
from tiny_checkpoint import TINY

# billions; the multi-token-prediction layer of V3 is the only one released
PUBLISHED = {
    "v3-671b": (671.026, 37.552, 11.610),
    "v2": (235.741, 21.376, 0.0),
    "v2-lite": (15.706, 2.661, 0.0),
    "kimi-k2": (1026.408, 32.861, 0.0),
    "moonlight": (15.960, 2.915, 0.0),
}
# transformers' model of this shape has 15,976,304 parameters, biases of the experts included
COUNTED = Config(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=704,
    moe_intermediate_size=128,
    num_hidden_layers=8,
    num_attention_heads=8,
    n_routed_experts=16,
    num_experts_per_tok=4,
    first_k_dense_replace=1,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    num_nextn_predict_layers=1,
)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_numbers_of_parameters(preset):
    counts = count_parameters(PRESETS[preset]())
    billions = tuple(n / 1e9 for n in (counts.total, counts.active, counts.mtp))
    # three digits; some are published without the experts' biases
    assert billions == pytest.approx(PUBLISHED[preset], abs=1e-3)


def test_the_shipped_preset_is_small():
    counts = count_parameters(v3_tiny())
    assert 3e6 < counts.active < counts.total < counts.total + counts.mtp < 8e6


def by_formula(c: Config) -> tuple[int, int, int]:
    """Total, active and of one prediction layer, from the shapes in DeepSeek-V3's report (untied)."""
    D, H, E, inner = c.hidden_size, c.num_attention_heads, c.n_routed_experts or 0, c.moe_intermediate_size
    query = D * H * c.qk_head_dim
    if c.q_lora_rank is not None:
        query = D * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * H * c.qk_head_dim
    latent = D * c.cache_width + c.kv_lora_rank + c.kv_lora_rank * H * (c.qk_nope_head_dim + c.v_head_dim)
    attention = query + latent + H * c.v_head_dim * D
    bias = E if c.has_router_bias else 0
    experts, rest = E * 3 * D * inner, (c.n_shared_experts or 0) * 3 * D * inner + E * D + bias
    sparse_layers = c.num_hidden_layers - c.first_k_dense_replace
    total = 2 * c.vocab_size * D + D + c.num_hidden_layers * (attention + 2 * D)
    total += c.first_k_dense_replace * 3 * D * c.intermediate_size + sparse_layers * (experts + rest)
    active = total - sparse_layers * (E - c.num_experts_per_tok) * 3 * D * inner
    return total, active, attention + 2 * D + experts + rest + 2 * D * D + 3 * D


@pytest.mark.parametrize("preset", PUBLISHED)
def test_counts_are_those_of_the_formula(preset):
    config = PRESETS[preset]()
    counts = count_parameters(config)
    total, active, mtp = by_formula(config)
    assert (counts.total, counts.active, counts.mtp) == (total, active, mtp * config.num_nextn_predict_layers)


def test_counts_are_those_of_transformers():
    counts = count_parameters(COUNTED)
    biases = 7 * 16  # which the published count of active parameters leaves out
    assert (counts.total, counts.active, counts.mtp) == (15_976_304, 7_718_656 + biases, 2_008_528)


@pytest.mark.parametrize("name", ["v3", "no-q-lora-one-group", "tied", "attention-bias", "odd-sizes", "v2-greedy"])
def test_names_and_shapes_are_those_of_transformers(name):
    theirs = {k: v.shape for k, v in oracle_model(name).state_dict().items()}
    if name == "tied":
        del theirs["lm_head.weight"]
    settings = {k: v for k, v in CONFIGS[name].items() if v is not None or k == "q_lora_rank"}
    if name.startswith("v2"):
        settings |= {"model_type": "deepseek_v2"}
    config = Config(**settings)
    with torch.device("meta"):
        ours = {k: v.shape for k, v in CausalLM(config).state_dict().items()}
    assert ours == theirs
    assert count_parameters(config).total == sum(shape.numel() for shape in theirs.values())


def test_names_of_the_prediction_layer_are_those_of_the_checkpoints():
    with torch.device("meta"):
        names = set(CausalLM(TINY).state_dict())
    own = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    of_a_layer = {n.removeprefix("model.layers.2.") for n in names if n.startswith("model.layers.2.")}
    assert {n.removeprefix("model.layers.3.") for n in names if n.startswith("model.layers.3.")} == of_a_layer | own


def test_fewer_prediction_layers_than_the_configuration_names():
    with torch.device("meta"):
        assert len(CausalLM(TINY, mtp_layers=0).model.layers) == 3
        assert len(CausalLM(replace(TINY, num_nextn_predict_layers=2)).model.layers) == 5
