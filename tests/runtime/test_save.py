"""Saving: what lies beside the weights, and folders that are whole at every moment."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepfuse.blocks.model import CausalLM
from deepfuse.runtime import save
from deepfuse.runtime.checkpoint import CheckpointError, save_checkpoint
from deepfuse.runtime.shards import INDEX, SINGLE
from tiny_checkpoint import TINY, assert_same_state, load, model_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of the tiny model."""
    save_checkpoint(model_of(TINY), tmp_path / "model")
    return tmp_path / "model"


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

    def failing(*arguments: Any) -> None:
        write(*arguments)
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
