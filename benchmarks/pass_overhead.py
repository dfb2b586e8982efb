"""What the passes cost: seconds in the pipeline beside seconds of compiling, cold, on a model of four layers.

    python benchmarks/pass_overhead.py

writes `benchmarks/results/pass_overhead.json` and a table of `docs/passes.md`. Each build runs in a process of its own
with empty caches. Counted is all that happens because there are passes: the passes, the checks after them, printed
graphs, and the copies that a failing pass would be undone with.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from sections import computed_or_kept, table, write_sections

import deepfuse as df
from deepfuse.passes.runner import Runner

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pass_overhead.json"
TEXT = ROOT / "docs" / "passes.md"
KINDS = ("bfloat16", "fp8")
CONFIG = df.Config(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    max_position_embeddings=256,
    num_nextn_predict_layers=0,
)


def measured(kind: str) -> dict[str, Any]:
    """One build in this process: its prefill graph and the decode graph of one sequence."""
    spent = 0.0
    run = Runner.run

    def timed(self: Runner, graph: torch.fx.Graph, hook: str) -> None:
        nonlocal spent
        began = time.perf_counter()
        run(self, graph, hook)
        spent += time.perf_counter() - began

    Runner.run = timed  # type: ignore[method-assign]
    quantize = "fp8" if kind == "fp8" else None
    report = df.build(CONFIG, device="cpu", dtype="bfloat16", quantize=quantize, max_batch_size=1).report
    passes = sum(entry.milliseconds for graph in report.journal.graphs for entry in graph.passes) / 1e3
    return {
        "kind": kind,
        "warm": report.warm,
        "compile_seconds": report.compile_seconds,
        "pipeline_seconds": spent,
        "pass_seconds": passes,
        "rewrites": sum(report.matches().values()),
    }


def compute() -> dict[str, Any]:
    """All builds, one after the other."""
    rows = []
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as caches:
            environment = {**os.environ, "DEEPFUSE_CACHE_DIR": caches}
            command = [sys.executable, __file__, "--one", kind]
            found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            rows.append(json.loads(found.stdout.splitlines()[-1]))
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "builds": rows,
    }


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The table of the page."""
    rows = [
        [
            row["kind"],
            str(row["rewrites"]),
            f"{row['compile_seconds']:.1f} s",
            f"{row['pipeline_seconds']:.2f} s",
            f"{row['pipeline_seconds'] / row['compile_seconds']:.1%}",
        ]
        for row in results["builds"]
    ]
    return {"pass_overhead": table(["build", "rewrites", "compiling", "of it the pipeline", "share"], rows)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measured(sys.argv[2])))
    else:
        write_sections(TEXT, tables(computed_or_kept(__doc__, RESULTS, compute)))
