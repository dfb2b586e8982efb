"""``torch.compile(model, backend="deepfuse")`` on other people's models: equal outputs, and a report."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import deepfuse as df

IDS = torch.arange(10).reshape(2, 5)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def llama():
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=2))


def deepseek_v3():
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(
        **SIZES,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def rewrites(graphs):
    counts = {}
    for p in (p for graph in graphs for p in graph.passes):
        counts[p.name] = counts.get(p.name, 0) + p.rewrites
    return counts


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        # 2 layers of 2 norms and the last one; 7 projections a layer and the head
        (llama, {"recognize_norm": 5, "recognize_swiglu": 2, "recognize_rotary": 4, "recognize_linear": 15}),
        # with norms on both latents; 5 projections a layer, 3 of the dense and of the shared expert, router, head
        (deepseek_v3, {"recognize_norm": 9, "recognize_swiglu": 3, "recognize_rotary": 4, "recognize_linear": 18}),
    ],
    ids=["llama", "deepseek_v3"],
)
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.compile)], ids=["plain", "compiled"])
def test_models_of_transformers(make, expected, compile):
    model = make().eval()
    before = len(df.backend_journal().graphs)
    # with what Inductor has cached the passes would not run, and report nothing
    options = {"force_disable_caches": True} if compile else {"compile": False, "verify": True}
    compiled = torch.compile(model, backend="deepfuse", options=options)
    with torch.no_grad():
        want = model(IDS, use_cache=False).logits
        # float32 through two layers; the passes reassociate
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, want, atol=1e-5, rtol=1e-5)
    got = rewrites(df.backend_journal().graphs[before:])
    assert {name: got[name] for name in expected} == expected


def test_gradients_are_equal():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.RMSNorm(16), nn.Linear(16, 4, bias=False))
    x = torch.randn(3, 5, 8)
    compiled = torch.compile(model, backend="deepfuse", options={"compile": False})
    found = []
    for fn in (model, compiled):
        model.zero_grad()
        fn(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_the_journal_explains():
    compiled = torch.compile(nn.Linear(8, 4), backend="deepfuse", options={"compile": False})
    compiled(torch.randn(2, 8))
    journal = df.backend_journal()
    assert "recognize_linear: 1 rewrites" in str(journal)
    assert "matched" in journal.explain("recognize_linear")


@pytest.mark.parametrize("first", ["", "import torch._dynamo; torch._dynamo.list_backends()"], ids=["lazy", "late"])
def test_importing_deepfuse_registers_it(first):
    code = f"""
import sys, torch
{first}
import deepfuse
if not {first!r}:
    assert "torch._dynamo" not in sys.modules and "deepfuse.runtime.backend" not in sys.modules
import torch._dynamo
assert "deepfuse" in torch._dynamo.list_backends()
compiled = torch.compile(torch.nn.Linear(3, 2), backend="deepfuse", options={{"compile": False}})
assert compiled(torch.ones(1, 3)).shape == (1, 2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
