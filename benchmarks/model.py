"""How many bits a byte of held-out text does the shipped model take in float32, bfloat16 and FP8, and what does FP8 save?

Graphs run as the passes leave them, uncompiled. Greedy agreement is the share of held-out tokens for which the most likely
next token is the bfloat16 model's. The text is `data/heldout.txt`, which `deepfuse.recipes.corpus` and
`deepfuse.recipes.tokenizer` make.

Memory: a model of random weights is written in FP8, and loaded and run by a process of its own, as FP8 and dequantized.
What counts is the largest resident size less that before loading. glibc keeps what is freed in its heap for blocks of up to
32 MB, once it has freed one as large: which gaps are left there differs from run to run, by 50 MB and more. So blocks of a
megabyte and more are given back as they are freed (`MALLOC_MMAP_THRESHOLD_`).
"""

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from own_process import run_code

import deepfuse as df
from deepfuse.blocks.fp8 import to_fp8
from deepfuse.profiling.bench import Bench
from deepfuse.profiling.bench_suites import run_script
from deepfuse.recipes.corpus import read_documents
from deepfuse.recipes.evaluate import WINDOW
from deepfuse.runtime.save import save_checkpoint

DEVICE = "auto"
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
MODEL = "v3-tiny"
SOURCE = MODEL
"""What is built: the preset with its weights."""
REFERENCE = "bfloat16"
KINDS: dict[str, dict[str, Any]] = {
    REFERENCE: {"dtype": "bfloat16", "quantize": None},
    "float32": {"dtype": "float32", "quantize": None},
    "fp8_weights": {"dtype": "bfloat16", "quantize": "fp8_weights"},
    "fp8": {"dtype": "bfloat16", "quantize": "fp8"},
}
"""Dtype of weights and activations, or what is quantized of the bfloat16 model; the first is what tokens are compared with."""
MEMORY = df.Config(
    vocab_size=1024,
    hidden_size=1024,
    intermediate_size=4096,
    moe_intermediate_size=128,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=16,
    n_routed_experts=None,
    q_lora_rank=512,
    kv_lora_rank=512,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
    max_position_embeddings=512,
    num_nextn_predict_layers=0,
)
"""Some 140 million parameters in eight layers."""


def suite(bench: Bench) -> None:
    if bench.wants("held-out text", seconds=400):
        quality(bench)
    if bench.device["kind"] != "cpu":
        bench.leave_out("memory", "what is counted are the resident bytes of a process on a CPU")
    elif bench.wants("memory", seconds=90):
        memory(bench)


def quality(bench: Bench) -> None:
    """Bits per byte and greedy agreement of each kind."""
    tokens, text_bytes = heldout(DATA)
    device = bench.torch_device
    models = {
        kind: df.build(SOURCE, device=device, compile=False, max_batch_size=1, **how) for kind, how in KINDS.items()
    }
    nats, agreed = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0)
    for i in range(0, len(tokens) - 1, WINDOW):
        window = tokens[i : i + WINDOW + 1].astype(int).tolist()
        following, greedy = torch.tensor(window[1:], device=device), None
        for kind, model in models.items():
            logits = model.engine.prefill([window[:-1]], [None], last_only=False)
            nats[kind] += float(torch.nn.functional.cross_entropy(logits, following, reduction="sum"))
            best = logits.argmax(-1)
            greedy = best if greedy is None else greedy
            agreed[kind] += int((best == greedy).sum())
    for kind, model in models.items():
        bench.row(
            f"held-out text, {kind}",
            {MODEL: nats[kind] / np.log(2) / text_bytes},
            unit="bits per byte",
            **{
                "kind": kind,
                "greedy agreement": round(agreed[kind] / (len(tokens) - 1), 4),
                "weights, MB": model.report.weight_bytes / 1e6,
            },
        )


def heldout(data: Path) -> tuple[np.ndarray, int]:
    """Tokens of the held-out text, and its bytes.

    Raises:
        ValueError: it was not made.
    """
    if not (data / "heldout.npy").exists():
        raise ValueError(
            f"model: want {data / 'heldout.npy'}, made by python -m deepfuse.recipes.corpus --folder data and "
            "python -m deepfuse.recipes.tokenizer --folder data, got no such file"
        )
    return np.load(data / "heldout.npy"), sum(len(text.encode()) for text in read_documents(data / "heldout.txt"))


def memory(bench: Bench) -> None:
    """What each kind of weights takes, loaded from an FP8 checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        model = df.CausalLM(MEMORY).bfloat16()
        model.initialize()
        to_fp8(model)
        save_checkpoint(model, folder)
        for kind, quantize in {"fp8": "fp8", "fp8_weights": "fp8_weights", "dequantized": "none"}.items():
            found = run_code(PEAK, folder, quantize, MALLOC_MMAP_THRESHOLD_=str(1 << 20))
            facts = {"kind": kind, "weights, MB": found["weights"] / 1e6}
            bench.row(f"memory, {kind}", {"peak": found["peak"] / 1e6}, unit="MB", **facts)


PEAK = """
import model
print(json.dumps(model.peak_of(sys.argv[1], None if sys.argv[2] == "none" else sys.argv[2])))
"""


def peak_of(folder: str, quantize: str | None) -> dict[str, int]:
    """Of a process of its own: bytes of weights, and resident bytes that loading and a prefill have added at most."""
    torch.set_num_threads(1)
    df.build(replace(MEMORY, num_hidden_layers=1, hidden_size=128), compile=False)  # what is imported and captured
    # getrusage's peak is handed down from the parent process; this one can be set back
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    model = df.build(folder, device="cpu", quantize=quantize, compile=False, max_batch_size=1)
    model.generate([list(range(2, 66))], max_new_tokens=2)
    return {"peak": resident("VmHWM") - before, "weights": model.report.weight_bytes}


def resident(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most so far."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    run_script(__file__)
