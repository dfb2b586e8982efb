"""``build(quantize=...)``: FP8 made of other weights, FP8 checkpoints kept as they are, and FP8 trained."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import deepfuse as df
from deepfuse.blocks.fp8 import E4M3, FP8Experts, FP8Linear, to_fp8
from deepfuse.blocks.model import CausalLM
from deepfuse.ops.dequantize import dequantize
from deepfuse.runtime.build_key import module_key
from deepfuse.runtime.checkpoint import save_checkpoint, stored_in_fp8
from deepfuse.runtime.config_json import read_config
from deepfuse.runtime.load_model import load_model, modules_in_fp8
from deepfuse.runtime.quantize_checkpoint import quantize_checkpoint
from deepfuse.runtime.shards import SINGLE
from deepfuse.runtime.trainer import Trainer
from deepfuse.runtime.training import Training
from fp8_checkpoint import WIDE, write_fp8
from tiny_checkpoint import TINY, assert_same_state, change, load, model_of
from tiny_model import CONFIG, ONE_LAYER, build, checkpoint, eager_logits, random_weights, write_checkpoint

# of functions with a gradient of their own, by torch 2.11's Dynamo
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
IDS = [5, 9, 2, 40, 7, 130]


@functools.cache
def built(quantize: str | None) -> Any:
    """The model of ``checkpoint()``; each pass is checked alone: it changes no value, and none fails."""
    return build(checkpoint(), quantize=quantize, verify=quantize is not None, strict=True)


def loaded(folder: Path, quantize: str | None = "auto") -> CausalLM:
    """What ``build`` loads, without graphs."""
    config, warnings = read_config(folder), []
    names = modules_in_fp8(config, folder, quantize, warnings)
    return load_model(config, folder, torch.device("cpu"), torch.float32, 0, in_fp8=names, activations=True)


def fp8_modules(model: CausalLM) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, FP8Linear | FP8Experts)}


@pytest.fixture(scope="module")
def fp8_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8 as this library writes it."""
    folder = tmp_path_factory.mktemp("fp8") / "model"
    built("fp8").save(folder)
    return folder


@pytest.mark.parametrize("quantize", ["fp8", "fp8_weights"])
def test_graphs_compute_what_the_modules_say(quantize: str) -> None:
    model = built(quantize)
    assert model.report.quantized.startswith(f"{quantize}: ")
    with torch.no_grad():
        (logits,) = model(torch.tensor([IDS]))
    want = eager_logits(model, IDS)
    # a sum in another order may turn a rounding to FP8: an eighth of a number at most (passes/check_values.py)
    assert (logits - want).abs().max() <= want.abs().max() / 8
    matches = model.report.matches()
    assert (matches["fuse_quantized_matmul"] > 0) == (quantize == "fp8")
    assert (matches["fuse_quantized_experts"] > 0) == (quantize == "fp8")


def test_fp8_is_near_what_was_quantized() -> None:
    plain, fp8, weights = (eager_logits(built(q), IDS) for q in (None, "fp8", "fp8_weights"))
    errors = [(x - plain).norm() / plain.norm() for x in (fp8, weights)]
    # a rounding to E4M3 errs by 2**-4 at most, by 2.6% in the root mean square; a few layers of them
    assert 0.002 < errors[1] < errors[0] < 0.15


def test_every_site_of_a_layer_is_fused() -> None:
    model = built("fp8")
    for graph in model.report.journal.graphs:
        entries = {entry.name: entry.rewrites for entry in graph.passes}
        # a dense layer: q_a, q_b, kv_a, kv_b, o, gate, up, down; a sparse one has three of shared experts, and experts.
        # Decode absorbs kv_b, which is then no product of activations
        assert entries["fuse_quantized_matmul"] == (16 if graph.name == "prefill" else 14), graph.name
        assert entries["fuse_quantized_experts"] == 2
    assert "q_b_proj" in model.explain("fuse_quantized_matmul")


def test_decoding_continues_a_prefill() -> None:
    model = built("fp8")
    text = model.generate([IDS], max_new_tokens=12, temperature=0.0)
    assert text == model.generate([IDS], max_new_tokens=12, temperature=0.0)
    assert model.report.recompiles == 0


def test_fp8_checkpoints_stay_fp8(fp8_checkpoint: Path) -> None:
    stored = load_file(fp8_checkpoint / SINGLE)
    model = build(fp8_checkpoint)
    assert model.report.quantized.startswith("fp8: ")
    state = model.engine.model.state_dict()
    for name, values in stored.items():
        if values.dtype == E4M3 and ".experts." not in name:
            assert state[name].dtype == E4M3
            assert torch.equal(state[name].view(torch.uint8), values.view(torch.uint8))
            assert torch.equal(state[name + "_scale_inv"], stored[name + "_scale_inv"])
    experts = [n for n in state if n.endswith("experts.gate_up_proj")]
    assert experts
    assert {state[n].dtype for n in experts} == {E4M3}
    # the same numbers, dequantized as they are loaded
    plain, kept = build(fp8_checkpoint, quantize=None), build(fp8_checkpoint, quantize="fp8_weights")
    assert plain.report.quantized == ""
    assert kept.report.weight_bytes < plain.report.weight_bytes
    torch.testing.assert_close(eager_logits(kept, IDS), eager_logits(plain, IDS), atol=1e-5, rtol=1e-5)


def test_fp8_is_saved_and_loaded_without_loss(fp8_checkpoint: Path, tmp_path: Path) -> None:
    model = loaded(fp8_checkpoint)
    save_checkpoint(model, tmp_path / "again")
    assert_same_state(load_file(tmp_path / "again" / SINGLE), load_file(fp8_checkpoint / SINGLE))
    assert_same_state(model.state_dict(), built("fp8").engine.model.state_dict())
    # what is loaded dequantized is not FP8, and is not said to be when it is written
    save_checkpoint(load(fp8_checkpoint), tmp_path / "plain")
    assert not {t.dtype for t in load_file(tmp_path / "plain" / SINGLE).values()} & {E4M3}
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_a_quantized_checkpoint_is_what_a_build_makes(tmp_path: Path) -> None:
    quantize_checkpoint(checkpoint(), tmp_path / "fp8")
    assert_same_state(loaded(tmp_path / "fp8").state_dict(), built("fp8").engine.model.state_dict())


def test_a_checkpoint_partly_in_fp8_is_kept_so(tmp_path: Path) -> None:
    plain, name = load_file(checkpoint() / SINGLE), "model.layers.0.self_attn.o_proj.weight"
    built("fp8").save(tmp_path)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = plain[name]
        del tensors[name + "_scale_inv"]

    change(tmp_path, edit)
    kept = loaded(tmp_path)
    parts = fp8_modules(built("fp8").engine.model).keys() - fp8_modules(kept).keys()
    assert parts == {name.removesuffix(".weight")}
    assert torch.equal(kept.state_dict()[name], plain[name])
    assert stored_in_fp8(tmp_path, kept.config)[1] == set()
    # asked for FP8, it is quantized
    assert name.removesuffix(".weight") in fp8_modules(loaded(tmp_path, "fp8"))


def test_blocks_of_another_size_are_dequantized(tmp_path: Path) -> None:
    built("fp8").save(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    # all weights fit in one block of either size
    config["quantization_config"]["weight_block_size"] = [512, 512]

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("_scale_inv")]:
            tensors[name] = tensors[name][:1, :1].contiguous()

    change(tmp_path, edit)
    path.write_text(json.dumps(config))
    model = build(tmp_path)
    assert not fp8_modules(model.engine.model)
    (note,) = model.report.warnings
    assert note.startswith("FP8 weights of 17 modules are dequantized: their blocks are (512, 512), not (128, 128) (")


def test_experts_of_which_some_are_in_fp8_are_dequantized_and_named(tmp_path: Path) -> None:
    plain, prefix = load_file(checkpoint() / SINGLE), "model.layers.1.mlp.experts"
    built("fp8").save(tmp_path)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{prefix}.3.up_proj.weight"
        tensors[name] = plain[name]
        del tensors[name + "_scale_inv"]

    change(tmp_path, edit)
    notes: list[str] = []
    assert prefix not in modules_in_fp8(read_config(tmp_path), tmp_path, "auto", notes)
    assert notes == [
        f"FP8 weights of 1 modules are dequantized: some of their weights are not in FP8 ({prefix})",
    ]
    assert prefix in fp8_modules(loaded(tmp_path, "fp8"))


def test_weights_in_other_blocks_are_quantized_anew(tmp_path: Path) -> None:
    """192 rows have two scales in blocks of 96 and of 128: shapes alone do not tell them apart."""
    save_checkpoint(model_of(WIDE), tmp_path)
    write_fp8(tmp_path, (96, 96))
    plain, fp8 = loaded(tmp_path, None).state_dict(), loaded(tmp_path, "fp8_weights")
    assert len(fp8_modules(fp8)) > 10
    for name, module in fp8_modules(fp8).items():
        if isinstance(module, FP8Linear):
            got = dequantize(module.weight, module.weight_scale_inv, 128, 128, torch.float32)
            want = plain[name + ".weight"]
            # random codes of E4M3 rounded to E4M3 with another scale
            assert (got - want).norm() < 0.04 * want.norm(), name


def test_verify_takes_what_absorption_does_for_another_rounding() -> None:
    """It leaves the rounding of the latent out, in every layer."""
    config = replace(CONFIG, hidden_size=192, q_lora_rank=128, kv_lora_rank=136, first_k_dense_replace=2)
    model = random_weights(config)
    to_fp8(model)
    assert build(model, verify=True).report.matches()["absorb_mla"] == 2


@pytest.mark.parametrize("seed", [1, 2])
def test_verify_takes_no_token_at_another_expert_for_a_fault(seed: int) -> None:
    """These weights send one there, for another rounding in the layer before."""
    model = random_weights(CONFIG, seed)
    to_fp8(model)
    matches = build(model, max_batch_size=2, max_seq_len=64, verify=True, strict=True).report.matches()
    assert matches["absorb_mla"] > 0


def test_random_weights_and_modules() -> None:
    config = replace(CONFIG, num_hidden_layers=1)
    random = load_model(
        config,
        None,
        torch.device("cpu"),
        torch.bfloat16,
        0,
        in_fp8=modules_in_fp8(config, None, "fp8", []),
        activations=True,
    )
    assert len(fp8_modules(random)) == 8
    assert random.model.norm.weight.dtype == torch.bfloat16
    own = random_weights(ONE_LAYER)
    with pytest.raises(ValueError, match="want quantize 'auto' with a CausalLM, .* got 'fp8'.*to_fp8"):
        build(own, quantize="fp8")
    to_fp8(own)
    model = build(own)
    assert model.report.quantized.startswith("fp8: ")
    assert model.report.dtype == "float32"
    model.generate([IDS], max_new_tokens=2)


@pytest.mark.parametrize("quantize", ["int8", True, ["fp8"]])
def test_an_unknown_kind_is_refused(quantize: Any) -> None:
    with pytest.raises(ValueError, match=r"build: want quantize out of 'auto', None, 'fp8', 'fp8_weights', got"):
        build(checkpoint(), quantize=quantize)


def test_fp8_and_other_weights_have_graphs_of_their_own() -> None:
    keys = {module_key(built(q).engine.model) for q in (None, "fp8", "fp8_weights")}
    assert len(keys) == 3


CORPUS = np.tile(np.arange(7, dtype=np.uint16) * 5, 40)
TRAINING = Training(steps=20, batch_size=4, seq_len=16, lr=1e-2, warmup_steps=3, dtype=torch.float32)


def trainer(fp8: bool, **changes: Any) -> Trainer:
    model = model_of(replace(TINY, num_hidden_layers=2))
    model.initialize(seed=1)
    return Trainer(model.train(), replace(TRAINING, **changes), compile=False, fp8=fp8, how={"strict": True})


@pytest.mark.parametrize("saved", ["high", "fp8"])
def test_training_in_fp8_learns_as_fast(saved: Any, tmp_path: Path) -> None:
    losses = []
    for one in (trainer(False), trainer(True, fp8_saved=saved)):
        losses.append([one.train_step(CORPUS) for _ in range(TRAINING.steps)])
    plain, fp8 = losses
    assert fp8 != plain
    # from 4.2 nats to less than a half; FP8 costs a few hundredths on the way
    assert plain[-1] < plain[0] / 2
    assert abs(fp8[-1] - plain[-1]) < 0.1 * plain[0]


def test_the_three_products_of_a_layer_are_fused() -> None:
    one = trainer(True)
    one.train_step(CORPUS)
    assert not any(entry.failure for graph in one.runner.journal.graphs for entry in graph.passes)
    linears = 2 * 5 + 3 + 3  # attention twice, a dense layer, shared experts
    counts = [{e.name: e.rewrites for e in graph.passes} for graph in one.runner.journal.graphs]
    # uncompiled, forward and backward come apart
    assert [c["fuse_quantized_matmul"] for c in counts] == [linears, 2 * linears]
    assert [c["fuse_quantized_experts"] for c in counts] == [2, 2]
    assert [c["fuse_quantized_wgrad"] for c in counts] == [0, 2]
    assert "fp8_matmul" in one.runner.journal.graphs[1].snapshots["after:fuse_quantized_matmul"]


def test_masters_are_not_held_twice() -> None:
    one = trainer(True, dtype=torch.bfloat16)
    master, working = (m.model.layers[0].self_attn.o_proj.weight for m in (one.model, one.compute))
    assert master.data_ptr() == working.data_ptr()
    assert working.dtype == torch.float32
    assert one.compute.model.embed_tokens.weight.dtype == torch.bfloat16
    before = working.detach().clone()
    one.train_step(CORPUS)
    assert not torch.equal(working, before)


def test_training_refuses_weights_alone() -> None:
    with pytest.raises(ValueError, match="want quantize 'fp8' to train in FP8, got 'fp8_weights'"):
        df.build(TINY, training=TRAINING, quantize="fp8_weights", compile=False)
    with pytest.raises(ValueError, match=r"training: want fp8_saved out of \('high', 'fp8'\), got 'low'"):
        replace(TRAINING, fp8_saved="low").check()
    trained = df.build(TINY, training=TRAINING, quantize="fp8", compile=False, device="cpu")
    assert len(trained.copied) < len(trained.pairs)


def test_training_wants_weights_in_full_precision() -> None:
    model = random_weights(ONE_LAYER)
    to_fp8(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"want a CausalLM in full precision to train, got one with FP8 weights"):
        df.build(model, training=TRAINING, compile=False)
    assert_same_state(model.state_dict(), before)


def test_training_takes_providers() -> None:
    forced = {"fp8_matmul": "reference"}
    trained = df.build(TINY, training=TRAINING, quantize="fp8", compile=False, device="cpu", providers=forced)
    assert trained.runner.settings["providers"] == forced


def test_what_a_module_cannot_be_given_is_refused() -> None:
    linear = torch.nn.Linear(4, 4)
    for options in ({"quantize": "fp8"}, {"quantize": "int4"}, {"training": TRAINING}):
        with pytest.raises(ValueError, match="build: want"):
            df.build(linear, compile=False, **options)
    model = random_weights(ONE_LAYER)
    to_fp8(model)
    with pytest.raises(
        ValueError, match="want FP8 weights in float8_e4m3fn with float32 scales, got .* in torch.bfloat16"
    ):
        build(model.bfloat16())


def test_a_wide_expert_is_no_wider_on_disk(tmp_path: Path) -> None:
    """Half of ``gate_up_proj`` is filled up to a block in memory only."""
    wide = replace(CONFIG, moe_intermediate_size=136)
    write_checkpoint(tmp_path / "plain", config=wide)
    save_checkpoint(loaded(tmp_path / "plain", "fp8"), tmp_path / "fp8")
    stored = load_file(tmp_path / "fp8" / SINGLE)
    prefix = "model.layers.1.mlp.experts.0"
    assert stored[f"{prefix}.up_proj.weight"].shape == (136, 32)
    assert stored[f"{prefix}.up_proj.weight_scale_inv"].shape == (2, 1)
    assert loaded(tmp_path / "fp8").model.layers[1].mlp.experts.gate_up_proj.shape == (8, 512, 32)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    model = random_weights(CONFIG)
    model.model.layers[0].self_attn.o_proj.weight.data[3, 4] = float("nan")
    save_checkpoint(model, tmp_path / "nan")
    with pytest.raises(ValueError, match=r"NaN or infinite in torch.float32:\s+model.layers.0.self_attn.o_proj.weight"):
        build(tmp_path / "nan", quantize="fp8")
    built("fp8").save(tmp_path / "fp8")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.o_proj.weight"].view(torch.uint8)[0, 0] = 0x7F

    change(tmp_path / "fp8", edit)
    with pytest.raises(ValueError, match=r"NaN or infinite in torch.float32:\s+model.layers.0.self_attn.o_proj.weight"):
        build(tmp_path / "fp8")
