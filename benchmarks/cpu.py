"""Decode, prefill and build on this CPU, beside transformers: eager, and compiled with a static cache.

    python benchmarks/cpu.py --json benchmarks/results/cpu.json

Alternatives run interleaved in one process, each figure is a median. The bound is what reading the step's weights once
would take at the bandwidth measured in the same rounds.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import deepfuse as df
from deepfuse.blocks.parameters import count_parameters
from deepfuse.profiling.timing import Timing, interleaved
from deepfuse.runtime.latent_cache import Sequence
from deepfuse.runtime.save import save_checkpoint

CONTEXTS = (64, 512, 2048)
STEPS = 8
"""Decode steps a timed call makes: the context hardly changes over them."""
MAX_SEQ_LEN = 2304


def benchmark_config() -> df.Config:
    """The real architecture at 60 million parameters: large enough that weights do not fit the caches."""
    return df.Config(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        moe_intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,
        q_lora_rank=256,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        max_position_embeddings=4096,
    )


class Ours:
    """A built model, stepped by hand."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        self.model = df.build(folder, device="cpu", dtype=dtype, max_batch_size=1, max_seq_len=MAX_SEQ_LEN)

        self.places: list[Sequence] = []

    def _place(self, tokens: int) -> Sequence:
        self.places.append(self.model.engine.cache.allocate(tokens))
        return self.places[-1]

    def release(self) -> None:
        """Give the cache back for the next measurement."""
        for place in self.places:
            self.model.engine.cache.release(place)
        self.places = []

    def steps(self, context: int) -> Callable[[], None]:
        engine = self.model.engine
        place = self._place(MAX_SEQ_LEN)
        engine.prefill([[1] * context], [place], last_only=True)

        def run() -> None:
            place.length = context
            for i in range(STEPS):
                engine.decode([i], [place])

        return run

    def prefill(self, tokens: int) -> Callable[[], None]:
        engine = self.model.engine
        place = self._place(tokens)
        return lambda: engine.prefill([[1] * tokens], [place], last_only=True)


class Peer:
    """transformers with the same weights."""

    def __init__(self, folder: Path, dtype: torch.dtype, *, compiled: bool):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.compiled = compiled
        self.forward: Any = torch.compile(self.model.forward, dynamic=False) if compiled else self.model.forward

    def cache(self) -> Any:
        if self.compiled:
            return transformers.StaticCache(config=self.model.config, max_cache_len=MAX_SEQ_LEN)
        return transformers.DynamicCache(config=self.model.config)

    @torch.no_grad()
    def steps(self, context: int) -> Callable[[], None]:
        cache = self.cache()
        self.model.forward(torch.ones(1, context, dtype=torch.long), past_key_values=cache, use_cache=True)

        @torch.no_grad()
        def run() -> None:
            for i in range(STEPS):
                positions = torch.tensor([[context + i]])
                self.forward(torch.tensor([[i]]), past_key_values=cache, use_cache=True, position_ids=positions)
            if not self.compiled:
                cache.crop(-STEPS)

        return run

    def prefill(self, tokens: int) -> Callable[[], None]:
        ids = torch.ones(1, tokens, dtype=torch.long)

        @torch.no_grad()
        def run() -> None:
            self.forward(ids, use_cache=False, logits_to_keep=1)

        return run


def read_seconds(array: torch.Tensor) -> Callable[[], None]:
    """Reads an array far larger than the caches, on all threads."""
    return lambda: array.sum()


def measure(dtype: torch.dtype, folder: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds a decode step and a prefill, of all alternatives in one dtype."""
    counts = count_parameters(benchmark_config())
    weight_bytes = counts.active * dtype.itemsize
    ours, eager, compiled = Ours(folder, dtype), Peer(folder, dtype, compiled=False), Peer(folder, dtype, compiled=True)
    array = torch.ones(1 << 26)
    rows: dict[str, Any] = {}
    for context in CONTEXTS:
        timings = interleaved(
            {
                "bound": read_seconds(array),
                "deepfuse": ours.steps(context),
                "transformers eager": eager.steps(context),
                "transformers compiled": compiled.steps(context),
            },
            rounds=rounds,
        )
        bandwidth = array.numel() * 4 / timings.pop("bound").median
        rows[f"decode, context {context}"] = _row(timings, STEPS, bound=weight_bytes / bandwidth)
        ours.release()
    torch._dynamo.reset()
    compiled = Peer(folder, dtype, compiled=True)
    timings = interleaved(
        {
            "deepfuse": ours.prefill(512),
            "transformers eager": eager.prefill(512),
            "transformers compiled": compiled.prefill(512),
        },
        rounds=rounds,
    )
    rows["prefill, 512 tokens"] = _row(timings, 1)
    return rows


def _row(timings: dict[str, Timing], calls: int, bound: float | None = None) -> dict[str, Any]:
    ms = {name: [round(1e3 * v / calls, 3) for v in (t.median, t.low, t.high)] for name, t in timings.items()}
    ours = ms["deepfuse"][0]
    row: dict[str, Any] = {
        "milliseconds (median, quartiles)": ms,
        "times faster than": {name: round(v[0] / ours, 2) for name, v in ms.items() if name != "deepfuse"},
    }
    if bound is not None:
        row["share of the bandwidth bound"] = round(1e3 * bound / ours, 3)
    return row


BUILD = """
import time
start = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - start
start = time.perf_counter()
import deepfuse as df
import_seconds = time.perf_counter() - start
start = time.perf_counter()
model = df.build("v3-tiny")
build_seconds = time.perf_counter() - start
import json
print(json.dumps({"import torch": torch_seconds, "import deepfuse": import_seconds, "build": build_seconds,
                  "warm": model.report.warm}))
"""


def build_times() -> dict[str, Any]:
    """Seconds to build the shipped model in a fresh process, with an empty and with a filled compile cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "DEEPFUSE_CACHE_DIR": cache}
        rows = {}
        for name in ("cold", "warm"):
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", BUILD], env=environment, capture_output=True, text=True, check=True
            )
            rows[name] = {**json.loads(done.stdout.splitlines()[-1]), "process": time.perf_counter() - start}
        return rows


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = next(
        (l.split(":")[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in l), ""
    )
    return {
        "cpu": cpu or platform.processor(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }


def table(results: dict[str, Any]) -> Table:
    """The same for people."""
    shown = Table("what", "dtype", "deepfuse ms", "transformers eager", "transformers compiled", "share of bound")
    for dtype, rows in results["models"].items():
        for what, row in rows.items():
            ms = row["milliseconds (median, quartiles)"]
            cells = [f"{ms['deepfuse'][0]:.2f}"]
            for name in ("transformers eager", "transformers compiled"):
                cells.append(f"{ms[name][0]:.2f} ({row['times faster than'][name]:.2f}x)")
            share = row.get("share of the bandwidth bound")
            shown.add_row(what, dtype, *cells, "" if share is None else f"{share:.0%}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--no-build", action="store_true", help="leave out the build times")
    args = parser.parse_args()

    config = benchmark_config()
    model = df.CausalLM(config)
    model.initialize()
    results: dict[str, Any] = {"machine": machine(), "config": dataclasses.asdict(config), "models": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_checkpoint(model, folder)
        for dtype in args.dtypes:
            results["models"][dtype] = measure(getattr(torch, dtype), folder, args.rounds)
    if not args.no_build:
        results["build"] = build_times()
    console = Console()
    console.print(table(results))
    console.print(results.get("build", ""))
    median = statistics.median(
        row["share of the bandwidth bound"]
        for row in results["models"][args.dtypes[0]].values()
        if "share of the bandwidth bound" in row
    )
    console.print(f"median share of the bound, {args.dtypes[0]}: {median:.0%}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
