"""``config.json`` of the family to :class:`~deepfuse.blocks.config.Config`, and back.

What a file leaves out is what transformers would take, which differs between the model types. What it says and this
model cannot do is refused; what it says and this model does not read is kept in ``Config.extra`` and written back.
Source: ``configuration_deepseek_v3.py`` and ``configuration_deepseek_v2.py`` of transformers 5.23; the ``config.json``
of the releases of DeepSeek-V2, DeepSeek-V3 and Kimi-K2.
"""

import os
from collections.abc import Mapping
from dataclasses import fields
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch

from deepfuse.blocks.config import MODEL_TYPES, Config
from deepfuse.runtime.checkpoint_files import CheckpointError, existing_folder, object_bytes, read_object, replace_file
from deepfuse.runtime.rope_json import read_rope, rope_object

ARCHITECTURES = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}
V3_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
V2_DEFAULTS: Mapping[str, Any] = {
    **V3_DEFAULTS,
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": None,
    "n_group": None,
    "topk_group": None,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 2048,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEFAULTS = {"deepseek_v3": V3_DEFAULTS, "deepseek_v2": V2_DEFAULTS, "kimi_k2": V3_DEFAULTS}
"""Beside these, the defaults of ``Config``."""

ALIASES = {
    "num_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
}
DERIVED = ("head_dim", "qk_head_dim", "rope_parameters")
"""Follow from other fields."""
NOT_WRITTEN = ("dtype", "quantization_config", "auto_map")
"""Kept when read, but perhaps untrue of what we write: weights in ``torch_dtype``, or in FP8 as we quantize; no Python files."""
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
"""``quantization_config`` of a checkpoint with FP8 weights."""
KINDS: Mapping[type, str] = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def read_config(folder: str | os.PathLike[str]) -> Config:
    """The configuration of a checkpoint folder.

    Raises:
        FileNotFoundError: the folder does not exist.
        CheckpointError: ``config.json`` is missing, is not a JSON object, contradicts itself, or asks for something
            this model cannot do.
    """
    path = existing_folder(folder) / "config.json"
    raw = read_object(path)
    try:
        return parse_config(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def parse_config(raw: Mapping[str, Any]) -> Config:
    """The configuration that a ``config.json`` object means.

    Raises:
        ValueError: as :func:`read_config`.
    """
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"want model_type out of {list(MODEL_TYPES)}, got {model_type!r}")
    raw = _without_aliases(raw)
    _refuse_unknown_parts(raw, model_type)
    defaults, types = DEFAULTS[model_type], get_type_hints(Config)
    values: dict[str, Any] = {}
    for name in types.keys() - {"extra", "rope_theta", "rope_scaling"}:
        nullable = NoneType in get_args(types[name])
        if raw.get(name) is not None:
            values[name] = _typed(name, raw[name], types[name])
        elif name in raw and nullable:
            values[name] = None
        elif name in defaults:
            values[name] = defaults[name]
    if values["num_experts_per_tok"] is None:
        raise ValueError("want num_experts_per_tok, got none")
    values["n_group"], values["topk_group"] = _groups(raw, defaults, values["topk_method"])
    values["rope_theta"], values["rope_scaling"] = read_rope(raw, values["max_position_embeddings"])
    config = Config(**values, extra={k: v for k, v in raw.items() if k not in types and k not in DERIVED})
    _check_routing(config)
    named_dtype(config)
    weight_block_size(config)
    return config


def config_object(config: Config, dtype: torch.dtype, *, fp8: bool = False) -> dict[str, Any]:
    """What ``config.json`` says of a model with weights in ``dtype``, and in FP8 if so; old and new transformers read it.

    A ``kimi_k2`` model is written as the ``deepseek_v3`` model that it is: transformers does not know the former's
    name, and fills its experts with random numbers.

    Raises:
        ValueError: transformers would take the result for another model.
    """
    _check_routing(config)
    out = {k: v for k, v in config.extra.items() if k not in NOT_WRITTEN}
    out |= {f.name: getattr(config, f.name) for f in fields(config) if f.name not in ("extra", "rope_scaling")}
    out["model_type"] = "deepseek_v3" if config.model_type == "kimi_k2" else config.model_type
    out["architectures"] = [ARCHITECTURES[out["model_type"]]]
    out["rope_scaling"] = rope_object(config.rope_scaling)
    out["torch_dtype"] = str(dtype).removeprefix("torch.")
    if fp8:
        out["quantization_config"] = FP8
    # of models of our own; transformers names the tensors it then misses
    for name, usual in (("attention", "mla"), ("mlp_layer_types", None)):
        if out[name] == usual:
            del out[name]
    # transformers wants integers here
    out["n_shared_experts"] = config.n_shared_experts or 0
    if config.n_routed_experts is None and not config.num_nextn_predict_layers:
        out |= {"n_routed_experts": config.num_experts_per_tok, "n_group": 1, "topk_group": 1}
        out["first_k_dense_replace"] = config.num_hidden_layers
    return out


def write_config(config: Config, folder: str | os.PathLike[str], dtype: torch.dtype) -> None:
    """Write ``config.json`` into an existing folder; see :func:`config_object`."""
    replace_file(existing_folder(folder) / "config.json", object_bytes(config_object(config, dtype)))


def named_dtype(config: Config) -> torch.dtype | None:
    """The dtype that ``config.json`` names for the weights; ``None`` where it names none."""
    name = config.extra.get("dtype") or config.extra.get("torch_dtype")
    if name is None:
        return None
    if name not in FLOATS:
        raise ValueError(f"want torch_dtype out of {list(FLOATS)}, got {name!r}")
    return FLOATS[name]


def weight_block_size(config: Config) -> tuple[int, int] | None:
    """Rows and columns of the blocks of FP8 weights that share a scale; ``None`` for a checkpoint not quantized.

    Raises:
        ValueError: ``quantization_config`` is of another kind.
    """
    settings = config.extra.get("quantization_config")
    if settings is None:
        return None
    if type(settings) is not dict:
        raise ValueError(f"want quantization_config an object, got {settings!r}")
    wanted = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "expert_dtype": "fp8"}
    for name, value in wanted.items():
        got = settings.get(name, None if name == "quant_method" else value)
        if got != value:
            raise ValueError(f"want quantization_config with {name} {value!r}, got {got!r}")
    block = settings.get("weight_block_size", [128, 128])
    if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)):
        raise ValueError(f"want quantization_config with weight_block_size [rows, columns], got {block!r}")
    return block[0], block[1]


def _without_aliases(raw: Mapping[str, Any]) -> dict[str, Any]:
    plain = {k: v for k, v in raw.items() if k not in ALIASES}
    for alias in raw.keys() & ALIASES.keys():
        name = ALIASES[alias]
        if plain.setdefault(name, raw[alias]) != raw[alias]:
            raise ValueError(f"want {alias} equal to {name}, its other name, got {raw[alias]!r} and {plain[name]!r}")
    return plain


def _refuse_unknown_parts(raw: Mapping[str, Any], model_type: str) -> None:
    """Fields outside ``Config`` that would change the model."""
    only: dict[str, Any] = {"moe_layer_freq": 1, "mlp_bias": False, "partial_rotary_factor": 1.0}
    if model_type == "deepseek_v2":
        only["rope_interleave"] = True
    for name, wanted in only.items():
        value = raw.get(name)
        if value is not None and value != wanted:
            raise ValueError(f"want {name} {wanted!r}, the only one this model knows, got {value!r}")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as its field wants it: a list as a tuple, an integer as a float where that is wanted."""
    options = get_args(hint) or (hint,)
    for element, *_ in filter(None, map(get_args, options)):
        if isinstance(value, list) and all(type(v) is element for v in value):
            return tuple(value)
    if type(value) is int and float in options:
        return float(value)
    if type(value) not in options:
        wanted = " or ".join(KINDS.get(o, "a list") for o in options if o is not NoneType)
        raise ValueError(f"want {name} {wanted}, got {value!r}")
    return value


def _groups(raw: Mapping[str, Any], defaults: Mapping[str, Any], topk_method: str) -> tuple[int, int]:
    """``n_group`` and ``topk_group``; one group where ``n_group`` is null or the method (V2's greedy) has none."""
    n_group, topk_group = (raw.get(name, defaults[name]) for name in ("n_group", "topk_group"))
    if n_group is None or topk_method == "greedy":
        return 1, 1
    return n_group, n_group if topk_group is None else topk_group


def _check_routing(config: Config) -> None:
    """That the fields of routing say what transformers does for this model type, whatever they say."""
    c = config
    if not any(c.feed_forward(i) == "sparse" for i in range(c.num_hidden_layers + c.num_nextn_predict_layers)):
        return
    if c.model_type == "deepseek_v2":
        wanted: dict[str, tuple[Any, ...]] = {
            "scoring_func": ("softmax",),
            "topk_method": ("greedy", "group_limited_greedy"),
        }
        wanted |= {"norm_topk_prob": (False,)} | ({"n_group": (1,)} if c.topk_method == "greedy" else {})
    else:
        wanted = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}
    for name, values in wanted.items():
        got = getattr(c, name)
        if got not in values:
            options = " or ".join(map(repr, values))
            raise ValueError(f"want {name} {options}, the only one of {c.model_type}, got {got!r}")
