from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from deepfuse.blocks.config import Config
from deepfuse.blocks.moe import MoE
from oracle import CONFIGS
from tiny_checkpoint import TINY

NAMES = ["v3", "two-groups", "no-q-lora-one-group", "weights-not-normalised", "one-expert-a-token", "odd-sizes"]
NAMES += ["two-shared-experts", "v2-greedy", "v2-groups-yarn"]


def pair(name):
    """The block of transformers and ours, with the same random weights."""
    settings = CONFIGS[name]
    v2 = name.startswith("v2")
    their_config = DeepseekV2Config(**settings) if v2 else DeepseekV3Config(**settings)
    their_config._experts_implementation = "eager"
    theirs = (DeepseekV2Moe if v2 else DeepseekV3MoE)(their_config)
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            tensor.normal_(std=0.3)
    known = {k: v for k, v in settings.items() if v is not None or k == "q_lora_rank"}
    scores = {"model_type": "deepseek_v2", "scoring_func": "softmax"} if v2 else {}
    if settings.get("topk_method") == "greedy":
        scores |= {"n_group": 1, "topk_group": 1}
    known.pop("rope_parameters", None)
    ours = MoE(Config(**{**known, **scores}))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("name", NAMES)
def test_equals_transformers(name):
    theirs, ours = pair(name)
    x = torch.randn(1, 33, theirs.config.hidden_size)
    with torch.no_grad():
        expected = theirs(x)[0]
        # 1e-5 of the largest: float32 sums of at most 80 terms in another order
        torch.testing.assert_close(ours(x[0]), expected, atol=1e-5 * float(expected.abs().max()), rtol=0.0)


@pytest.mark.parametrize("name", ["v3", "v2-groups-yarn"])
def test_gradients_equal_those_of_transformers(name):
    theirs, ours = pair(name)
    x, dy = torch.randn(2, 1, 20, theirs.config.hidden_size)
    their_x, our_x = x.clone().requires_grad_(), x[0].clone().requires_grad_()
    theirs(their_x).backward(dy)
    ours(our_x).backward(dy[0])
    gradients = {"x": (our_x.grad, their_x.grad[0])}
    expected = dict(theirs.named_parameters())
    gradients |= {name: (p.grad, expected[name].grad) for name, p in ours.named_parameters()}
    for which, (actual, wanted) in gradients.items():
        assert wanted.abs().sum() > 0, which
        torch.testing.assert_close(actual, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0.0, msg=which)


def test_the_bias_chooses_but_does_not_weigh():
    _, moe = pair("no-q-lora-one-group")
    x = torch.randn(40, moe.gate.weight.shape[1])
    weights, experts = moe.gate(x)
    with torch.no_grad():
        moe.gate.e_score_correction_bias[3] += 10
    steered_weights, steered = moe.gate(x)
    assert (steered == 3).sum() == len(x) > (experts == 3).sum()
    torch.testing.assert_close(steered_weights.sum(-1), weights.sum(-1))


def test_the_router_computes_in_float32_whatever_the_model():
    _, moe = pair("v3")
    x = torch.randn(20, moe.gate.weight.shape[1]).bfloat16()
    moe.gate.weight.data = moe.gate.weight.data.bfloat16()
    weights, experts = moe.gate(x)
    wide = MoE(moe.gate.config).gate
    wide.load_state_dict({k: v.float() for k, v in moe.gate.state_dict().items()})
    expected_weights, expected = wide(x.float())
    assert weights.dtype == torch.float32
    assert torch.equal(experts, expected) and torch.equal(weights, expected_weights)


def test_load_is_counted_in_training_only():
    _, moe = pair("v3")
    x = torch.randn(12, moe.gate.weight.shape[1])
    moe.eval()(x)
    assert not moe.gate.tokens_per_expert.any()
    moe.train()(x)
    _, experts = moe.gate(x)
    expected = torch.bincount(experts.flatten(), minlength=moe.num_experts)
    assert torch.equal(moe.gate.tokens_per_expert, expected.float())
    assert "gate.tokens_per_expert" not in moe.state_dict()


@pytest.mark.parametrize("shared", [None, 0])
def test_without_shared_experts(shared):
    moe = MoE(replace(TINY, n_shared_experts=shared))
    assert moe.shared_experts is None
    assert not [name for name, _ in moe.named_parameters() if "shared" in name]


def test_no_tokens():
    _, moe = pair("v3")
    assert moe(torch.zeros(0, moe.gate.weight.shape[1])).shape == (0, moe.gate.weight.shape[1])
