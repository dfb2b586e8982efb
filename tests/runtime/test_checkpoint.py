"""Checkpoints: what we write transformers loads, what it writes we load, and wrong tensors are named."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

import deepfuse
from deepfuse.blocks.model import CausalLM
from deepfuse.runtime.checkpoint import (
    CheckpointError,
    load_weights,
    present_mtp_layers,
    save_checkpoint,
    stored_dtype,
    weights_bytes,
)
from deepfuse.runtime.config_json import read_config
from deepfuse.runtime.shards import INDEX, SINGLE
from tiny_checkpoint import CONFIGS, TINY, assert_same_state, change, load, logits, model_of


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
