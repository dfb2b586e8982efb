"""Weights side by side: the same parameters in other places, and graphs for models that lie alike only."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deepfuse as df
from deepfuse.blocks.attention import MLA
from deepfuse.blocks.config import Config
from deepfuse.blocks.fp8 import to_fp8
from deepfuse.blocks.mlp import MLP
from deepfuse.blocks.model import CausalLM
from deepfuse.runtime.checkpoint import load_weights, save_checkpoint
from deepfuse.runtime.weight_layout import groups, lay_side_by_side, layout_key
from tiny_model import CONFIG, ONE_LAYER, build, random_weights, tiny_model, write_checkpoint

WHOLE_BLOCKS = replace(CONFIG, moe_intermediate_size=128)
"""Whose experts FP8 does not pad."""


def memory(model: CausalLM) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def laid(config: Any = CONFIG, seed: int = 0, *, with_experts: bool = False) -> CausalLM:
    model = random_weights(config, seed)
    lay_side_by_side(model, with_experts=with_experts)
    return model


def logits(model: CausalLM, ids: Tensor) -> Tensor:
    return model(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32)).detach()


def test_parameters_stay_what_they_are() -> None:
    before, after = random_weights(CONFIG), laid()
    for (name, a), (other, b) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b) and a.requires_grad == b.requires_grad
    assert memory(before) == memory(after) == sum(p.nbytes for p in after.parameters())


def test_groups_lie_one_behind_the_other() -> None:
    model = laid()
    groups = 0
    for module in model.modules():
        if isinstance(module, MLA):
            first, second = module.q_a_proj.weight, module.kv_a_proj_with_mqa.weight
        elif isinstance(module, MLP):
            first, second = module.gate_proj.weight, module.up_proj.weight
        else:
            continue
        groups += 1
        assert second.data_ptr() == first.data_ptr() + first.nbytes and first.storage_offset() == 0
    assert groups == 4


@pytest.mark.parametrize("fp8", [False, True])
def test_a_shared_expert_lies_behind_the_routed_ones(fp8: bool) -> None:
    model = random_weights(WHOLE_BLOCKS)
    if fp8:
        to_fp8(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    size = memory(model)
    lay_side_by_side(model, with_experts=True)
    assert memory(model) == size
    for name, p in model.named_parameters():
        assert torch.equal(p.view(torch.uint8), before[name].view(torch.uint8)), name
    moe = model.model.layers[1].mlp
    own, stack = moe.shared_experts, moe.experts
    for suffix in ("", "_scale_inv") if fp8 else ("",):
        up = [getattr(stack, f"gate_up_proj{suffix}")]
        up += [getattr(getattr(own, name), f"weight{suffix}") for name in ("gate_proj", "up_proj")]
        down = [getattr(stack, f"down_proj{suffix}"), getattr(own.down_proj, f"weight{suffix}")]
        for first, *behind in (up, down):
            end = first.data_ptr() + first.nbytes
            assert first.storage_offset() == 0
            for p in behind:
                assert p.data_ptr() == end
                end += p.nbytes
            # read as one more expert
            E, rows, columns = first.shape
            whole = torch.as_strided(first, (E + 1, rows, columns), first.stride(), 0)[E]
            assert torch.equal(whole.view(torch.uint8), torch.cat(behind).view(torch.uint8))
    # of the dense layer, as ever
    dense = model.model.layers[0].mlp
    assert dense.up_proj.weight.data_ptr() == dense.gate_proj.weight.data_ptr() + dense.gate_proj.weight.nbytes


@pytest.mark.parametrize(
    ("config", "fp8"),
    [(replace(WHOLE_BLOCKS, n_shared_experts=2), False), (CONFIG, True)],
    ids=["two stacked in one", "FP8 without whole blocks"],
)
def test_what_is_no_further_expert_does_not_lie_so(config: Config, fp8: bool) -> None:
    model = random_weights(config)
    if fp8:
        to_fp8(model)
    names = [name for group in groups(model, with_experts=True) for name in group]
    assert names == [name for group in groups(model, with_experts=False) for name in group]
    assert not any(".experts." in name for name in names) and any(".shared_experts.gate_proj" in name for name in names)


def test_weights_are_loaded_where_they_shall_lie(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", config=WHOLE_BLOCKS)
    with torch.device("meta"):
        model = CausalLM(WHOLE_BLOCKS)
        to_fp8(model)
    together = [*groups(model, with_experts=True)]
    load_weights(model, tmp_path / "model", device="cpu", dtype=torch.float32, together=together)
    places = [p.data_ptr() for p in model.parameters()]
    lay_side_by_side(model, with_experts=True)
    assert [p.data_ptr() for p in model.parameters()] == places
    key = layout_key(model)
    by_themselves = random_weights(WHOLE_BLOCKS)
    to_fp8(by_themselves)
    lay_side_by_side(by_themselves, with_experts=True)
    assert key == layout_key(by_themselves)
    for a, b in zip(model.parameters(), by_themselves.parameters(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_saved_and_loaded_by_name(tmp_path: Path) -> None:
    model = laid(with_experts=True)
    save_checkpoint(model, tmp_path)
    with torch.device("meta"):
        loaded = CausalLM(CONFIG)
    load_weights(loaded, tmp_path, device="cpu", dtype=torch.float32)
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_key_says_who_lies_where() -> None:
    assert layout_key(random_weights(CONFIG)) == ""
    key = layout_key(laid())
    assert key and key == layout_key(laid(seed=1))
    assert key != layout_key(laid(ONE_LAYER))
    moved = laid()
    moved.model.layers[0].self_attn.q_a_proj.weight.data = moved.model.layers[0].self_attn.q_a_proj.weight.data.clone()
    assert layout_key(moved) not in ("", key)
    # another dtype is another place for each
    assert layout_key(laid().bfloat16()) == ""


def test_a_loaded_model_has_its_projections_merged() -> None:
    model = tiny_model()
    for graph in model.report.journal.graphs:
        (entry,) = (p for p in graph.passes if p.name == "merge_projections")
        assert entry.rewrites == 2 * CONFIG.num_hidden_layers, entry.notes


def test_a_module_of_the_callers_is_used_as_it_is() -> None:
    module = random_weights(ONE_LAYER)
    places = [p.data_ptr() for p in module.parameters()]
    model = build(module)
    assert [p.data_ptr() for p in module.parameters()] == places
    assert "nobody says that the weights lie side by side" in model.explain("merge_projections")
    # unless the caller has done it
    assert "merged" in build(laid(ONE_LAYER)).explain("merge_projections")


def test_never_in_training() -> None:
    trainer = df.build(ONE_LAYER, training=df.Training(steps=1), compile=False, device="cpu")
    assert layout_key(trainer.model) == layout_key(trainer.compute) == ""


@pytest.mark.compile
def test_graphs_are_for_weights_that_lie_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEEPFUSE_CACHE_DIR", str(tmp_path))
    options: dict[str, Any] = {"device": "cpu", "max_batch_size": 1, "max_seq_len": 64}
    ids = torch.tensor([5, 6, 7])
    for module, may_be_warm in (
        (laid(ONE_LAYER), False),
        (random_weights(ONE_LAYER, 1), False),
        (laid(ONE_LAYER, 2), True),
    ):
        model = df.build(module, **options)
        # torch 2.11 cannot read back what it captured, and compiles again
        assert may_be_warm or not model.report.warm
        assert ("merged" in model.explain("merge_projections")) is bool(layout_key(module))
        torch.testing.assert_close(model(ids[None])[0], logits(module, ids), atol=1e-4, rtol=0.0)
