"""Checkpoints: what we write transformers loads, what it writes we load, and every damage is named."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

import deepfuse
from deepfuse.blocks.config import Config, RopeScaling
from deepfuse.blocks.model import CausalLM
from deepfuse.runtime import save
from deepfuse.runtime.checkpoint import (
    CheckpointError,
    load_weights,
    present_mtp_layers,
    save_checkpoint,
    stored_dtype,
    weights_bytes,
)
from deepfuse.runtime.config_json import read_config
from deepfuse.runtime.loading_bar import LoadingBar
from deepfuse.runtime.shards import INDEX, SINGLE

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


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> CausalLM:
    config = read_config(folder)
    with torch.device("meta"):
        model = CausalLM(config, mtp_layers=present_mtp_layers(folder, config))
    load_weights(model, folder, device="cpu", dtype=dtype, **options)
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


def assert_same_logits(ours: CausalLM, theirs: Any) -> None:
    ids = (torch.arange(42) * 7 % ours.config.vocab_size).view(2, 21)
    with torch.no_grad():
        want = theirs.eval()(ids).logits
    assert (logits(ours) - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of the tiny model."""
    save_checkpoint(model_of(TINY), tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite the weights of a checkpoint."""
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / SINGLE, {"format": "pt"})


# transformers as the oracle


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", CONFIGS)
def test_what_we_write_transformers_loads(name: str, tmp_path: Path) -> None:
    model = model_of(CONFIGS[name])
    save_checkpoint(model, tmp_path)
    oracle = DeepseekV2ForCausalLM if name.startswith("v2") else DeepseekV3ForCausalLM
    theirs = oracle.from_pretrained(tmp_path)
    main = {k: v for k, v in model.state_dict().items() if not k.startswith("model.layers.3.")}
    state = {k: v for k, v in theirs.state_dict().items() if v.numel() and (k in main or k != "lm_head.weight")}
    assert_same_state(main, state)
    assert_same_logits(model, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_we_write_we_load(name: str, tmp_path: Path) -> None:
    model = model_of(CONFIGS[name])
    save_checkpoint(model, tmp_path)
    back = load(tmp_path)
    assert_same_state(model.state_dict(), back.state_dict())
    assert torch.equal(logits(model), logits(back))
    assert all(p.requires_grad for p in back.parameters())


@pytest.mark.parametrize("interleave", [True, False])
def test_what_transformers_writes_we_load(interleave: bool, tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0}
    v3 = DeepseekV3Config(**small(), rope_scaling=yarn, rope_interleave=interleave, eos_token_id=[1, 2])
    theirs = randomized(DeepseekV3ForCausalLM(v3))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ours = load(tmp_path)
    # transformers names one prediction layer and writes none
    assert ours.config.num_nextn_predict_layers == 1 and len(ours.model.layers) == 3
    assert_same_state(ours.state_dict(), theirs.state_dict())
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_what_transformers_writes_of_v2_we_load(method: str, tmp_path: Path) -> None:
    v2 = DeepseekV2Config(**small(), topk_method=method, tie_word_embeddings=method == "greedy")
    theirs = randomized(DeepseekV2ForCausalLM(v2))
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    state = theirs.state_dict()
    assert_same_state(ours.state_dict(), {k: state[k] for k in ours.state_dict()})
    assert_same_logits(ours, theirs)


def small() -> dict[str, Any]:
    names = (
        "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads n_routed_experts num_experts_per_tok n_group topk_group first_k_dense_replace q_lora_rank "
        "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim max_position_embeddings"
    )
    return {name: getattr(TINY, name) for name in names.split()}


def randomized(model: Any) -> Any:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.normal_(std=0.1)
            if "norm" in name:
                tensor.add_(1)
    return model


# forms a checkpoint may have


def test_shards_hold_what_one_file_holds(folder: Path, tmp_path: Path) -> None:
    model, sharded = load(folder), tmp_path / "sharded"
    save_checkpoint(model, sharded, max_shard_bytes=20_000)
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 3 and all(
        f.name == f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, f in enumerate(files, 1)
    )
    tensors = {name: tensor for f in files for name, tensor in load_file(f).items()}
    assert_same_state(tensors, load_file(folder / SINGLE))
    index = json.loads((sharded / INDEX).read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert_same_state(load(sharded).state_dict(), model.state_dict())


def test_experts_are_apart_on_disk_and_fused_in_memory(folder: Path) -> None:
    tensors, state = load_file(folder / SINGLE), load(folder).state_dict()
    for i in range(8):
        prefix, fused = f"model.layers.1.mlp.experts.{i}.", state["model.layers.1.mlp.experts.gate_up_proj"][i]
        assert torch.equal(tensors[prefix + "gate_proj.weight"], fused[:24])
        assert torch.equal(tensors[prefix + "up_proj.weight"], fused[24:])
        down = state["model.layers.1.mlp.experts.down_proj"][i]
        assert torch.equal(tensors[prefix + "down_proj.weight"], down)
    assert "model.layers.3.eh_proj.weight" in tensors and "model.layers.3.shared_head.norm.weight" in tensors


def test_experts_may_be_fused_on_disk(folder: Path) -> None:
    state = load(folder).state_dict()

    def fuse(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            del tensors[name]
        tensors |= {n: t for n, t in state.items() if ".experts." in n}

    change(folder, fuse)
    assert_same_state(load(folder).state_dict(), state)


def test_copies_and_computed_tensors_on_disk_are_left_out(folder: Path) -> None:
    before = load(folder).state_dict()

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.3.embed_tokens.weight"] = torch.ones(64, 32)
        tensors["model.layers.3.shared_head.head.weight"] = torch.ones(64, 32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        # a zero-width shared expert, as transformers writes it
        tensors["model.layers.0.mlp.nothing.weight"] = torch.ones(0, 32)

    change(folder, add)
    assert_same_state(load(folder).state_dict(), before)


def test_a_tied_head_may_lie_on_disk(tmp_path: Path) -> None:
    save_checkpoint(model_of(CONFIGS["v3-tied-yarn"]), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / SINGLE)
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(64, 32)}))
    assert load(tmp_path).lm_head is None


def test_prediction_layers_may_be_left_out(folder: Path, tmp_path: Path) -> None:
    config = read_config(folder)
    assert present_mtp_layers(folder, config) == 1
    assert present_mtp_layers(folder, replace(config, num_nextn_predict_layers=2)) == 1
    # built without them, though they are there
    with torch.device("meta"):
        model = CausalLM(config, mtp_layers=0)
    load_weights(model, folder, device="cpu", dtype=torch.float32)
    # and written without them
    save_checkpoint(model, tmp_path / "without")
    assert read_config(tmp_path / "without").num_nextn_predict_layers == 0
    assert not any(name.startswith("model.layers.3.") for name in load_file(tmp_path / "without" / SINGLE))
    assert present_mtp_layers(tmp_path / "without", config) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_come_in_the_dtype_asked_for(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    model = load(folder, dtype)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if name.endswith("correction_bias") else dtype)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert sum(t.nbytes for t in model.state_dict().values()) == weights_bytes(TINY, dtype)
    save_checkpoint(model, tmp_path / "again")
    assert stored_dtype(tmp_path / "again") == dtype
    assert_same_state(load(tmp_path / "again", dtype).state_dict(), model.state_dict())


def test_the_dtype_of_a_checkpoint_that_does_not_say(folder: Path) -> None:
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "torch_dtype"}
    path.write_text(json.dumps(config))
    assert stored_dtype(folder) == torch.float32
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path.write_text(json.dumps(config | {"quantization_config": quantization}))
    assert stored_dtype(folder) == torch.bfloat16
    path.write_text(json.dumps(config | {"torch_dtype": "float64"}))
    assert stored_dtype(folder) == torch.float32


# FP8


def e4m3(bits: np.ndarray) -> np.ndarray:
    """Values of E4M3 numbers (OCP 8-bit floating point, section 5) in float64."""
    exponent, mantissa = (bits >> 3) & 15, (bits & 7).astype(np.float64)
    value = np.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent.astype(np.float64) - 7)
    )
    return np.where(bits & 128, -value, value)


def quantize(folder: Path, block: tuple[int, int], fused: bool = False) -> dict[str, np.ndarray]:
    """Give a checkpoint random FP8 weights; returns what they mean, in float64."""
    rng, meant = np.random.default_rng(0), {}

    def edit(tensors: dict[str, Tensor]) -> None:
        if fused:
            tensors |= {n: t for n, t in load(folder).state_dict().items() if n.endswith(("gate_up_proj", "down_proj"))}
            for name in [n for n in tensors if ".experts." in n and n.endswith(".weight")]:
                del tensors[name]
        names = [n for n in tensors if "proj" in n and "eh_proj" not in n]
        for name in names:
            *batch, N, K = tensors[name].shape
            bits = rng.integers(0, 256, (*batch, N, K), dtype=np.uint8)
            bits[(bits & 127) == 127] = 0  # NaN
            scale = rng.uniform(1e-4, 1e-2, (*batch, -(-N // block[0]), -(-K // block[1]))).astype(np.float32)
            n, k = np.indices((N, K))
            meant[name] = e4m3(bits) * scale.astype(np.float64)[..., n // block[0], k // block[1]]
            tensors[name] = torch.from_numpy(bits).view(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = torch.from_numpy(scale)

    change(folder, edit)
    path = folder / "config.json"
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    return meant


WIDE = replace(TINY, hidden_size=192, kv_lora_rank=512, qk_rope_head_dim=64, q_lora_rank=130, moe_intermediate_size=72)
"""``kv_a_proj_with_mqa`` is [576, 192]: four blocks of 128 rows and a half by one and a half."""


@pytest.mark.parametrize(("block", "fused"), [((128, 128), False), ((128, 128), True), ((16, 40), False)])
def test_fp8_weights_are_dequantized(block: tuple[int, int], fused: bool, tmp_path: Path) -> None:
    save_checkpoint(model_of(WIDE), tmp_path)
    meant = quantize(tmp_path, block, fused)
    assert meant["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (576, 192)
    model = load(tmp_path)
    state = model.state_dict()
    for i in range(8) if not fused else ():
        for layer in (1, 2, 3):
            prefix = f"model.layers.{layer}.mlp.experts"
            both = [meant.pop(f"{prefix}.{i}.{part}_proj.weight") for part in ("gate", "up")]
            meant.setdefault(f"{prefix}.gate_up_proj", np.empty((8, 144, 192)))[i] = np.concatenate(both)
            meant.setdefault(f"{prefix}.down_proj", np.empty((8, 192, 72)))[i] = meant.pop(
                f"{prefix}.{i}.down_proj.weight"
            )
    for name, want in meant.items():
        # 4 bits times 24 bits: exact in float64, rounded once to float32
        assert np.array_equal(state[name].numpy(), want.astype(np.float32)), name
    assert logits(model).isfinite().all()
    half = load(tmp_path, torch.bfloat16).state_dict()
    assert all(torch.equal(half[name], state[name].bfloat16()) for name in meant)
    # what is written again is not quantized
    save_checkpoint(model, tmp_path / "plain")
    assert_same_state(load(tmp_path / "plain").state_dict(), state)


def test_fp8_weights_in_files_apart_from_their_scales(tmp_path: Path) -> None:
    save_checkpoint(model_of(WIDE), tmp_path)
    quantize(tmp_path, (128, 128))
    want = load(tmp_path).state_dict()
    tensors = load_file(tmp_path / SINGLE)
    (tmp_path / SINGLE).unlink()
    parts = {"b": {n: t for n, t in tensors.items() if n.endswith("_scale_inv")}}
    parts["a"] = {n: t for n, t in tensors.items() if n not in parts["b"]}
    for part, held in parts.items():
        save_file(held, tmp_path / f"{part}.safetensors")
    weight_map = {n: f"{part}.safetensors" for part, held in parts.items() for n in held}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert_same_state(load(tmp_path).state_dict(), want)


def test_fp8_scales_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_checkpoint(model_of(WIDE), tmp_path)
    quantize(tmp_path, (128, 128))
    kv, q = (f"model.layers.0.self_attn.{n}.weight_scale_inv" for n in ("kv_a_proj_with_mqa", "q_a_proj"))

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[kv] = tensors[kv][:4]
        del tensors[q]
        tensors["model.norm.weight_scale_inv"] = torch.ones(1, 1)

    change(tmp_path, edit)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert f"{kv} (want [5, 2], got [4, 2])" in str(caught.value)
    assert f"1 missing:\n  {q}\n1 unexpected:\n  model.norm.weight_scale_inv\n" in str(caught.value)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "quantization_config"}))
    with pytest.raises(CheckpointError, match=r"kv_a_proj_with_mqa.weight \(FP8, without quantization_config\)"):
        load(tmp_path)


# bad input


def test_all_wrong_tensors_are_named_at_once(folder: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
        tensors["model.layers.0.mlp.gate_proj.bias"] = torch.ones(48)
        tensors["model.layers.7.input_layernorm.weight"] = torch.ones(32)
        tensors["lm_head.weight"] = torch.ones(65, 32)
        tensors["model.layers.2.mlp.experts.0.down_proj.weight"] = torch.ones(24, 32)
        tensors["model.embed_tokens.weight"] = torch.ones(64, 32, dtype=torch.int8)

    change(folder, edit)
    with torch.device("meta"):
        model = CausalLM(TINY)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, folder, device="cpu", dtype=torch.float32)
    assert (
        str(caught.value)
        == f"""{folder}: want the tensors of its config.json, got 2 missing:
  model.layers.1.mlp.experts.5.up_proj.weight
  model.norm.weight
2 unexpected:
  model.layers.0.mlp.gate_proj.bias
  model.layers.7.input_layernorm.weight
2 of a wrong shape:
  model.layers.2.mlp.experts.0.down_proj.weight (want [32, 24], got [24, 32])
  lm_head.weight (want [64, 32], got [65, 32])
1 of a wrong dtype:
  model.embed_tokens.weight (I8)"""
    )
    # nothing half-done
    assert all(p.is_meta for p in model.parameters())


def test_a_long_list_is_cut(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_routed_experts": 64}))
    with pytest.raises(CheckpointError, match=r"504 missing:(\n  \S+){100}\n  and 404 more\n"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(value: float, folder: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.2.gate_proj.weight"][3, 4] = value
        tensors["model.layers.1.mlp.gate.e_score_correction_bias"][0] = value

    change(folder, edit)
    with torch.device("meta"):
        model = CausalLM(TINY)
    names = r"(\n  model.layers.1.mlp.(experts.2.gate_proj.weight|gate.e_score_correction_bias)){2};"
    with pytest.raises(CheckpointError, match=f"want finite weights, got 2 NaN or infinite in torch.float32:{names}"):
        load_weights(model, folder, device="cpu", dtype=torch.float32)
    assert all(p.is_meta for p in model.parameters())
    assert not load(folder, allow_nan=True).state_dict()["model.layers.1.mlp.experts.gate_up_proj"][2, 3, 4].isfinite()


def test_weights_beyond_the_dtype_asked_for_are_named(folder: Path) -> None:
    change(folder, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    load(folder)
    with pytest.raises(CheckpointError, match="1 NaN or infinite in torch.float16:\n  model.norm.weight"):
        load(folder, torch.float16)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_files_are_named(keep: int, folder: Path) -> None:
    path = folder / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"want a whole safetensors file, got \d+ bytes.*truncated or corrupted"):
        load(folder)


def test_a_byte_flipped_in_the_header_is_noticed(folder: Path) -> None:
    path = folder / SINGLE
    data = path.read_bytes()
    # its length, and all that names tensors: not the metadata, which no one reads, nor the spaces that fill it up
    begin, end = data.index(b"}") + 1, data.index(b"}}") + 1
    rng = np.random.default_rng(0)
    for place in [*range(8), *rng.integers(begin, end, 40)]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        assert str(folder) in str(caught.value)


def test_more_data_than_the_header_says(folder: Path) -> None:
    with (folder / SINGLE).open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="want a whole safetensors file"):
        load(folder)


@pytest.fixture
def sharded(folder: Path, tmp_path: Path) -> Path:
    save_checkpoint(load(folder), tmp_path / "sharded", max_shard_bytes=50_000)
    return tmp_path / "sharded"


def test_a_missing_shard_is_named(sharded: Path) -> None:
    name = sorted(sharded.glob("*.safetensors"))[1].name
    (sharded / name).unlink()
    with pytest.raises(CheckpointError, match=f"want all files it names, got none called {name}"):
        load(sharded)


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "C:\\x.safetensors", "x.bin", "a\0.safetensors"],
)
def test_an_index_that_points_outside_is_refused(name: str, sharded: Path) -> None:
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "secret.safetensors")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="index.json: want safetensors files inside the folder, got"):
        load(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map_is_refused(content: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="index.json: want weight_map, an object from tensor names to file names"):
        load(sharded)


def test_an_index_that_is_wrong_about_its_files(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    elsewhere = names[0] if index["weight_map"]["model.norm.weight"] != names[0] else names[1]
    index["weight_map"]["model.norm.weight"] = elsewhere
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"want tensors where it says, got no model.norm.weight in {elsewhere}"):
        load(sharded)
    (sharded / INDEX).write_text("not json")
    with pytest.raises(CheckpointError, match="index.json: want a JSON file"):
        load(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_with_the_way_to_convert(name: str, folder: Path) -> None:
    (folder / SINGLE).rename(folder / name)
    with pytest.raises(CheckpointError, match=f"want safetensors, got {name}: pickle files.*save_pretrained"):
        load(folder)


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="want model.safetensors or model.safetensors.index.json, got neither"):
        load(folder)
    (folder / "adapter.safetensors").touch()
    with pytest.raises(CheckpointError, match="got adapter.safetensors"):
        load(folder)
    with pytest.raises(FileNotFoundError, match="want a folder, got .*nowhere"):
        load_weights(CausalLM(TINY), folder / "nowhere", device="cpu", dtype=torch.float32)


# saving


def test_files_beside_the_weights(folder: Path, tmp_path: Path) -> None:
    files = {"tokenizer.json": b"{}", "generation_config.json": b'{"top_k": 4}'}
    save_checkpoint(load(folder), tmp_path / "a", files=files)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"bos_token": "x"}')
    save_checkpoint(load(folder), tmp_path / "b", source=tmp_path / "a", files={"generation_config.json": b"{}"})
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir() if "token" in p.name or "gen" in p.name} == {
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b'{"bos_token": "x"}',
        "generation_config.json": b"{}",
    }
    # over itself, and what is not ours stays
    save_checkpoint(load(folder), tmp_path / "a", source=tmp_path / "a")
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == b"{}"
    with pytest.raises(ValueError, match=r"want files out of \[.*, got \['../evil'\]"):
        save_checkpoint(load(folder), tmp_path / "c", files={"../evil": b""})
    with pytest.raises(ValueError, match="want max_shard_bytes >= 1, got 0"):
        save_checkpoint(load(folder), tmp_path / "c", max_shard_bytes=0)
    with torch.device("meta"), pytest.raises(ValueError, match="want a model with weights, got one on the meta device"):
        save_checkpoint(CausalLM(TINY), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_new_form_replaces_the_old_one(folder: Path) -> None:
    model = load(folder)
    for shard_bytes in (20_000, 60_000, 10**9, 30_000):
        save_checkpoint(model, folder, max_shard_bytes=shard_bytes)
        assert_same_state(load(folder).state_dict(), model.state_dict())
        stored = {p.name for p in folder.glob("*.safetensors")}
        index = folder / INDEX
        assert stored == (set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {SINGLE})
        assert not list(folder.glob(".*"))


@pytest.mark.parametrize("fail_at", range(3))
def test_an_error_while_writing_leaves_the_checkpoint_of_before(
    fail_at: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    write, calls = save.write_shard, iter(range(9))

    def failing(path: Path, tensors: Any) -> None:
        write(path, tensors)
        if next(calls) == fail_at:
            raise OSError("No space left on device")

    monkeypatch.setattr(save, "write_shard", failing)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(model_of(TINY), folder, max_shard_bytes=30_000)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_a_kill_at_any_moment_leaves_the_old_the_new_or_none(
    shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = model_of(TINY), model_of(TINY)
    states = [m.state_dict()["model.norm.weight"] for m in (old, new)]
    save_checkpoint(old, tmp_path / "old", max_shard_bytes=shard_bytes)
    outcomes: list[str] = []
    for steps in range(30):
        path = tmp_path / str(steps)
        shutil.copytree(tmp_path / "old", path)
        done = save_but_die_after(steps, new, path, shard_bytes, monkeypatch)
        try:
            state = load(path).state_dict()
        except CheckpointError as error:
            assert "want a config.json, got none" in str(error)
            outcomes.append("none")
        else:
            model = next(
                m for m, s in zip((old, new), states, strict=True) if torch.equal(state["model.norm.weight"], s)
            )
            assert_same_state(state, model.state_dict())
            outcomes.append("old" if model is old else "new")
        if done:
            break
    assert outcomes[0] == "old" and outcomes[-1] == "new"
    # one file changes its content in a single step
    assert ("none" in outcomes) == (shard_bytes < 10**9)
    # the next save removes what a killed one left
    assert list((tmp_path / "0").glob(".*"))
    save_checkpoint(new, tmp_path / "0", max_shard_bytes=shard_bytes)
    assert not list((tmp_path / "0").glob(".*"))


def save_but_die_after(
    steps: int, model: CausalLM, path: Path, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Save up to the so-manieth time that a file is renamed or removed; returns whether that was the end."""
    taken = iter(range(99))

    def step(do: Callable[..., Any]) -> Callable[..., Any]:
        def alive(*args: Any, **kwargs: Any) -> Any:
            # again and again: a killed process does not clean up either
            if next(taken) >= steps:
                raise KeyboardInterrupt
            return do(*args, **kwargs)

        return alive

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", step(Path.replace))
        patch.setattr(Path, "unlink", step(Path.unlink))
        try:
            save_checkpoint(model, path, max_shard_bytes=shard_bytes)
        except KeyboardInterrupt:
            return False
    return True


# memory and time

MEASURE = """
import sys, torch
from deepfuse.blocks.model import CausalLM
from deepfuse.runtime.checkpoint import load_weights, weights_bytes
from deepfuse.runtime.config_json import read_config
config = read_config(sys.argv[1])
with torch.device("meta"):
    model = CausalLM(config)

def kibibytes(name):
    # not ru_maxrss: it begins with what the parent had
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

before = kibibytes("VmRSS")
load_weights(model, sys.argv[1], device="cpu", dtype=torch.float32)
print((kibibytes("VmHWM") - before) * 1024, weights_bytes(config, torch.float32))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_model_and_one_tensor(tmp_path: Path) -> None:
    config = replace(TINY, vocab_size=16384, hidden_size=512, moe_intermediate_size=448, n_routed_experts=16)
    model = CausalLM(config)
    for tensor in model.state_dict().values():
        tensor.fill_(0.5)
    save_checkpoint(model, tmp_path)
    root = str(Path(deepfuse.__file__).parents[1])
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": root},
    )
    peak, weights = map(int, out.stdout.split())
    assert weights > 200e6
    largest = 16384 * 512 * 4
    # and the code that runs for the first time
    assert peak < weights + largest + 8e6


def test_a_bar_appears_on_a_terminal_when_loading_is_long() -> None:
    shown = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        with LoadingBar("loading [x] {y}", 100, console=console, delay=0) as bar:
            bar.advance(40)
            bar.advance(60)
        shown[terminal] = console.file.getvalue()  # type: ignore[attr-defined]
    assert "loading [x] {y}" in shown[True] and shown[False] == ""
    console = Console(file=io.StringIO(), force_terminal=True)
    with LoadingBar("quick", 100, console=console, delay=60) as bar:
        bar.advance(100)
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
