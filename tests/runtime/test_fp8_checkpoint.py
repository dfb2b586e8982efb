"""Checkpoints with FP8 weights, against an independent computation in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepfuse.runtime.checkpoint import CheckpointError, save_checkpoint
from deepfuse.runtime.shards import INDEX, SINGLE
from fp8_checkpoint import WIDE, write_fp8
from tiny_checkpoint import assert_same_state, change, load, logits, model_of


@pytest.mark.parametrize(("block", "fused"), [((128, 128), False), ((128, 128), True), ((16, 40), False)])
def test_fp8_weights_are_dequantized(block: tuple[int, int], fused: bool, tmp_path: Path) -> None:
    save_checkpoint(model_of(WIDE), tmp_path)
    meant = write_fp8(tmp_path, block, fused)
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_a_gpu_are_those_on_the_cpu(dtype: torch.dtype, tmp_path: Path) -> None:
    save_checkpoint(model_of(WIDE), tmp_path)
    write_fp8(tmp_path, (128, 128))
    model = load(tmp_path, dtype, device="cuda")
    assert all(t.is_cuda for t in (*model.parameters(), *model.buffers()))
    assert_same_state({k: v.cpu() for k, v in model.state_dict().items()}, load(tmp_path, dtype).state_dict())
    save_checkpoint(model, tmp_path / "again")
    assert_same_state(load(tmp_path / "again", dtype).state_dict(), load(tmp_path, dtype).state_dict())


def test_fp8_weights_in_files_apart_from_their_scales(tmp_path: Path) -> None:
    save_checkpoint(model_of(WIDE), tmp_path)
    write_fp8(tmp_path, (128, 128))
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
    write_fp8(tmp_path, (128, 128))
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
