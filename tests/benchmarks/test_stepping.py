"""Models that are timed side by side compute the same; GGUF has every weight, where llama.cpp looks for it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmark_scripts import load_script
from deepfuse.blocks.config import RopeScaling
from deepfuse.profiling.bench import Bench
from deepfuse.profiling.bench_results import Results
from deepfuse.runtime.save import save_checkpoint
from tiny_checkpoint import TINY, model_of

stepping = load_script("stepping")
gguf_export = load_script("gguf_export")
SHIPPED = Path(__file__).parents[2] / "models" / "v3-tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    torch.manual_seed(0)
    save_checkpoint(model_of(replace(TINY, num_nextn_predict_layers=0)), path)
    return path


def test_steps_and_prefills_are_those_of_one_model(folder: Path) -> None:
    ours = stepping.Ours(folder, torch.float32, 64, compile=False)
    theirs = stepping.Transformers(folder, torch.float32, 64, compiled=False)
    for context in (3, 17):
        calls = {"ours": ours.steps(context), "theirs": theirs.steps(context)}
        for _ in range(3):  # each call begins at the same place
            assert stepping.disagreement(calls, torch.float32) is None
        ours.release()
    prefill = ours.prefill(20)
    assert stepping.disagreement({"ours": prefill, "theirs": theirs.prefill(20)}, torch.float32) is None
    other = {"ours": prefill, "theirs": theirs.steps(17)}
    assert "theirs and ours differ by " in stepping.disagreement(other, torch.float32)
    ours.release()
    assert ours.model.engine.cache.free_pages == len(ours.model.engine.cache.layers[0]) - 1


def test_the_static_cache_of_a_compiled_peer_is_read_where_the_step_is(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
    compiled = stepping.Transformers(folder, torch.float32, 64, compiled=True)
    eager = stepping.Transformers(folder, torch.float32, 64, compiled=False)
    calls = {"eager": eager.steps(17), "compiled": compiled.steps(17)}
    for _ in range(2):
        assert stepping.disagreement(calls, torch.float32) is None


def test_prompts_are_the_same_and_of_many_tokens() -> None:
    prompt = stepping.prompt(512, 4096)
    assert prompt == stepping.prompt(512, 4096) != stepping.prompt(512, 4096, 1) and len(set(prompt)) > 400
    assert set(stepping.prompt(512, 7)) == set(range(7))


def test_what_disagrees_is_left_out_with_its_reason() -> None:
    cpu = load_script("cpu")
    bench = Bench(Results(suite="cpu", command="", device={"kind": "cpu"}, versions={}))
    ones = torch.ones(3)
    cpu.compared(bench, "decode", "float32", {"ours": lambda: ones, "theirs": lambda: 2 * ones})
    assert "theirs and ours differ by 1 " in bench.results.left_out["decode, float32"] and not bench.results.rows
    cpu.compared(bench, "decode", "float32", {"ours": lambda: ones, "theirs": lambda: ones.clone()})
    assert bench.results.row("decode, float32") and not bench.results.left_out


def test_training_steps_begin_at_the_same_loss(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(stepping, "LENGTH", 16)
    model = model_of(replace(TINY, num_nextn_predict_layers=0))
    ours = stepping.our_training(model, torch.float32, compile=False)
    theirs = stepping.transformers_training(folder, torch.float32, compiled=False)
    first = ours(), theirs()
    # random weights know nothing: all tokens are as likely
    assert first == (pytest.approx(math.log(TINY.vocab_size), rel=0.1),) * 2
    assert math.isfinite(theirs()) and math.isfinite(ours())


def test_gguf_has_every_weight_once() -> None:
    config = gguf_export.read_config(SHIPPED)
    stored = load_file(SHIPPED / "model.safetensors")
    named = dict(gguf_export.tensors(config, stored))
    main = {name: t for name, t in stored.items() if f"layers.{config.num_hidden_layers}." not in name}
    assert sum(t.numel() for t in named.values()) == sum(t.numel() for t in main.values())
    # a head's keys as they are absorbed into the query, its values as they are applied to the mix
    latent = torch.randn(config.kv_lora_rank)
    width = config.qk_nope_head_dim + config.v_head_dim
    expanded = stored["model.layers.2.self_attn.kv_b_proj.weight"].float()[3 * width : 4 * width] @ latent
    k, v = named["blk.2.attn_k_b.weight"][3].float(), named["blk.2.attn_v_b.weight"][3].float()
    torch.testing.assert_close(torch.cat((latent @ k, v @ latent)), expanded)
    assert torch.equal(named["blk.4.ffn_up_exps.weight"][5], stored["model.layers.4.mlp.experts.5.up_proj.weight"])


def test_gguf_has_the_tokens_and_the_sizes() -> None:
    config = gguf_export.read_config(SHIPPED)
    keys = gguf_export.keys(config)
    assert keys["deepseek2.attention.key_length"] == 80 and keys["deepseek2.attention.key_length_mla"] == 48
    assert keys["deepseek2.expert_gating_func"] == 2 and keys["deepseek2.attention.head_count_kv"] == 1
    vocabulary = gguf_export.vocabulary(SHIPPED, config)
    assert len(vocabulary["tokenizer.ggml.tokens"]) == len(set(vocabulary["tokenizer.ggml.tokens"])) == 4096
    assert vocabulary["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 3, 1]
    assert all(merge.count(" ") == 1 for merge in vocabulary["tokenizer.ggml.merges"])


@pytest.mark.parametrize(
    "change",
    [{"rope_scaling": RopeScaling(factor=2.0, original_max_position_embeddings=8)}, {"n_routed_experts": None}],
)
def test_gguf_refuses_what_it_does_not_write(change: dict) -> None:
    with pytest.raises(ValueError, match="gguf_export: want "):
        gguf_export.keys(replace(TINY, **change))
