"""config.json, read and written, with transformers' own classes as the oracle."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DeepseekV2Config, DeepseekV3Config

from deepfuse.blocks.config import Config, RopeScaling
from deepfuse.blocks.presets import PRESETS
from deepfuse.runtime.checkpoint_files import CheckpointError
from deepfuse.runtime.config_json import config_object, named_dtype, parse_config, read_config, write_config

V3 = {"model_type": "deepseek_v3"}
V2 = {"model_type": "deepseek_v2", "num_experts_per_tok": 6}
YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
YARN_OF_KIMI = YARN | {"factor": 32.0, "beta_fast": 1.0}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
SHARED = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_shared_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "first_k_dense_replace",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "attention_bias",
    "hidden_act",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
]


@pytest.mark.parametrize(("raw", "oracle"), [(V3, DeepseekV3Config), (V2, DeepseekV2Config)])
def test_absent_fields_are_those_of_transformers(raw: dict[str, Any], oracle: type) -> None:
    ours, theirs = parse_config(raw), oracle(**{k: v for k, v in raw.items() if k != "model_type"})
    assert {n: getattr(ours, n) for n in SHARED} == {n: getattr(theirs, n) for n in SHARED}
    assert ours.norm_topk_prob == theirs.norm_topk_prob
    assert (ours.n_group, ours.topk_group) == (theirs.n_group or 1, theirs.topk_group or 1)
    assert ours.num_nextn_predict_layers == getattr(theirs, "num_nextn_predict_layers", 0)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_scaling is None


def test_null_means_none_where_none_means_something() -> None:
    raw = V3 | dict.fromkeys(("q_lora_rank", "num_key_value_heads", "rope_scaling", "n_group", "hidden_act"))
    config = parse_config(raw | {"eos_token_id": None})
    assert config.q_lora_rank is None and config.num_key_value_heads is None and config.eos_token_ids == ()
    assert (config.n_group, config.topk_group) == (1, 1)
    assert config.hidden_act == "silu"
    assert parse_config(V3 | {"topk_group": None}).topk_group == 8


def test_routing_of_each_type() -> None:
    v3, v2 = parse_config(V3), parse_config(V2)
    assert (v3.scoring_func, v3.group_score, v3.has_router_bias, v3.norm_topk_prob) == (
        "sigmoid",
        "top2_sum",
        True,
        True,
    )
    assert (v2.scoring_func, v2.group_score, v2.has_router_bias, v2.norm_topk_prob) == ("softmax", "max", False, False)
    grouped = V2 | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}
    assert (parse_config(grouped).n_group, parse_config(grouped).topk_group) == (8, 3)
    # greedy has no groups, whatever the fields say
    assert parse_config(grouped | {"topk_method": "greedy"}).n_group == 1


def test_released_files_are_the_presets() -> None:
    v3 = V3 | {"max_position_embeddings": 163840, "rope_theta": 10000, "rope_scaling": YARN, "torch_dtype": "bfloat16"}
    v3 |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1}
    config = parse_config(v3 | {"quantization_config": FP8})
    assert replace(config, extra={}) == PRESETS["v3-671b"]()
    assert config.extra == {"torch_dtype": "bfloat16", "moe_layer_freq": 1, "ep_size": 1, "quantization_config": FP8}
    assert named_dtype(config) == torch.bfloat16
    kimi = config_object(PRESETS["kimi-k2"](), torch.bfloat16) | {"model_type": "kimi_k2", "rope_scaling": YARN_OF_KIMI}
    assert replace(parse_config(kimi), extra={}) == PRESETS["kimi-k2"]()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_what_we_write_we_read(name: str, tmp_path: Path) -> None:
    config = replace(PRESETS[name](), extra={"aux_loss_alpha": 1e-4, "note": {"a": [1]}}, eos_token_id=(1, 2))
    write_config(config, tmp_path, torch.bfloat16)
    back = read_config(tmp_path)
    assert named_dtype(back) == torch.bfloat16
    extra = {k: v for k, v in back.extra.items() if k not in ("architectures", "torch_dtype")}
    # Kimi-K2 is written as the deepseek_v3 model it is, for transformers' sake
    assert replace(back, extra=extra, model_type=config.model_type) == config


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_what_we_write_transformers_reads(name: str, tmp_path: Path) -> None:
    config = PRESETS[name]()
    write_config(config, tmp_path, torch.float16)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert {n: getattr(theirs, n) for n in SHARED} == {n: getattr(config, n) for n in SHARED}
    assert (theirs.n_group, theirs.topk_group) == (config.n_group, config.topk_group)
    assert theirs.num_nextn_predict_layers == config.num_nextn_predict_layers
    assert theirs.dtype == torch.float16
    rope = theirs.rope_parameters
    assert rope["rope_theta"] == config.rope_theta
    if config.rope_scaling is None:
        assert rope["rope_type"] == "default"
    else:
        assert rope["rope_type"] == "yarn"
        names = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        assert all(rope[n] == getattr(config.rope_scaling, n) for n in names)


@pytest.mark.parametrize(
    "rope",
    [
        YARN,
        {k: v for k, v in YARN.items() if not k.startswith("mscale")},
        YARN | {"mscale": 0.707, "mscale_all_dim": 0},
        {k: v for k, v in YARN.items() if k != "mscale"},
        YARN | {"attention_factor": 1.5, "beta_fast": None},
        YARN | {"mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False},
        {"type": "yarn", "factor": None, "original_max_position_embeddings": 4096},
    ],
)
def test_yarn_in_all_its_forms_is_that_of_transformers(rope: dict[str, Any], tmp_path: Path) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    from deepfuse.blocks.rotary import Rotary

    raw = V3 | {"max_position_embeddings": 163840, "rope_theta": 50000, "rope_scaling": rope}
    config = parse_config(raw)
    new = {k: v for k, v in rope.items() if k != "type"} | {"rope_type": "yarn", "rope_theta": 50000}
    assert parse_config(V3 | {"max_position_embeddings": 163840, "rope_parameters": new}) == config
    write_config(config, tmp_path, torch.float32)
    theirs_of = {k: v for k, v in raw.items() if k != "model_type"} | {"rope_theta": 50000.0}
    for theirs in (DeepseekV3Config(**theirs_of), AutoConfig.from_pretrained(tmp_path)):
        oracle = DeepseekV3RotaryEmbedding(theirs)
        ours = Rotary(config)
        assert ours.mscale == pytest.approx(oracle.attention_scaling, rel=1e-12)
        torch.testing.assert_close(ours.inv_freq, oracle.inv_freq, rtol=1e-6, atol=0)


def test_yarn_that_transformers_computes_otherwise_is_written_so_that_it_does_not(tmp_path: Path) -> None:
    scaling = RopeScaling(factor=4.0, original_max_position_embeddings=1024, mscale=0.5, mscale_all_dim=0.0)
    config = replace(PRESETS["v3-671b"](), rope_scaling=scaling)
    write_config(config, tmp_path, torch.float32)
    back = read_config(tmp_path).rope_scaling
    assert back is not None and back.mscale == pytest.approx(0.5)


def test_other_names_of_fields() -> None:
    config = parse_config(V3 | {"num_mtp_layers": 2, "num_local_experts": 64})
    assert (config.num_nextn_predict_layers, config.n_routed_experts) == (2, 64)
    assert not {"num_mtp_layers", "num_local_experts"} & config.extra.keys()
    with pytest.raises(ValueError, match="want num_mtp_layers equal to num_nextn_predict_layers.* got 2 and 1"):
        parse_config(V3 | {"num_mtp_layers": 2, "num_nextn_predict_layers": 1})


def test_a_dense_model_is_written_as_transformers_can_say_it(tmp_path: Path) -> None:
    config = replace(PRESETS["v3-tiny"](), n_routed_experts=None, n_shared_experts=None, num_nextn_predict_layers=0)
    write_config(config, tmp_path, torch.float32)
    theirs, back = AutoConfig.from_pretrained(tmp_path), read_config(tmp_path)
    assert theirs.first_k_dense_replace == theirs.num_hidden_layers
    assert all(back.feed_forward(i) == "dense" for i in range(back.num_hidden_layers))


def test_models_of_our_own_come_back(tmp_path: Path) -> None:
    config = replace(PRESETS["v3-tiny"](), attention="mha", mlp_layer_types=("dense", "sparse") * 2 + ("dense",))
    write_config(config, tmp_path, torch.float32)
    assert replace(read_config(tmp_path), extra={}) == config


def test_what_was_true_of_the_source_only_is_not_written() -> None:
    raw = V3 | {"quantization_config": FP8, "auto_map": {"AutoConfig": "x.py"}, "dtype": "float16", "use_cache": True}
    out = config_object(parse_config(raw), torch.float32)
    assert not {"quantization_config", "auto_map", "dtype"} & out.keys()
    assert out["use_cache"] is True and out["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "llama"}, r"want model_type out of \['deepseek_v3', 'deepseek_v2', 'kimi_k2'\], got 'llama'"),
        ({"model_type": None}, "want model_type out of .*, got None"),
        ({"scoring_func": "tanh"}, r"want scoring_func out of \['sigmoid', 'softmax'\], got 'tanh'"),
        ({"scoring_func": "softmax"}, "want scoring_func 'sigmoid', the only one of deepseek_v3, got 'softmax'"),
        ({"topk_method": "greedy"}, "want topk_method 'noaux_tc', the only one of deepseek_v3, got 'greedy'"),
        (V2 | {"scoring_func": "sigmoid"}, "want scoring_func 'softmax', the only one of deepseek_v2, got 'sigmoid'"),
        (V2 | {"norm_topk_prob": True}, "want norm_topk_prob False, the only one of deepseek_v2, got True"),
        (V2 | {"topk_method": "noaux_tc"}, "want topk_method 'greedy' or 'group_limited_greedy'"),
        (V2 | {"rope_interleave": False}, "want rope_interleave True"),
        (V2 | {"num_experts_per_tok": None}, "want num_experts_per_tok, got none"),
        ({"hidden_act": "gelu"}, "want hidden_act 'silu', got 'gelu'"),
        ({"moe_layer_freq": 2}, "want moe_layer_freq 1.* got 2"),
        ({"mlp_bias": True}, "want mlp_bias False.* got True"),
        ({"partial_rotary_factor": 0.5}, "want partial_rotary_factor 1.0.* got 0.5"),
        ({"hidden_size": "wide"}, "want hidden_size an integer, got 'wide'"),
        ({"hidden_size": 7168.0}, "want hidden_size an integer, got 7168.0"),
        ({"rms_norm_eps": True}, "want rms_norm_eps a number, got True"),
        ({"tie_word_embeddings": 1}, "want tie_word_embeddings true or false, got 1"),
        ({"eos_token_id": ["a"]}, r"want eos_token_id an integer or a list, got \['a'\]"),
        ({"mlp_layer_types": ["dense", 1]}, "want mlp_layer_types a list, got"),
        ({"mlp_layer_types": ["dense"]}, "want mlp_layer_types for 61 layers, got"),
        ({"topk_group": 9}, "topk_group <= n_group, got topk_group 9 and n_group 8"),
        ({"n_group": 7, "topk_group": 1}, "want n_group dividing n_routed_experts, got 7 and 256"),
        ({"num_experts_per_tok": 200}, "want 1 <= num_experts_per_tok <= 128.* got 200"),
        ({"num_key_value_heads": 3}, "num_attention_heads a multiple of num_key_value_heads, got 128 and 3"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling of type 'default' or 'yarn', got 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters of type 'default' or 'yarn', got 'llama3'"),
        ({"rope_parameters": {"full_attention": {}}}, r"keys out of .* got \['full_attention'\]"),
        ({"rope_scaling": "yarn"}, "want rope_scaling an object or null, got 'yarn'"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "want rope_scaling.factor a number, got '4'"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "rope_scaling: want factor >= 1"),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
            "original_max_position_embeddings >= 1, got 0",
        ),
        (
            {"rope_scaling": YARN | {"factor": 1, "attention_factor": 2.0}},
            "attention_factor 1 where factor is 1, got 2.0",
        ),
        (
            {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}},
            "want rope_scaling and rope_parameters to agree",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config with quant_method 'fp8', got 'awq'"),
        ({"quantization_config": {}}, "quantization_config with quant_method 'fp8', got None"),
        ({"quantization_config": []}, r"want quantization_config an object, got \[\]"),
        ({"quantization_config": FP8 | {"fmt": "e5m2"}}, "with fmt 'e4m3', got 'e5m2'"),
        ({"quantization_config": FP8 | {"activation_scheme": "static"}}, "activation_scheme 'dynamic', got 'static'"),
        ({"quantization_config": FP8 | {"expert_dtype": "fp4"}}, "expert_dtype 'fp8', got 'fp4'"),
        ({"quantization_config": FP8 | {"weight_block_size": None}}, r"weight_block_size \[rows, columns\], got None"),
        ({"torch_dtype": "int8"}, "want torch_dtype out of .* got 'int8'"),
    ],
)
def test_what_the_model_cannot_do_is_refused(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V3 | change))
    with pytest.raises(CheckpointError, match=match) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_scoring_does_not_matter_without_experts() -> None:
    assert parse_config(V3 | {"n_routed_experts": None, "scoring_func": "tanh"}).scoring_func == "tanh"


def test_a_config_that_transformers_would_take_for_another_is_not_written(tmp_path: Path) -> None:
    config: Config = replace(PRESETS["v2-lite"](), norm_topk_prob=True)
    with pytest.raises(ValueError, match="want norm_topk_prob False, the only one of deepseek_v2, got True"):
        write_config(config, tmp_path, torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="want a folder, got .*nowhere.* which does not exist"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="want a config.json, got none"):
        read_config(tmp_path)
    path = tmp_path / "config.json"
    for content, match in (
        (b"{", "want a JSON file, got"),
        (b"\xff\xfe", "want a JSON file"),
        (b"[]", "object, got a list"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=match):
            read_config(tmp_path)
    with pytest.raises(NotADirectoryError, match="want a folder, got the file"):
        read_config(path)
