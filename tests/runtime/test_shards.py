"""Damaged safetensors folders: each is refused, and the file is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from deepfuse.blocks.model import CausalLM
from deepfuse.runtime.checkpoint import CheckpointError, load_weights, save_checkpoint
from deepfuse.runtime.shards import INDEX, SINGLE
from tiny_checkpoint import TINY, load, model_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of the tiny model."""
    save_checkpoint(model_of(TINY), tmp_path / "model")
    return tmp_path / "model"


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
