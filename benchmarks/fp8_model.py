"""The shipped model in FP8: held-out bits per byte and greedy agreement; and what FP8 weights take of memory.

    python benchmarks/fp8_model.py --data data

writes `benchmarks/results/fp8_model.json`, and from it the tables of `docs/fp8.md`. Graphs run as the passes leave them,
uncompiled. Greedy agreement is the share of held-out tokens for which the most likely next token is the bfloat16 model's.

Memory: a model of random weights is written in FP8, and loaded and run by a process of its own, as FP8 and dequantized.
What counts is the largest resident size less that before loading.
"""

import argparse
import json
import multiprocessing
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sections import table, with_section

import deepfuse as df
from deepfuse.blocks.fp8 import to_fp8
from deepfuse.recipes.corpus import read_documents
from deepfuse.recipes.evaluate import WINDOW
from deepfuse.runtime.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fp8_model.json"
TEXT = ROOT / "docs" / "fp8.md"
KINDS = (None, "fp8_weights", "fp8")
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


def quality(data: Path) -> list[dict[str, Any]]:
    """Bits per byte and greedy agreement of each kind."""
    tokens, documents = np.load(data / "heldout.npy"), read_documents(data / "heldout.txt")
    text_bytes = sum(len(document.encode()) for document in documents)
    models = {
        kind: df.build("v3-tiny", device="cpu", dtype="bfloat16", quantize=kind, compile=False, max_batch_size=1)
        for kind in KINDS
    }
    bits, agreed = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0)
    for i in range(0, len(tokens) - 1, WINDOW):
        window = tokens[i : i + WINDOW + 1].astype(int).tolist()
        following, greedy = torch.tensor(window[1:]), None
        for kind, model in models.items():
            logits = model.engine.prefill([window[:-1]], [None], last_only=False)
            bits[kind] += float(torch.nn.functional.cross_entropy(logits, following, reduction="sum")) / np.log(2)
            best = logits.argmax(-1)
            greedy = best if greedy is None else greedy
            agreed[kind] += int((best == greedy).sum())
    return [
        {
            "quantize": kind,
            "bits_per_byte": round(bits[kind] / text_bytes, 5),
            "greedy_agreement": round(agreed[kind] / (len(tokens) - 1), 4),
            "weight_bytes": model.report.weight_bytes,
        }
        for kind, model in models.items()
    ]


def peak_of(folder: str, quantize: str | None, results: Any) -> None:
    """Of a process of its own: bytes of weights, and resident bytes that loading and a prefill have added at most."""
    torch.set_num_threads(1)
    df.build(replace(MEMORY, num_hidden_layers=1, hidden_size=128), compile=False)  # what is imported and captured
    # getrusage's peak is handed down from the parent process; this one can be set back
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    model = df.build(folder, device="cpu", quantize=quantize, compile=False, max_batch_size=1)
    model.generate([list(range(2, 66))], max_new_tokens=2)
    results.put({"weight_bytes": model.report.weight_bytes, "peak_bytes": resident("VmHWM") - before})


def resident(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most so far."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def memory() -> list[dict[str, Any]]:
    """What each kind of weights takes, loaded from an FP8 checkpoint."""
    rows, context = [], multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        model = df.CausalLM(MEMORY).bfloat16()
        model.initialize()
        to_fp8(model)
        save_checkpoint(model, folder)
        for kind in ("fp8", "fp8_weights", None):
            results: Any = context.Queue()
            process = context.Process(target=peak_of, args=(folder, kind, results))
            process.start()
            rows.append({"quantize": kind, **results.get()})
            process.join()
    return rows


def write(results: dict[str, Any]) -> None:
    """The tables of the text."""
    kind = {None: "none", "fp8_weights": "`fp8_weights`", "fp8": "`fp8`"}
    first = results["quality"][0]
    rows = [
        [
            kind[r["quantize"]],
            f"{r['bits_per_byte']:.4f}",
            f"{r['bits_per_byte'] / first['bits_per_byte'] - 1:+.2%}",
            f"{r['greedy_agreement']:.1%}",
            f"{r['weight_bytes'] / 1e6:.1f} MB",
        ]
        for r in results["quality"]
    ]
    head = ["quantize", "bits per byte", "against bfloat16", "greedy agreement", "weights"]
    text = with_section(TEXT.read_text(), "fp8_model: quality", table(head, rows))
    rows = [
        [kind[r["quantize"]], f"{r['weight_bytes'] / 1e6:.0f} MB", f"{r['peak_bytes'] / 1e6:.0f} MB"]
        for r in results["memory"]
    ]
    TEXT.write_text(with_section(text, "fp8_model: memory", table(["quantize", "weights", "peak"], rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    args = parser.parse_args()
    results = {"torch": torch.__version__, "quality": quality(args.data), "memory": memory()}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write(results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
