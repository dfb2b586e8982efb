"""MLA and its baseline against the equations, written out; against transformers in test_oracle.py."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from deepfuse.blocks.attention import ATTENTION, MHA, MLA
from deepfuse.blocks.batch import Batch
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.rotary import Rotary
from tiny_checkpoint import TINY, YARN, model_of

LENGTHS = (5, 3)


def batch_of(config, lengths=LENGTHS):
    positions = torch.cat([torch.arange(n) for n in lengths])
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Batch(positions, starts, *Rotary(config)(positions))


def random_(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def rotated(x, positions, config):
    """Pairs of neighbouring channels as complex numbers, turned by the angle."""
    angle = positions[:, None].double() * Rotary(config).inv_freq.double()
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2)


def attend(q, k, v, scale):
    """``[T, H, D]`` of one sequence."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def by_the_equations(module, x, config):
    """One sequence in float64, equations 1 to 11 of DeepSeek-V3's report."""
    w = {k: v.double() for k, v in module.state_dict().items()}
    H, N, R, C = (
        getattr(config, n) for n in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank")
    )
    positions = torch.arange(len(x))

    def norm(y, weight):
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    if config.attention == "mha":
        q = x @ w["q_proj.weight"].T
        k_nope, k_rope = (x @ w["k_proj.weight"].T).split((H * N, R), -1)
        k_nope, v = k_nope.unflatten(-1, (H, N)), (x @ w["v_proj.weight"].T).unflatten(-1, (H, -1))
    else:
        query = norm(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"])
        q = query @ w["q_b_proj.weight"].T
        latent, k_rope = (x @ w["kv_a_proj_with_mqa.weight"].T).split((C, R), -1)
        kv = norm(latent, w["kv_a_layernorm.weight"]) @ w["kv_b_proj.weight"].T
        k_nope, v = kv.unflatten(-1, (H, -1)).split((N, config.v_head_dim), -1)
    q_nope, q_rope = q.unflatten(-1, (H, N + R)).split((N, R), -1)
    q_rope = torch.stack([rotated(q_rope[:, h], positions, config) for h in range(H)], 1)
    k_rope = rotated(k_rope, positions, config)[:, None].expand(-1, H, -1)
    out = attend(torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, k_rope), -1), v, config.softmax_scale)
    return out @ w["o_proj.weight"].T


@pytest.mark.parametrize("kind", ["mla", "mha"])
@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
def test_follows_the_equations(kind, scaling):
    config = replace(TINY, attention=kind, rope_scaling=scaling)
    module = random_(ATTENTION[kind](config))
    x = torch.randn(sum(LENGTHS), config.hidden_size)
    out = module(x, batch_of(config))
    expected = torch.cat([by_the_equations(module, part.double(), config) for part in x.split(LENGTHS)])
    # float32 against float64, over three matrix products of values near one
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)


def test_the_baseline_trains_and_has_a_gradient_for_each_parameter():
    module = random_(MHA(replace(TINY, attention="mha")))
    x = torch.randn(sum(LENGTHS), TINY.hidden_size, requires_grad=True)
    module(x, batch_of(TINY)).square().sum().backward()
    for tensor in (x, *module.parameters()):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0


def test_the_baseline_makes_a_whole_model():
    config = replace(TINY, attention="mha")
    model = model_of(config)
    assert all(isinstance(layer.self_attn, MHA) for layer in model.model.layers)
    ids, starts = torch.arange(8), torch.tensor([0, 5, 8], dtype=torch.int32)
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    logits = model(ids, positions, starts)
    alone = model(ids[5:], positions[5:], torch.tensor([0, 3], dtype=torch.int32))
    torch.testing.assert_close(logits[5:], alone)


def test_the_baseline_keeps_no_cache():
    with pytest.raises(ValueError, match="MHA: want no cache .* got one"):
        MHA(TINY)(torch.zeros(8, TINY.hidden_size), batch_of(TINY), torch.zeros(1, 64, 32))


def test_latent_norms_have_an_epsilon_of_their_own():
    module = MLA(replace(TINY, rms_norm_eps=0.5))
    assert module.q_a_layernorm.eps == module.kv_a_layernorm.eps == 1e-6


def test_a_new_kind_of_attention_needs_no_change_of_the_model(monkeypatch):
    class Mean(nn.Module):
        def __init__(self, config):
            super().__init__()

        def forward(self, x, batch, cache=None):
            return x.mean(0, keepdim=True).expand_as(x)

    monkeypatch.setitem(ATTENTION, "mean", Mean)
    model = CausalLM(replace(TINY, attention="mean"))
    assert all(isinstance(layer.self_attn, Mean) for layer in model.model.layers)


def test_an_unknown_kind_is_refused():
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"config: want attention out of \['mla', 'mha'\], got 'gqa'"),
    ):
        CausalLM(replace(TINY, attention="gqa"))
