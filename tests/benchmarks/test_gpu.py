"""The suite ``gpu`` in small sizes, on a GPU or in Triton's interpreter: only its clock wants a GPU."""

import sys
from dataclasses import replace

import pytest
import torch

from benchmark_scripts import load_script
from deepfuse.ir.device import H100
from deepfuse.profiling.bench_suites import run_suite
from deepfuse.profiling.timing import Timing
from small_cases import DEVICE, ON_DEVICE, SMALL, new_bench, without_clock

pytestmark = ON_DEVICE
gpu = load_script("gpu")
# as the suite imports it
cases = sys.modules["cases"]
TINY = replace(
    gpu.v2_lite(),
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    num_attention_heads=2,
    num_key_value_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    bos_token_id=0,
    eos_token_id=1,
)
SIZES = gpu.Sizes(**SMALL, config=TINY, batches=(1, 2), context=5, prompt=9, compile=False, rounds=5)

EXPECTED = {
    "fp8_matmul 1 x 32 x 256": ["triton", "bfloat16"],
    "fp8_matmul 70 x 32 x 256": ["triton", "bfloat16"],
    "mla_decode 2 x 128": ["triton", "torch, contiguous cache"],
    "mla_decode_fp8 2 x 128": ["triton"],
    "mla_decode_project 2 x 128": ["triton", "three ops"],
    "mla_attention 2 x 9": ["triton", *["torch"] * (DEVICE.type == "cpu"), "scaled_dot_product_attention"],
    "fp8_grouped_matmul 2 x 130 x 24 x 128": ["triton", "bfloat16"],
    "fp8_grouped_matmul_wgrad 2 x 130 x 24 x 128": ["triton", "bfloat16"],
    "fp8_grouped_matmul 2 x 3 x 24 x 128": ["triton", "bfloat16"],
    "swiglu_quantize 2 x 128": ["triton", "two ops"],
    "add_rms_norm_quantize 2 x 256": ["triton", "two ops"],
    "rms_norm_quantize 2 x 256": ["triton", "two ops"],
    "quantize 1x128 2 x 256": ["triton"],
    "quantize 128x128 2 x 256": ["triton"],
}
"""Of each case, the alternatives that are there without a GPU too."""


@pytest.fixture
def tried(monkeypatch):
    """Nothing is run in other processes."""
    monkeypatch.setattr(gpu, "refused", lambda names, device: {})


def test_every_kernel_is_timed_beside_its_peers(monkeypatch, tried):
    without_clock(monkeypatch, cases)
    bench = new_bench()
    parts = [part for part in gpu.Gpu(bench, SIZES).parts() if part[0] not in ("model", "transformers compiled")]
    assert [name for name, *_ in parts] == [
        "ceilings",
        "dense products",
        "attention",
        "grouped products",
        "fusions",
        "build, filled cache",
    ]
    cases.run_parts(bench, parts[:-1])
    assert bench.results.left_out == {}
    rows = {row.name: list(row.figures) for row in bench.results.rows if "ceiling" not in row.name}
    if DEVICE.type == "cuda":
        warm = {name.removesuffix(", warm"): labels for name, labels in rows.items() if name.endswith(", warm")}
        assert 2 * len(warm) == len(rows)
        # and others, which the interpreter does not have
        rows = {name: [label for label in labels if label in EXPECTED[name]] for name, labels in warm.items()}
    assert rows == EXPECTED
    product = next(row for row in bench.results.rows if row.name.startswith("fp8_matmul 70 x 32 x 256"))
    assert product.facts["TFLOP/s"]["triton"] == pytest.approx(2 * 70 * 32 * 256 / 1e-6 / 1e12, rel=1e-3)
    assert {"M": 70, "N": 32, "K": 256}.items() <= product.facts.items()


def test_peers_compute_the_same():
    made = [*gpu.dense(DEVICE, **SMALL["dense"]), *gpu.grouped(DEVICE, **SMALL["grouped"])]
    made += [*gpu.decode(DEVICE, **SMALL["decode"]), *gpu.prompts(DEVICE, **SMALL["prompts"])]
    compared = 0
    for case in made:
        first, *others = (fn() for fn in case.make().alternatives.values())
        if not isinstance(first, torch.Tensor):
            # of attention, with the logarithms of its sums; quantized, with scales
            first = first[0] if first[0].numel() else first[1].float() * first[2].repeat_interleave(128, 1)
        for other in others:
            if case.name.startswith("mla_decode_project"):
                other = other[0].float() * other[1].repeat_interleave(128, 1)
            other = other if isinstance(other, torch.Tensor) else other[0]
            if other.ndim == 4:
                # heads before tokens
                other = other.transpose(1, 2).flatten(0, 1)
            # three bits of mantissa in each operand, or in the result; bfloat16 has eight
            error = (first.float() - other.float()).norm() / other.float().norm()
            assert error < 6e-2, case.name
            compared += 1
    assert compared >= 8


@pytest.mark.gpu
def test_no_provider_faults_in_its_own_process():
    assert gpu.refused(gpu.UNTRIED, DEVICE) == {}


def test_models_are_timed_in_turn(monkeypatch, tried):
    # what compiles a peer, with a mode, is PyTorch's business; what it is given is ours. Our graphs have tests of their own
    compile = torch.compile
    ours_too = DEVICE.type == "cuda"
    monkeypatch.setattr(torch, "compile", lambda fn, **o: compile(fn, **o) if ours_too and "mode" not in o else fn)
    bench = new_bench()
    models = [part for part in gpu.Gpu(bench, SIZES).parts() if "model" in part[0] or "transformers" in part[0]]
    cases.run_parts(bench, models)
    assert bench.results.left_out == {}
    assert {row.name: list(row.figures) for row in bench.results.rows if "ceiling" not in row.name} == {
        "build, bfloat16, empty cache": ["deepfuse"],
        "build, fp8, empty cache": ["deepfuse"],
        "prefill, 9 tokens": ["deepfuse bfloat16", "transformers eager", "deepfuse fp8"],
        "decode, batch 1, context 5": ["deepfuse bfloat16", "transformers eager", "deepfuse fp8"],
        "decode, batch 2, context 5": ["deepfuse bfloat16", "transformers eager", "deepfuse fp8"],
        "prefill, 9 tokens, compiled peer": ["transformers compiled"],
        "decode, batch 1, context 5, compiled peer": ["transformers compiled"],
        "decode, batch 2, context 5, compiled peer": ["transformers compiled"],
    }


def test_a_step_is_held_against_reading_the_weights(monkeypatch, tried):
    timing = Timing(8e-3, 8e-3, 8e-3)
    monkeypatch.setattr(gpu, "interleaved", lambda able, **options: dict.fromkeys(able, timing))
    bench = new_bench()
    suite = gpu.Gpu(bench, SIZES)
    suite.ceilings.limits = replace(H100, memory_bandwidth=1e9)
    suite.row(
        "row", {"deepfuse bfloat16": 1, "deepfuse fp8": 2}, lambda model: lambda: None, calls=8, tokens=1, bound=True
    )
    (row,) = bench.results.rows
    assert row.figures["deepfuse bfloat16"] == (1.0, 1.0, 1.0) and row.unit == "ms"
    assert row.facts["tokens/s"] == {"deepfuse bfloat16": 1000.0, "deepfuse fp8": 1000.0}
    # two bytes each at 1e9 a second, of a millisecond
    share = round(2 * gpu.count_parameters(TINY).active / 1e9 / 1e-3, 3)
    assert row.facts["share of reading the active weights"] == {"deepfuse bfloat16": share}


def test_a_model_that_fails_is_left_out_beside_the_others(monkeypatch, tried):
    def broken(*args, **options):
        raise ImportError("no transformers here")

    bench = new_bench()
    monkeypatch.setattr(gpu, "Transformers", broken)
    monkeypatch.setattr(gpu.Gpu, "ours", lambda self, dtype: broken() if dtype == "fp8" else Still())
    monkeypatch.setattr(gpu.Gpu, "build_row", lambda *args: 1.0)
    gpu.suite(bench, replace(SIZES, dense={"rows": ()}, grouped={"groups": ()}, decode={"steps": ()}))
    left_out = bench.results.left_out
    assert left_out["deepfuse fp8"] == left_out["transformers eager"] == "ImportError: no transformers here"
    assert left_out["transformers compiled"] == "ImportError: no transformers here"
    assert list(bench.results.row("prefill, 9 tokens").figures) == ["deepfuse bfloat16"]


def test_fp8_is_not_built_where_there_is_no_time(monkeypatch, tried):
    bench = new_bench(budget=1000.0)
    monkeypatch.setattr(gpu.Gpu, "ours", lambda self, dtype: Still())
    monkeypatch.setattr(gpu.Gpu, "build_row", lambda *args: 970.0)
    monkeypatch.setattr(gpu, "Transformers", lambda *args, **options: Still())
    gpu.Gpu(bench, SIZES).models(bench)
    assert bench.results.left_out["deepfuse fp8"].startswith("takes some 1010 s, ")
    assert list(bench.results.row("prefill, 9 tokens").figures) == ["deepfuse bfloat16", "transformers eager"]


class Still:
    """A model that does nothing."""

    model = type("Model", (), {"report": type("Report", (), {"warm": False})})

    def steps(self, batch, context):
        return lambda: None

    def prefill(self, tokens):
        return lambda: None

    def release(self):
        pass


def test_what_failed_in_its_own_process_is_not_run_here(monkeypatch):
    monkeypatch.setattr(gpu, "refused", lambda names, device: {"fp8_matmul.triton": "it hangs"})
    without_clock(monkeypatch, cases)
    bench = new_bench(only="dense")
    gpu.suite(bench, SIZES)
    assert bench.results.left_out["fp8_matmul.triton"] == "it hangs"
    row = next(row for row in bench.results.rows if row.name.startswith("fp8_matmul 1 x 32 x 256"))
    assert list(row.figures) == ["reference", "bfloat16"]


@pytest.mark.parametrize("suite", ["gpu", "gpu_tuning"])
def test_without_a_gpu_it_ends_with_one_error(suite, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"bench: want a CUDA device for the suite {suite}, got none"):
        run_suite(suite)
