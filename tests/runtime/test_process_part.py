"""Of a checkpoint, a process reads its own part: the same numbers, and no other bytes."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.cut import Cut, taken
from deepfuse.blocks.expert_parallel import to_expert_parallel
from deepfuse.blocks.fp8 import to_fp8
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.placement import Placement
from deepfuse.blocks.tensor_parallel import to_tensor_parallel
from deepfuse.runtime.checkpoint import CheckpointError, load_weights, save_checkpoint
from deepfuse.runtime.config_json import read_config
from deepfuse.runtime.shards import Reader, stored_tensors
from deepfuse.runtime.weight_names import Region, pieces
from tensor_parallel_worker import WIDE
from tiny_checkpoint import CONFIGS, TINY, change, load, model_of

WIDE_CONFIG = replace(TINY, **WIDE)


def cut(model: CausalLM, rank: int, size: int = 2) -> CausalLM:
    to_tensor_parallel(model, Axis("tensor", "0", size, rank))
    return model


def loaded(folder: Path, rank: int, *, fp8: bool = False, size: int = 2) -> CausalLM:
    with torch.device("meta"):
        model = cut(CausalLM(read_config(folder)), rank, size)
        if fp8:
            to_fp8(model)
    load_weights(model, folder, device="cpu", dtype=torch.float32)
    return model


@pytest.mark.parametrize("name", ["v3", "v3-tied-yarn", "v3-bias-no-shared", "v2"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_is_what_would_be_cut_out_of_the_whole(tmp_path, name, rank):
    whole = model_of(CONFIGS[name])
    save_checkpoint(whole, tmp_path)
    part, want = loaded(tmp_path, rank), cut(copy.deepcopy(whole), rank)
    assert part.cuts == want.cuts
    assert {k: v.shape for k, v in part.state_dict().items()} == {k: v.shape for k, v in want.state_dict().items()}
    for key, tensor in part.state_dict().items():
        assert torch.equal(tensor, want.state_dict()[key]), key


def test_of_the_files_each_process_reads_its_bytes_alone(tmp_path, monkeypatch):
    read: list[tuple[str, int]] = []
    get = Reader.get

    def counted(self: Reader, name: str, region: tuple[slice, ...] = ()) -> torch.Tensor:
        before = self.bytes_read
        tensor = get(self, name, region)
        assert tensor.nbytes == self.bytes_read - before
        read.append((name, tensor.nbytes))
        return tensor

    monkeypatch.setattr(Reader, "get", counted)
    save_checkpoint(model_of(TINY), tmp_path)
    with torch.device("meta"):
        model = cut(CausalLM(TINY), 1)
        experts = Axis("expert", "1", 4, 2)
        for layer in (1, 2, 3):  # as experts are dealt out: 4 and 5 of 8 are this process's
            module = model.model.layers[layer].mlp.experts
            for kind in ("gate_up_proj", "down_proj"):
                key = f"model.layers.{layer}.mlp.experts.{kind}"
                setattr(module, kind, torch.nn.Parameter(getattr(module, kind)[:2]))
                model.cuts[key] = (Cut(experts, 0), *model.cuts[key])
    load_weights(model, tmp_path, device="cpu", dtype=torch.float32)
    names = {name for name, _ in read}
    assert {n.split(".experts.")[1].split(".")[0] for n in names if ".experts." in n} == {"4", "5"}
    assert len(names) == len(read)
    assert sum(n for _, n in read) == sum(tensor.nbytes for tensor in model.state_dict().values())
    whole = model_of(TINY)
    load_weights(whole, tmp_path, device="cpu", dtype=torch.float32)
    theirs = whole.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, taken(theirs[key], model.cuts.get(key, ()))), key


ROW = [7, 6, 5, 4, 3, 2, 1, 0, 7, 6, 7, 7]
"""Experts in 12 slots of 4 processes, of which the last has one twice."""


PLACEMENT = Placement(torch.tensor([ROW, ROW]), 4, torch.ones(2, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    "stored", ["plain", "quantized as it is loaded", "fp8", "fp8 dequantized", "fused", "fused fp8"]
)
def test_experts_of_a_placement_are_read_once(tmp_path, monkeypatch, stored):
    whole = model_of(replace(WIDE_CONFIG, num_nextn_predict_layers=0))
    if "fp8" in stored:
        to_fp8(whole)
    save_checkpoint(whole, tmp_path)
    if "fused" in stored:
        change(tmp_path, lambda tensors: fuse(tensors, whole))
    read: list[tuple[str, int]] = []
    get = Reader.get

    def counted(self: Reader, name: str, region: Region = ()) -> torch.Tensor:
        before = self.bytes_read
        tensor = get(self, name, region)
        read.append((name, self.bytes_read - before))
        return tensor

    monkeypatch.setattr(Reader, "get", counted)
    want = load(tmp_path) if stored == "fp8 dequantized" else whole
    with torch.device("meta"):
        part = CausalLM(read_config(tmp_path))
        to_expert_parallel(part, Axis("expert", "0", 4, 3), placement=PLACEMENT)
        if stored in ("quantized as it is loaded", "fp8", "fused fp8"):
            to_fp8(part)
    if stored == "quantized as it is loaded":
        to_fp8(want)
    theirs = dict(want.named_parameters())
    read.clear()
    load_weights(part, tmp_path, device="cpu", dtype=torch.float32)
    for key, tensor in part.named_parameters():
        expected = theirs[key][[6, 7, 7]] if ".experts." in key else theirs[key]
        assert torch.equal(tensor.float(), expected.float()), key
    experts = [(name, size) for name, size in read if ".experts" in name]
    assert len({name for name, _ in experts}) == len(experts)
    own = sum(entry.nbytes for name, entry in stored_tensors(tmp_path).items() if re.search(r"\.experts\.[67]\.", name))
    if "fused" in stored:  # 2 of 8 of each tensor
        own = sum(entry.nbytes for name, entry in stored_tensors(tmp_path).items() if ".experts." in name) // 4
    assert sum(size for _, size in experts) == own > 0


def fuse(tensors: dict[str, torch.Tensor], whole: CausalLM) -> None:
    """All experts of a layer in one tensor of the file, as in memory."""
    for name in [name for name in tensors if ".experts." in name]:
        del tensors[name]
    tensors |= {key: tensor.clone() for key, tensor in whole.state_dict().items() if ".experts." in key}


def test_untouched_rows_stay_on_disk(tmp_path):
    """A quarter of a file, and what the kernel reads ahead."""
    from safetensors.torch import save_file

    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1024, 4096)}, file)
    with Reader(stored_tensors(tmp_path)) as reader:
        assert float(reader.get("a", (slice(256, 512),)).sum()) == 256 * 4096
        mapped = Path("/proc/self/smaps").read_text().split(str(file))[1].split("Rss:")[1].split()[0]
    assert 4096 <= int(mapped) <= 8192, "of 16384 kB"


@pytest.mark.parametrize("rank", [0, 1])
def test_fp8_weights_and_scales_are_read_in_whole_blocks(tmp_path, rank):
    whole = model_of(WIDE_CONFIG)
    to_fp8(whole)
    save_checkpoint(whole, tmp_path)
    theirs = {}
    for key, tensor in whole.state_dict().items():
        for piece in pieces(key, tensor.shape, WIDE_CONFIG.moe_intermediate_size):
            theirs[piece.name] = tensor[piece.part]
    part = loaded(tmp_path, rank, fp8=True)
    for key, tensor in part.state_dict().items():
        for piece in pieces(key, tensor.shape, WIDE_CONFIG.moe_intermediate_size // 2):
            got, want = tensor[piece.part].float(), theirs[piece.name].float()
            for dim in range(got.ndim):
                if got.shape[dim] != want.shape[dim]:
                    want = taken(want, [Cut(Axis("tensor", "0", 2, rank), dim)])
            assert torch.equal(got, want), piece.name
    dequantized = loaded(tmp_path, rank)
    weight, scale = (part.state_dict()[f"model.layers.0.mlp.down_proj.{n}"] for n in ("weight", "weight_scale_inv"))
    assert torch.equal(dequantized.state_dict()["model.layers.0.mlp.down_proj.weight"], weight.float() * scale)


def test_weights_quantized_as_they_are_loaded(tmp_path):
    whole = model_of(WIDE_CONFIG)
    save_checkpoint(whole, tmp_path)
    part, want = loaded(tmp_path, 1, fp8=True), cut(whole, 1)
    to_fp8(want)
    for key, tensor in part.state_dict().items():
        assert torch.equal(tensor.float(), want.state_dict()[key].float()), key


def test_a_part_of_an_fp8_block_is_refused(tmp_path):
    whole = model_of(WIDE_CONFIG)
    to_fp8(whole)
    save_checkpoint(whole, tmp_path)
    text = r"want each process's part of model.layers.0.\S+ in whole FP8 blocks of 128, got 64 of 256; choose a smaller axis"
    with pytest.raises(CheckpointError, match=text):
        loaded(tmp_path, 0, fp8=True, size=4)


def test_a_missing_expert_of_another_process_is_found(tmp_path):
    save_checkpoint(model_of(TINY), tmp_path)
    change(tmp_path, lambda tensors: tensors.__delitem__("model.layers.1.mlp.experts.7.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"1 missing:\n  model.layers.1.mlp.experts.7.up_proj.weight"):
        loaded(tmp_path, 0)
