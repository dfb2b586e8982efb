"""Graphs are kept for the module they were captured of: what they take for granted of it is part of the key."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deepfuse as df
from deepfuse.blocks.model import CausalLM
from deepfuse.runtime.build_key import module_key
from tiny_model import CONFIG, ONE_LAYER, random_weights

BIAS = "e_score_correction_bias"


def narrow_bias(model: CausalLM) -> None:
    for module in model.modules():
        if hasattr(module, BIAS):
            setattr(module, BIAS, getattr(module, BIAS).bfloat16())


def other_strides(model: CausalLM) -> None:
    weight = model.model.embed_tokens.weight
    weight.data = weight.data.t().contiguous().t()


def other_epsilon(model: CausalLM) -> None:
    model.model.norm.eps = 1.0


def other_configuration(model: CausalLM) -> None:
    attention = model.model.layers[0].self_attn
    attention.config = replace(attention.config, rope_theta=7.0)


def other_block(model: CausalLM) -> None:
    model.lm_head = nn.Linear(CONFIG.hidden_size, CONFIG.vocab_size, bias=False)


def key_with(block: nn.Module) -> str:
    model = random_weights(ONE_LAYER)
    model.model.layers[0].mlp = block
    return module_key(model)


@pytest.mark.parametrize("change", [narrow_bias, other_strides, other_epsilon, other_configuration, other_block])
def test_what_a_graph_takes_for_granted_changes_the_key(change: Any) -> None:
    model = random_weights(CONFIG)
    before = module_key(model)
    assert before == module_key(random_weights(CONFIG, seed=1))
    change(model)
    assert module_key(model) != before


def test_the_source_of_a_callers_block_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(factor: int) -> str:
        path = tmp_path / f"v{factor}.py"
        path.write_text(
            f"import torch\n\nclass Own(torch.nn.Module):\n    def forward(self, x):\n        return {factor} * x\n"
        )
        spec: Any = importlib.util.spec_from_file_location("own_blocks", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "own_blocks", module)
        spec.loader.exec_module(module)
        return key_with(module.Own())

    assert key(2) != key(3)


def test_a_block_without_a_file_has_a_key() -> None:
    def key(forward: Any) -> str:
        return key_with(type("Own", (nn.Module,), {"forward": forward, "__module__": "nowhere"})())

    assert key(lambda _, x: 2 * x) == key(lambda _, x: 2 * x) != key(lambda _, x: 3 * x)


@pytest.mark.compile
def test_two_modules_of_one_configuration_do_not_share_graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEEPFUSE_CACHE_DIR", str(tmp_path))
    ids = torch.tensor([[5, 6, 7]])
    first, second = random_weights(ONE_LAYER), random_weights(ONE_LAYER)
    other_epsilon(second)
    options: dict[str, Any] = {"device": "cpu", "max_batch_size": 1, "max_seq_len": 64}
    kept = df.build(first, **options)(ids)
    built = df.build(second, **options)
    assert not built.report.warm
    want = second(ids[0], torch.arange(3), torch.tensor([0, 3], dtype=torch.int32)).detach()
    torch.testing.assert_close(built(ids)[0], want, atol=1e-4, rtol=0.0)
    assert not torch.allclose(kept, built(ids), atol=1e-2)
