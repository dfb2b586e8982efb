"""What build takes and what it makes of it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import deepfuse as df
from deepfuse.blocks.model import CausalLM
from deepfuse.runtime import build as build_module
from deepfuse.runtime import source
from deepfuse.runtime.checkpoint import save_checkpoint
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
    monkeypatch.setitem(source.PRESETS, "smallest", lambda: ONE_LAYER)
    model = build("smallest")
    assert model.config == ONE_LAYER and model.report.model == "smallest"


def test_a_preset_that_comes_with_weights(monkeypatch, tmp_path):
    monkeypatch.setitem(source.PRESETS, "shipped", lambda: CONFIG)
    monkeypatch.setattr(source, "SHIPPED", tmp_path)
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


# what it writes


def test_a_saved_model_is_the_model(tmp_path):
    model = tiny_model()
    model.save(tmp_path / "copy")
    again = build(tmp_path / "copy")
    assert torch.equal(again(IDS), model(IDS))
    assert again.tokenizer.encode("the lazy dog") == model.tokenizer.encode("the lazy dog")


def test_shared_models_were_left_alone():
    assert tiny_model().report.recompiles == 0
    assert tiny_model().engine.cache.free_pages == MAX_BATCH_SIZE * MAX_SEQ_LEN // 64


def test_passes_are_verified(one_layer):
    assert build(random_weights(ONE_LAYER), verify=True).report.matches() == one_layer.report.matches()
    # whose weights lie side by side
    assert build(ONE_LAYER, verify=True).report.matches()["merge_projections"] == 4

    @df.graph_pass(stage="semantic", kind="reassociating")
    def drop_norms(graph):
        nodes = graph.find_nodes(op="call_function", target=torch.ops.deepfuse.rms_norm.default)
        for node in nodes:
            node.replace_all_uses_with(node.args[0])
        return len(nodes)

    with pytest.raises(RuntimeError, match=r"pass drop_norms \(reassociating\) changes values"):
        build(random_weights(ONE_LAYER), verify=True, passes=drop_norms)
