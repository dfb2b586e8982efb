"""What build takes, what it makes of it, what it says of that, and what it refuses before it begins."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import deepfuse as df
from deepfuse.blocks.model import CausalLM
from deepfuse.ir.printer import run_text
from deepfuse.runtime import build as build_module
from deepfuse.runtime import requirements
from deepfuse.runtime.checkpoint import CheckpointError, save_checkpoint
from tiny_model import (
    CONFIG,
    MAX_BATCH_SIZE,
    MAX_SEQ_LEN,
    ONE_LAYER,
    build,
    checkpoint,
    eager_logits,
    random_weights,
    tiny_model,
    write_checkpoint,
)

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def one_layer():
    """A model built from a module."""
    return build(random_weights(ONE_LAYER))


def notes(model, pass_name="lower"):
    entries = [e for graph in model.report.journal.graphs for e in graph.passes if e.name == pass_name]
    return [note for entry in entries for note in entry.notes]


# what it takes


def test_a_checkpoint():
    model = tiny_model()
    assert model.config.num_hidden_layers == 2 and model.tokenizer is not None
    torch.testing.assert_close(model(IDS)[0], eager_logits(model, IDS[0].tolist()), atol=1e-4, rtol=0.0)
    expected = random_weights(CONFIG).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.engine.model.state_dict().items())
    assert model.report.model == str(checkpoint())


def test_a_configuration_with_random_weights():
    model = build(ONE_LAYER, seed=3)
    expected = CausalLM(ONE_LAYER)
    expected.initialize(3)
    assert torch.equal(model.engine.model.model.embed_tokens.weight, expected.model.embed_tokens.weight)
    assert model.report.model == "Config" and model.tokenizer is None
    assert model(IDS).isfinite().all()


def test_a_module_as_it_is(one_layer):
    causal_lm = random_weights(ONE_LAYER)
    assert one_layer.report.model == "CausalLM"
    assert one_layer.config == ONE_LAYER
    want = causal_lm(IDS[0], torch.arange(5), torch.tensor([0, 5], dtype=torch.int32))
    torch.testing.assert_close(one_layer(IDS)[0], want.detach(), atol=1e-4, rtol=0.0)


def test_a_module_in_training_mode_is_put_out_of_it():
    assert not build(random_weights(ONE_LAYER).train()).engine.model.training


def test_a_module_of_another_kind():
    block = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    compiled = df.build(block, device="cpu", compile=False)
    x = torch.randn(3, 6)
    torch.testing.assert_close(compiled(x), block(x))
    assert [graph.name for graph in compiled.journal.graphs]
    compiled(x).sum().backward()
    assert block[0].weight.grad.abs().sum() > 0


def test_a_preset_by_name(monkeypatch):
    monkeypatch.setitem(build_module.PRESETS, "smallest", lambda: ONE_LAYER)
    model = build("smallest")
    assert model.config == ONE_LAYER and model.report.model == "smallest"


def test_a_preset_that_comes_with_weights(monkeypatch, tmp_path):
    monkeypatch.setitem(build_module.PRESETS, "shipped", lambda: CONFIG)
    monkeypatch.setattr(build_module, "SHIPPED", tmp_path)
    write_checkpoint(tmp_path / "shipped", config=ONE_LAYER)
    model = build("shipped")
    assert model.source == tmp_path / "shipped" and model.tokenizer is not None


def test_inference_mode_of_the_caller_does_not_matter():
    with torch.inference_mode():
        model = build(ONE_LAYER)
    assert len(model.generate([5, 6], max_new_tokens=3, stop_token_ids=())) == 3
    assert model.report.recompiles == 0


# how


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float16"])
def test_dtypes(dtype):
    model = build(checkpoint(), dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    dtypes = {name: tensor.dtype for name, tensor in model.engine.model.state_dict().items()}
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert dtypes.pop(bias) == torch.float32 and set(dtypes.values()) == {wanted}
    assert {layer.dtype for layer in model.engine.cache.layers} == {wanted}
    assert model.report.dtype == str(wanted).removeprefix("torch.")
    assert model(IDS).dtype == torch.float32
    # the narrow dtypes have 8 and 11 bits
    expected = tiny_model()(IDS)
    assert 0 < (model(IDS) - expected).abs().mean() < 0.05 * expected.std()


def test_the_dtype_of_a_checkpoint_is_kept(tmp_path):
    causal_lm = random_weights(ONE_LAYER).bfloat16()
    save_checkpoint(causal_lm, tmp_path)
    assert build(tmp_path).report.dtype == "bfloat16"
    assert tiny_model().report.dtype == "float32"


def test_uncompiled_is_a_mode_of_its_own(one_layer):
    assert not one_layer.report.compiled and not one_layer.report.warm
    assert "(uncompiled)" in str(one_layer.report)
    # the same passes ran
    assert one_layer.report.matches()["lower"] > 0 and one_layer.report.matches()["absorb_mla"] == 1


def test_uncompiled_touches_no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPFUSE_CACHE_DIR", str(tmp_path / "cache"))
    build(ONE_LAYER)
    assert not (tmp_path / "cache").exists()


def test_passes_can_be_left_out(one_layer):
    model = build(random_weights(ONE_LAYER), passes=df.passes.Pipeline(()))
    assert model.report.matches() == {}
    expected = one_layer.generate([5, 6, 7], max_new_tokens=10, stop_token_ids=())
    assert model.generate([5, 6, 7], max_new_tokens=10, stop_token_ids=()) == expected


def test_providers_can_be_forced(one_layer):
    model = build(random_weights(ONE_LAYER), providers={"linear": "reference", "mla_decode": "reference"})
    assert any("linear -> matvec" in note for note in notes(one_layer))
    assert not any("linear -> matvec" in note for note in notes(model))
    assert any("mla_decode -> reference" in note for note in notes(model))
    torch.testing.assert_close(model(IDS), one_layer(IDS), atol=1e-4, rtol=0.0)


def test_the_length_is_that_of_the_model_up_to_a_limit(monkeypatch):
    made = []

    class Stop(Exception):
        pass

    def note(*_, **room):
        made.append(room["max_seq_len"])
        raise Stop

    monkeypatch.setattr(build_module, "cache_bytes", note)
    for positions in (512, 163840):
        with pytest.raises(Stop):
            df.build(replace(ONE_LAYER, max_position_embeddings=positions), device="cpu", compile=False)
    assert made == [512, 4096]


# what it says

FIELDS = {
    "model",
    "device",
    "dtype",
    "parameters",
    "active_parameters",
    "weight_bytes",
    "cache_bytes_per_token",
    "mha_bytes_per_token",
    "compiled",
    "warm",
    "build_seconds",
    "compile_seconds",
    "graphs_at_build",
    "warnings",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "graph_breaks",
    "recompiles",
    "graphs",
}


def test_the_report_as_json():
    data = json.loads(json.dumps(tiny_model().report.to_json()))
    assert set(data) == FIELDS
    weights = sum(tensor.numel() for tensor in tiny_model().engine.model.state_dict().values())
    assert data["parameters"] == weights > data["active_parameters"] > weights // 2
    assert data["weight_bytes"] == 4 * weights
    # per layer a latent of 24 and a rotary key of 8, beside 4 heads of 20 + 10
    assert data["cache_bytes_per_token"] == 2 * 32 * 4 and data["mha_bytes_per_token"] == 2 * 120 * 4
    assert (data["device"], data["dtype"], data["compiled"]) == ("cpu", "float32", False)
    assert [graph["name"] for graph in data["graphs"]] == ["prefill", "decode_1", "decode_2", "decode_4"]
    assert data["graphs_at_build"] == 4 and data["graph_breaks"] == data["recompiles"] == 0
    assert data["build_seconds"] > data["compile_seconds"] > 0
    entry = next(p for p in data["graphs"][1]["passes"] if p["name"] == "absorb_mla")
    assert (entry["name"], entry["stage"], entry["kind"], entry["rewrites"]) == (
        "absorb_mla",
        "semantic",
        "reassociating",
        2,
    )
    assert entry["milliseconds"] > 0 and "predicted" in entry["notes"][0]
    assert entry["op_changes"]["deepfuse.mla_decode.default"] == 2


def test_the_report_as_text():
    text = str(tiny_model().report)
    for words in (
        "absorb_mla",
        "lower",
        "decode_4",
        "4, 0 breaks, 0 recompiles",
        "256 bytes per token, 3.8x less than multi-head",
        "2 sites: absorbed",
    ):
        assert words in text, words
    assert max(len(line) for line in text.splitlines()) <= 120


def test_each_site_of_a_pass_is_explained():
    text = tiny_model().explain("absorb_mla")
    assert "prefill: 0 rewrites" in text and "decode_4: 2 rewrites" in text
    assert "layers.1.self_attn: absorbed; predicted" in text
    with pytest.raises(ValueError, match=r"explain: want a pass out of .*absorb_mla.*, got 'fuse'"):
        tiny_model().explain("fuse")


def test_graphs_are_python(one_layer):
    before, after = (one_layer.graph(f"{when}:absorb_mla", "decode_1") for when in ("before", "after"))
    assert "torch.ops.deepfuse.mla_attention.default(" in before and "mla_decode" not in before
    assert "torch.ops.deepfuse.mla_decode.default(" in after and "deepfuse.mla_attention" not in after
    assert callable(run_text(one_layer.graph("after:lower", "prefill")))
    assert one_layer.graph("before:lower") == one_layer.graph("before:lower", "prefill")
    with pytest.raises(
        ValueError, match=r"graph: want a stage out of \['after:absorb_mla', .* got 'after:fuse' of None"
    ):
        one_layer.graph("after:fuse")
    with pytest.raises(
        ValueError, match=r"of a graph out of \['prefill', 'decode_1'\], got 'after:lower' of 'decode_8'"
    ):
        one_layer.graph("after:lower", "decode_8")


def test_no_op_is_left_to_chance():
    """After lower, each op of the dialect is inlined or names its provider."""
    for graph in tiny_model().report.journal.graphs:
        assert "torch.ops.deepfuse." in graph.snapshots["before:lower"]
        for line in graph.snapshots["after:lower"].splitlines():
            assert "torch.ops.deepfuse." not in line or ".default(" not in line, line


def test_graphs_name_their_blocks():
    text = tiny_model().graph("before:lower", "decode_1")
    assert "model.layers.1.mlp" in text and "model.layers.0.self_attn" in text


# what it writes


def test_a_saved_model_is_the_model(tmp_path):
    model = tiny_model()
    model.save(tmp_path / "copy")
    again = build(tmp_path / "copy")
    assert torch.equal(again(IDS), model(IDS))
    assert again.tokenizer.encode("the lazy dog") == model.tokenizer.encode("the lazy dog")


# what it refuses

REFUSED = {
    "unknown preset": (
        lambda: df.build("v4"),
        FileNotFoundError,
        "build: want a checkpoint directory or a preset out of v3-tiny, .*, got 'v4'",
    ),
    "unknown path": (lambda: df.build(Path("/nowhere/at all")), FileNotFoundError, "got '/nowhere/at all'"),
    "a file": (lambda: df.build(__file__), FileNotFoundError, "want a checkpoint directory or a preset"),
    "dtype": (
        lambda: build(ONE_LAYER, dtype="float8"),
        ValueError,
        "want dtype 'auto', 'float32', 'bfloat16' or 'float16', got 'float8'",
    ),
    "dtype of torch": (lambda: build(ONE_LAYER, dtype=torch.int8), ValueError, "want dtype .* got torch.int8"),
    "no sequences": (lambda: build(ONE_LAYER, max_batch_size=0), ValueError, "want max_batch_size >= 1, got 0"),
    "too long": (
        lambda: build(ONE_LAYER, max_seq_len=513),
        ValueError,
        "want 1 <= max_seq_len <= max_position_embeddings = 512, got 513",
    ),
    "no length": (lambda: build(ONE_LAYER, max_seq_len=0), ValueError, "want 1 <= max_seq_len"),
    "provider of no op": (
        lambda: build(ONE_LAYER, providers={"rms": "triton"}),
        ValueError,
        "want providers for ops out of .*rms_norm.*, got 'rms'",
    ),
    "no such provider": (
        lambda: build(ONE_LAYER, providers={"rms_norm": "cuda"}),
        ValueError,
        "want a provider of rms_norm out of reference, triton, got 'cuda'",
    ),
    "pass": (
        lambda: build(ONE_LAYER, passes=df.passes.default().without("lowr")),
        ValueError,
        "passes: want a name out of lower, got 'lowr'",
    ),
    "device": (lambda: build(ONE_LAYER, device="tpu"), ValueError, "want device 'auto', 'cpu' or 'cuda.*, got 'tpu'"),
    "device not there": (
        lambda: build(ONE_LAYER, device="cuda:99"),
        ValueError,
        r"want a device that is there \(\d+ CUDA devices are\), got 'cuda:99'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_built_is_refused(name, monkeypatch):
    def made(*_, **__):
        raise AssertionError("weights were made before the check")

    monkeypatch.setattr(build_module, "_weights", made)
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        df.build(tmp_path)


def test_too_little_memory_is_seen_before_anything_is_made(monkeypatch):
    def made(*_, **__):
        raise AssertionError("weights were made before the check")

    monkeypatch.setattr(build_module, "_weights", made)
    monkeypatch.setattr(requirements, "available_memory", lambda: 1 << 20)
    with pytest.raises(
        MemoryError, match=r"build: want 0\.\d\d GiB on cpu \(0\.\d\d for weights, .*, got 0\.00 GiB free"
    ):
        build(replace(ONE_LAYER, vocab_size=5000, hidden_size=512))


def test_memory_of_a_model_that_is_there_is_not_asked_for_again(monkeypatch):
    asked = []
    monkeypatch.setattr(build_module, "check_memory", lambda device, weights, cache: asked.append((weights, cache)))
    build(random_weights(ONE_LAYER))
    # two pages of 64 tokens with 32 numbers of 4 bytes
    assert asked == [(0, 2 * 64 * 32 * 4)]


def test_a_machine_without_headers_runs_uncompiled(monkeypatch):
    monkeypatch.setattr(requirements.sysconfig, "get_path", lambda _: "/nowhere")
    with pytest.warns(UserWarning, match="build: runs uncompiled: no Python headers in /nowhere: install python3-dev"):
        model = build(ONE_LAYER, compile=True)
    assert not model.report.compiled and "no Python headers" in model.report.warnings[0]
    assert "warning: runs uncompiled: no Python headers" in str(model.report)
    assert model(IDS).isfinite().all()


# the key of what is kept


def key_of(**changes):
    settings = {
        "pipeline": df.passes.default(),
        "providers": {},
        "config": ONE_LAYER,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "max_batch_size": 1,
        **changes,
    }
    room = {"max_batch_size": settings["max_batch_size"], "max_seq_len": 64}
    pass_settings = {"providers": settings["providers"], "device": "row", "max_seq_len": 64}
    return build_module._key(
        settings["pipeline"], pass_settings, settings["config"], settings["dtype"], settings["device"], room
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"pipeline": df.passes.default().without("absorb_mla")},
        {"providers": {"rms_norm": "reference"}},
        {"config": replace(ONE_LAYER, rope_theta=500.0)},
        {"dtype": torch.bfloat16},
        {"device": torch.device("cuda")},
        {"max_batch_size": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_a_graph_changes_the_key(changes):
    assert key_of(**changes) != key_of()
    assert key_of() == key_of()


def test_sources_are_part_of_the_key(monkeypatch):
    before = key_of()
    original = build_module.inspect.getsource
    changed = build_module.attention
    monkeypatch.setattr(
        build_module.inspect, "getsource", lambda m: original(m) + ("# changed" if m is changed else "")
    )
    assert key_of() != before


def test_shared_models_were_left_alone():
    assert tiny_model().report.recompiles == 0
    assert tiny_model().engine.cache.free_pages == MAX_BATCH_SIZE * MAX_SEQ_LEN // 64


def test_passes_are_verified(one_layer):
    assert build(ONE_LAYER, verify=True).report.matches() == one_layer.report.matches()

    @df.graph_pass(stage="semantic", kind="reassociating")
    def drop_norms(graph):
        nodes = graph.find_nodes(op="call_function", target=torch.ops.deepfuse.rms_norm.default)
        for node in nodes:
            node.replace_all_uses_with(node.args[0])
        return len(nodes)

    with pytest.raises(RuntimeError, match=r"pass drop_norms \(reassociating\) changes values"):
        build(random_weights(ONE_LAYER), verify=True, passes=drop_norms)
