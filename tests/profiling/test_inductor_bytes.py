"""Bytes that we predict for whole graphs are those that Inductor counts; calls of products and of attention by hand."""

from dataclasses import replace

import pytest
import torch

from benchmark_scripts import load_script
from deepfuse.blocks.model import CausalLM
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.runtime.losses import next_token_loss
from deepfuse.runtime.steps import decode, prefill
from inductor_bytes import Counted, counted

CONFIG = replace(load_script("pass_overhead").CONFIG, num_hidden_layers=2)
TOKENS, SEQUENCES = 64, 2
# regions are a rule (profiling/regions.py); what Inductor fuses depends on more. Measured: 0.85 (decode) to 0.99 of its count
TOLERANCE = 0.2


@pytest.fixture(scope="module")
def graphs() -> dict[str, Counted]:
    model = CausalLM(CONFIG)
    model.initialize(seed=0)
    caches = [torch.zeros(9, PAGE_SIZE, CONFIG.cache_width) for _ in range(CONFIG.num_hidden_layers)]
    T, L, B = TOKENS, TOKENS, SEQUENCES
    ids = torch.arange(T) * 7 % CONFIG.vocab_size
    tokens = torch.stack([ids, torch.arange(T), torch.arange(T) + PAGE_SIZE])
    q_start = torch.tensor([0, T], dtype=torch.int32)
    with torch.no_grad():
        found = {
            "prefill": counted(prefill, model.eval(), caches, tokens, q_start, torch.tensor([T - 1]))[0],
            "decode": counted(
                decode,
                model,
                caches,
                torch.tensor([[5], [T], [T + PAGE_SIZE], [T + 1]]),
                torch.arange(1, T // PAGE_SIZE + 2)[None],
            )[0],
        }
    batch = torch.randint(CONFIG.vocab_size, (B, L + 2), generator=torch.Generator().manual_seed(0))
    starts = torch.arange(0, (B + 1) * L, L, dtype=torch.int32)
    arguments = (model.train(), batch, torch.arange(L).repeat(B), starts)
    found["forward"], found["backward"] = counted(next_token_loss, *arguments, training=True)
    return found


@pytest.mark.compile
@pytest.mark.parametrize("name", ["prefill", "decode", "forward", "backward"])
def test_bytes_of_a_graph_are_those_of_inductor(graphs: dict[str, Counted], name: str) -> None:
    graph = graphs[name]
    assert graph.predicted == pytest.approx(graph.inductor - graph.indexed, rel=TOLERANCE)


@pytest.mark.compile
def test_products_by_hand(graphs: dict[str, Counted]) -> None:
    """Of a prefill in float32, where each of them is a call: operands and result once."""
    c, T = CONFIG, TOKENS
    H, D, E = c.num_attention_heads, c.hidden_size, c.n_routed_experts
    qk, width = c.qk_nope_head_dim + c.qk_rope_head_dim, c.cache_width

    def linear(rows: int, inputs: int, outputs: int) -> int:
        return 4 * (rows * inputs + outputs * inputs + rows * outputs)

    attention = [
        linear(T, D, c.q_lora_rank),
        linear(T, c.q_lora_rank, H * qk),
        linear(T, D, width),
        linear(T, c.kv_lora_rank, H * (c.qk_nope_head_dim + c.v_head_dim)),
        linear(T, H * c.v_head_dim, D),
    ]

    def mlp(inner: int) -> list[int]:
        return [linear(T, D, inner), linear(T, D, inner), linear(T, inner, D)]

    expected = 2 * sum(attention) + sum(mlp(c.intermediate_size)) + sum(mlp(c.moe_intermediate_size))
    expected += linear(T, D, E)
    rows = T * c.num_experts_per_tok
    # all experts' weights, and the offsets of their rows
    for inputs, outputs in ((D, 2 * c.moe_intermediate_size), (c.moe_intermediate_size, D)):
        expected += 4 * (rows * inputs + E * inputs * outputs + rows * outputs) + 4 * E
    products = [launch for launch in graphs["prefill"].ours if launch.kind == "matmul"]
    found = sum(launch.activation_bytes + launch.weight_bytes for launch in products)
    assert found == pytest.approx(expected, rel=1e-4)  # a few offsets


@pytest.mark.compile
def test_attention_by_hand(graphs: dict[str, Counted]) -> None:
    """In float32: queries, keys and values of all heads, the rotary key of all, results; backward all of these twice, as
    they are read and as gradients are written or read, and the statistics of each row."""
    c = CONFIG
    H = c.num_attention_heads
    q, kv, out = (
        H * width
        for width in (c.qk_nope_head_dim + c.qk_rope_head_dim, c.qk_nope_head_dim + c.v_head_dim, c.v_head_dim)
    )
    once = q + kv + c.qk_rope_head_dim + out
    rows = {"prefill": TOKENS, "forward": SEQUENCES * TOKENS, "backward": SEQUENCES * TOKENS}
    for name, T in rows.items():
        found = [launch.activation_bytes for launch in graphs[name].ours if launch.kind == "attention"]
        assert found == [4 * T * (once if name != "backward" else 2 * once + H)] * c.num_hidden_layers
