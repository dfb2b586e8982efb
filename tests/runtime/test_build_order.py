"""Mistakes that ``build`` can see are told before it compiles anything."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deepfuse as df
from deepfuse.runtime import build as build_module
from deepfuse.runtime import requirements
from deepfuse.runtime.checkpoint import CheckpointError
from tiny_model import CONFIG, ONE_LAYER, build, random_weights, write_checkpoint


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_damaged_small_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / name).write_text("{")
    monkeypatch.setattr(build_module, "kept_engine", lambda *_, **__: pytest.fail("it compiles first"))
    with pytest.raises(CheckpointError, match=name):
        build(tmp_path)


@pytest.mark.parametrize("passes", [[], (), 7, ["lower"]])
def test_passes_are_a_pipeline_or_passes_to_add(passes: Any) -> None:
    with pytest.raises(TypeError, match="passes: want a pipeline or passes"):
        build(ONE_LAYER, passes=passes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "want a CausalLM in bfloat16, got one in torch.float32; convert it first"),
        ({"dtype": "nonsense"}, "want dtype 'auto', 'float32', 'bfloat16' or 'float16', got 'nonsense'"),
    ],
)
def test_a_module_is_taken_as_it_is_or_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(random_weights(ONE_LAYER), **options)


def test_a_module_has_one_device_and_one_dtype() -> None:
    mixed = random_weights(ONE_LAYER)
    mixed.lm_head.half()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="one device and of one dtype, got cpu torch.float16, cpu torch.float32"):
        build(mixed)
    with torch.device("meta"):
        empty = df.CausalLM(ONE_LAYER)
    with pytest.raises(ValueError, match="one device and of one dtype, got meta torch.float32"):
        build(empty)


def test_a_module_runs_uncompiled_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements.shutil, "which", lambda _: None)
    block = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.warns(UserWarning, match=r"build: runs uncompiled: no C\+\+ compiler"):
        compiled = df.build(block, device="cpu")
    x = torch.ones(2, 3)
    torch.testing.assert_close(compiled(x), block(x))


def test_a_model_is_saved_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "model", config=ONE_LAYER)
    monkeypatch.chdir(tmp_path)
    model = build("model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model.save("copy")
    assert (tmp_path / "elsewhere" / "copy" / "tokenizer.json").exists()


def test_random_weights_are_never_wider_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    original = df.CausalLM.initialize

    def initialize(self: df.CausalLM, seed: int) -> None:
        seen.extend(p.dtype for p in self.parameters())
        original(self, seed)

    monkeypatch.setattr(df.CausalLM, "initialize", initialize)
    model = build(CONFIG, dtype="bfloat16")
    assert set(seen) == {torch.bfloat16}
    expected = df.CausalLM(CONFIG)
    original(expected, 0)
    for (name, got), want in zip(model.engine.model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(got, want.bfloat16()), name


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (None, {}, TypeError, "want a path, a preset, a Config or a module, got None"),
        (ONE_LAYER, {"max_batch_size": 1.5}, ValueError, "want max_batch_size as an integer >= 1, got 1.5"),
        (ONE_LAYER, {"max_batch_size": True}, ValueError, "want max_batch_size as an integer >= 1, got True"),
        (ONE_LAYER, {"max_seq_len": True}, ValueError, "want max_seq_len as an integer in 1 .. .*, got True"),
        (ONE_LAYER, {"strict": "no"}, TypeError, "want strict as None, True or False, got 'no'"),
        (ONE_LAYER, {"verify": 1}, TypeError, "want verify as True or False, got 1"),
        (ONE_LAYER, {"compile": None}, TypeError, "want compile as True or False, got None"),
        (ONE_LAYER, {"max_seq_len": "8"}, ValueError, "want max_seq_len as an integer in 1 .. .*, got '8'"),
        (ONE_LAYER, {"providers": ["triton"]}, TypeError, "want providers as a mapping from op to provider"),
        (ONE_LAYER, {"training": 5}, TypeError, "want training as a Training, got 5"),
        (replace(ONE_LAYER, attention="mha"), {}, ValueError, "want attention 'mla', which has a cache"),
    ],
)
def test_arguments_of_the_wrong_kind(source: Any, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        build(source, **options)
