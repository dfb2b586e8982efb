"""Models whose shared expert is one of the routed experts, built as on a GPU, with the values of a CPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import deepfuse as df
import deepfuse.runtime.build
from deepfuse.ir.device import H200
from deepfuse.passes.pipeline import default
from deepfuse.runtime.weight_layout import layout_key
from tiny_model import CONFIG, build, random_weights, write_checkpoint

WHOLE_BLOCKS = replace(CONFIG, moe_intermediate_size=128)
PROMPT = [5, 9, 2, 40, 7]


@pytest.fixture
def on_a_gpus_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepfuse.runtime.build, "device_row", lambda device: H200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("shared") / "model", config=WHOLE_BLOCKS)


def rewrites(model: Any) -> dict[str, int]:
    """Of the pass, by graph."""
    return {
        graph.name: entry.rewrites
        for graph in model.report.journal.graphs
        for entry in graph.passes
        if entry.name == "merge_shared_expert"
    }


@pytest.mark.usefixtures("on_a_gpus_row")
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantize": "fp8"}], ids=str)
def test_decode_merges_and_prefill_does_not(folder: Path, options: dict[str, Any]) -> None:
    model = build(folder, verify=True, **options)
    assert rewrites(model) == {"prefill": 0, "decode_1": 1}
    assert "tokens are not known to be at most 64" in model.explain("merge_shared_expert")
    apart = build(folder, passes=default().without("merge_shared_expert"), **options)
    assert rewrites(apart) == {}
    # laid out as on a CPU
    assert layout_key(apart.engine.model) != layout_key(model.engine.model)
    generated = [m.generate(PROMPT, max_new_tokens=6, temperature=0.0, stop_token_ids=()) for m in (model, apart)]
    assert generated[0] == generated[1]


@pytest.mark.usefixtures("on_a_gpus_row")
def test_the_checkpoint_that_was_loaded_is_the_one_that_is_saved(folder: Path, tmp_path: Path) -> None:
    model = build(folder)
    model.save(tmp_path / "again")
    saved, loaded = (load_file(path / "model.safetensors") for path in (tmp_path / "again", folder))
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[k], loaded[k]) for k in saved)


@pytest.mark.usefixtures("on_a_gpus_row")
def test_weights_written_after_the_build_are_those_that_decode() -> None:
    written = random_weights(WHOLE_BLOCKS, seed=1)
    model = build(WHOLE_BLOCKS)
    assert rewrites(model)["decode_1"] == 1
    model.engine.model.load_state_dict(written.state_dict())
    ids = model.generate(PROMPT, max_new_tokens=6, temperature=0.0, stop_token_ids=())
    tokens = [*PROMPT, *ids]
    with torch.no_grad():
        expected = written(torch.tensor(tokens), torch.arange(len(tokens)), torch.tensor([0, len(tokens)]).int())
    assert expected.argmax(-1)[len(PROMPT) - 1 : -1].tolist() == ids


def test_a_cpu_keeps_its_layout_and_its_graphs(folder: Path) -> None:
    model = build(folder)
    assert rewrites(model) == {"prefill": 0, "decode_1": 0}
    assert "on a CPU launches are not what takes the time" in model.explain("merge_shared_expert")
    moe = model.engine.model.model.layers[1].mlp
    assert moe.experts.gate_up_proj.untyped_storage().nbytes() == moe.experts.gate_up_proj.nbytes
    assert moe.shared_experts.gate_proj.weight.storage_offset() == 0


@pytest.mark.usefixtures("on_a_gpus_row")
def test_never_in_training() -> None:
    trainer = df.build(WHOLE_BLOCKS, training=df.Training(steps=1), compile=False, device="cpu")
    assert layout_key(trainer.model) == ""


@pytest.mark.compile
@pytest.mark.usefixtures("on_a_gpus_row")
@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_compiled_graphs_read_weights_beyond_the_first(
    folder: Path, quantize: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DEEPFUSE_CACHE_DIR", str(tmp_path))
    # Inductor is not given the references of a GPU's decode attention, which a CPU would run here
    passes = default().without("fuse_decode_attention")
    options: dict[str, Any] = {"quantize": quantize, "max_seq_len": 64, "passes": passes}
    model, other = build(folder, compile=True, **options), build(folder, **options)
    assert rewrites(model) == rewrites(other) == {"prefill": 0, "decode_1": 1}
    answers = [m.generate(PROMPT, max_new_tokens=6, temperature=0.0, stop_token_ids=()) for m in (model, other)]
    assert answers[0] == answers[1]
