import math
from dataclasses import FrozenInstanceError, replace

import pytest

from deepfuse.blocks.config import Config, RopeScaling, yarn_mscale
from deepfuse.blocks.presets import v2, v2_lite, v3_671b, v3_tiny
from tiny_checkpoint import TINY

CONTRADICTIONS = {
    "model_type": ({"model_type": "llama"}, r"want model_type out of \(.*'kimi_k2'\), got 'llama'"),
    "vocab_size": ({"vocab_size": 0}, "want vocab_size >= 1, got 0"),
    "hidden_size": ({"hidden_size": -3}, "want hidden_size >= 1, got -3"),
    "num_hidden_layers": ({"num_hidden_layers": 0}, "want num_hidden_layers >= 1, got 0"),
    "num_attention_heads": ({"num_attention_heads": 0}, "want num_attention_heads >= 1, got 0"),
    "kv_lora_rank": ({"kv_lora_rank": 0}, "want kv_lora_rank >= 1, got 0"),
    "qk_nope_head_dim": ({"qk_nope_head_dim": 0}, "want qk_nope_head_dim >= 1, got 0"),
    "v_head_dim": ({"v_head_dim": 0}, "want v_head_dim >= 1, got 0"),
    "max_position_embeddings": ({"max_position_embeddings": 0}, "want max_position_embeddings >= 1, got 0"),
    "intermediate_size": ({"intermediate_size": -4}, "want intermediate_size >= 1, got -4"),
    "moe_intermediate_size": ({"moe_intermediate_size": 0}, "want moe_intermediate_size >= 1, got 0"),
    "n_shared_experts": ({"n_shared_experts": -1}, "want n_shared_experts >= 0, got -1"),
    "first_k_dense_replace": ({"first_k_dense_replace": -1}, "want first_k_dense_replace >= 0, got -1"),
    "num_nextn_predict_layers": ({"num_nextn_predict_layers": -1}, "want num_nextn_predict_layers >= 0, got -1"),
    "rms_norm_eps": ({"rms_norm_eps": -1.0}, r"want a finite rms_norm_eps >= 0, got -1\.0"),
    "routed_scaling_factor": ({"routed_scaling_factor": math.nan}, "want a finite routed_scaling_factor >= 0, got nan"),
    "rope_theta": ({"rope_theta": 0.0}, r"want a finite rope_theta > 1, got 0\.0"),
    "rope_theta nan": ({"rope_theta": math.nan}, "want a finite rope_theta > 1, got nan"),
    "scaling of json": ({"rope_scaling": {"type": "yarn"}}, "want rope_scaling a RopeScaling or None, got {'type"),
    "odd rope": ({"qk_rope_head_dim": 7}, "want an even qk_rope_head_dim, got 7"),
    "q_lora_rank": ({"q_lora_rank": 0}, "want q_lora_rank >= 1 or null, got 0"),
    "hidden_act": ({"hidden_act": "gelu"}, "want hidden_act 'silu', got 'gelu'"),
    "heads do not divide": (
        {"num_key_value_heads": 3},
        "want num_attention_heads a multiple of num_key_value_heads, got 4 and 3",
    ),
    "scoring_func": ({"scoring_func": "tanh"}, r"want scoring_func out of \['sigmoid', 'softmax'\], got 'tanh'"),
    "topk_method": ({"topk_method": "best"}, r"want topk_method out of \['noaux_tc', .*\], got 'best'"),
    "groups do not divide": ({"n_group": 3}, "want n_group dividing n_routed_experts, got 3 and 8"),
    "topk_group beyond n_group": (
        {"topk_group": 5},
        "want 1 <= topk_group <= n_group, got topk_group 5 and n_group 4",
    ),
    "no group kept": ({"topk_group": 0}, "want 1 <= topk_group <= n_group, got topk_group 0 and n_group 4"),
    "more experts than are kept": (
        {"num_experts_per_tok": 5},
        "want 1 <= num_experts_per_tok <= 4, the experts of the 2 kept groups, got 5",
    ),
    "no expert": ({"num_experts_per_tok": 0}, "want 1 <= num_experts_per_tok <= 4, .*, got 0"),
    "layer types": (
        {"mlp_layer_types": ("dense",)},
        r"want mlp_layer_types for 3 layers, got \('dense',\)",
    ),
    "sparse layers without experts": (
        {"mlp_layer_types": ("dense", "sparse", "dense"), "n_routed_experts": None},
        "want n_routed_experts for the sparse layers of mlp_layer_types, got None",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused(name):
    changes, message = CONTRADICTIONS[name]
    with pytest.raises(ValueError, match=f"^config: {message}"):
        replace(TINY, **changes)


@pytest.mark.parametrize("values", [{"factor": 0.5}, {"factor": math.nan}, {"original_max_position_embeddings": 0}])
def test_impossible_scaling_is_refused(values):
    with pytest.raises(ValueError, match="rope_scaling: want factor >= 1 and original_max_position_embeddings >= 1"):
        RopeScaling(**{"factor": 2.0, "original_max_position_embeddings": 64, **values})


@pytest.mark.parametrize("values", [{"beta_fast": -3.0}, {"beta_slow": 0.0}, {"beta_fast": math.nan}])
def test_impossible_ramps_are_refused(values):
    with pytest.raises(ValueError, match="rope_scaling: want finite beta_fast and beta_slow > 0, got "):
        RopeScaling(factor=2.0, original_max_position_embeddings=64, **values)


def test_routing_is_not_checked_where_nothing_is_routed():
    config = replace(TINY, n_routed_experts=None, n_group=3, topk_group=7, scoring_func="none")
    assert [config.feed_forward(i) for i in range(4)] == ["dense"] * 4


@pytest.mark.parametrize(
    "values",
    [
        {"topk_group": 4, "num_experts_per_tok": 8},
        {"num_key_value_heads": None},
        {"num_key_value_heads": 1},
        {"qk_rope_head_dim": 2},
    ],
    ids=str,
)
def test_the_last_possible_values_are_taken(values):
    config = replace(TINY, **values)
    assert {name: getattr(config, name) for name in values} == values


def test_a_config_does_not_change():
    with pytest.raises(FrozenInstanceError):
        TINY.vocab_size = 1  # type: ignore[misc]


def test_derived_values():
    assert (TINY.qk_head_dim, TINY.cache_width) == (20, 32)
    assert [TINY.feed_forward(i) for i in range(4)] == ["dense", "sparse", "sparse", "sparse"]
    mixed = replace(TINY, mlp_layer_types=("sparse", "dense", "dense"))
    assert [mixed.feed_forward(i) for i in range(4)] == ["sparse", "dense", "dense", "sparse"]
    assert TINY.eos_token_ids == (1,)
    assert replace(TINY, eos_token_id=None).eos_token_ids == ()
    assert replace(TINY, eos_token_id=(3, 5)).eos_token_ids == (3, 5)
    assert v3_671b().group_score == "top2_sum" and v3_671b().has_router_bias
    assert v2().group_score == "max" and not v2().has_router_bias and not v2_lite().has_router_bias


def test_softmax_scale_holds_the_temperature_of_the_published_models():
    assert yarn_mscale(40, 1.0) == pytest.approx(1.3688879454113936, rel=1e-15)
    assert yarn_mscale(40, 0.707) == pytest.approx(1.2608037774058554, rel=1e-15)
    assert v3_671b().softmax_scale == pytest.approx(0.1352337788608801, rel=1e-14)
    assert v3_tiny().softmax_scale == pytest.approx(48**-0.5, rel=1e-15)
    # 0.229187 was printed by transformers
    scaling = RopeScaling(factor=4.0, original_max_position_embeddings=1024, mscale_all_dim=1.0)
    config = replace(TINY, qk_nope_head_dim=16, qk_rope_head_dim=16, rope_scaling=scaling)
    assert config.softmax_scale == pytest.approx(0.229187, abs=5e-7)
    assert replace(config, rope_scaling=replace(scaling, mscale_all_dim=0.0)).softmax_scale == 32**-0.5


def test_no_temperature_without_extension():
    assert yarn_mscale(1.0, 5.0) == yarn_mscale(0.5, 5.0) == 1.0


def test_config_is_what_build_takes_as_text():
    """``repr`` is part of the compile cache's key: it must tell any two configurations apart."""
    assert repr(TINY) == repr(replace(TINY))
    assert eval(repr(v3_671b()), {"Config": Config, "RopeScaling": RopeScaling}) == v3_671b()
