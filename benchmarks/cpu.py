"""How fast are decode, prefill, a training step, a build and an import on this CPU, beside transformers and llama.cpp?

A model of the real architecture with 60 million parameters, beside transformers: eager, and compiled (for decode with a
static cache). The shipped model, written as GGUF, also beside llama.cpp, through the package llama-cpp-python; both are left out
where that, or gguf, is not installed.

The share of the bound is what reading the step's weights once would take, at the bandwidth measured in the same rounds,
over the time of a step. Builds and imports run in processes of their own.
"""

import importlib.util
import itertools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf_export import export
from own_process import PROCESS, run_code
from stepping import (
    LENGTH,
    SEQUENCES,
    STEPS,
    Call,
    LlamaCpp,
    Ours,
    Transformers,
    disagreement,
    our_training,
    transformers_training,
)

import deepfuse as df
from deepfuse.blocks.parameters import count_parameters
from deepfuse.profiling.bench import Bench
from deepfuse.profiling.bench_suites import run_script
from deepfuse.profiling.timing import Timing, interleaved, summary
from deepfuse.runtime.save import save_checkpoint

CONTEXTS = (64, 512, 2048)
MAX_SEQ_LEN = 2304
PREFILL = 512
SHIPPED = Path(__file__).resolve().parents[1] / "models" / "v3-tiny"
SHIPPED_CONTEXTS = (64, 512)
SHIPPED_SEQ_LEN = 768
DTYPES = ("float32", "bfloat16")
LLAMA_CPP = ("llama_cpp", "gguf")
"""Modules that the peer llama.cpp wants."""


def suite(bench: Bench) -> None:
    transformers.logging.set_verbosity_error()  # it lists the weights of multi-token prediction, which it leaves out
    with tempfile.TemporaryDirectory() as name:
        checkpoint = Checkpoint(Path(name))
        parts: list[tuple[str, Callable[[Bench, Checkpoint, str], None], float]] = [
            ("decode", decode, 240),
            ("prefill", prefill, 150),
            ("training step", training_step, 400),
            ("shipped model", shipped, 120),
        ]
        for (part, measure, seconds), dtype in itertools.product(parts, DTYPES):
            if bench.wants(f"{part}, {dtype}", seconds=seconds):
                # Dynamo compiles one function so many times, and from then on silently runs it as it is
                torch._dynamo.reset()
                measure(bench, checkpoint, dtype)
    if bench.wants("build", seconds=200):
        build(bench)
    if bench.wants("import", seconds=60):
        imports(bench)


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


class Checkpoint:
    """That model with random weights, written when it is first asked for."""

    def __init__(self, beside: Path):
        self.beside, self._folder = beside, beside / "checkpoint"

    @property
    def folder(self) -> Path:
        if not self._folder.exists():
            model = df.CausalLM(benchmark_config())
            model.initialize()
            save_checkpoint(model, self._folder)
        return self._folder


def decode(bench: Bench, checkpoint: Checkpoint, name: str) -> None:
    dtype = getattr(torch, name)
    weight_bytes = count_parameters(benchmark_config()).active * dtype.itemsize
    ours = Ours(checkpoint.folder, dtype, MAX_SEQ_LEN)
    peers = {
        "transformers eager": Transformers(checkpoint.folder, dtype, MAX_SEQ_LEN, compiled=False),
        "transformers compiled": Transformers(checkpoint.folder, dtype, MAX_SEQ_LEN, compiled=True),
    }
    array = torch.ones(1 << 26)  # far larger than the caches; read on all threads
    for context in CONTEXTS:
        calls = {"deepfuse": ours.steps(context), **{label: peer.steps(context) for label, peer in peers.items()}}
        timings = interleaved({"bound": array.sum, **calls}, rounds=7)
        bound = weight_bytes * timings.pop("bound").median / (array.numel() * array.itemsize)
        share = round(bound * STEPS / timings["deepfuse"].median, 3)
        facts = {"what": f"decode, context {context}", "dtype": name, "share of bound": share}
        bench.row(f"decode, context {context}, {name}", timings, calls=STEPS, **facts)
        ours.release()


def prefill(bench: Bench, checkpoint: Checkpoint, name: str) -> None:
    dtype = getattr(torch, name)
    ours = Ours(checkpoint.folder, dtype, MAX_SEQ_LEN)
    calls = {
        "deepfuse": ours.prefill(PREFILL),
        "transformers eager": Transformers(checkpoint.folder, dtype, MAX_SEQ_LEN, compiled=False).prefill(PREFILL),
        "transformers compiled": Transformers(checkpoint.folder, dtype, MAX_SEQ_LEN, compiled=True).prefill(PREFILL),
    }
    what = f"prefill, {PREFILL} tokens"
    bench.interleaved(f"{what}, {name}", calls, what=what, dtype=name)
    ours.release()


def training_step(bench: Bench, checkpoint: Checkpoint, name: str) -> None:
    dtype = getattr(torch, name)
    model = df.CausalLM(benchmark_config())
    model.initialize()
    calls: dict[str, Callable[[], float]] = {"deepfuse": our_training(model, dtype)}
    for label, compiled in (("transformers eager", False), ("transformers compiled", True)):
        calls[label] = transformers_training(checkpoint.folder, dtype, compiled=compiled)
    what = f"training step, {SEQUENCES} x {LENGTH} tokens"
    bench.interleaved(f"{what}, {name}", calls, what=what, dtype=name)


def shipped(bench: Bench, checkpoint: Checkpoint, name: str) -> None:
    dtype = getattr(torch, name)
    models: dict[str, Any] = {
        "deepfuse": Ours(SHIPPED, dtype, SHIPPED_SEQ_LEN),
        "transformers eager": Transformers(SHIPPED, dtype, SHIPPED_SEQ_LEN, compiled=False),
    }
    missing = [module for module in LLAMA_CPP if importlib.util.find_spec(module) is None]
    if missing:
        bench.leave_out(
            f"llama.cpp, {name}", f"not installed: {', '.join(missing)} (pip install llama-cpp-python gguf)"
        )
    else:
        path = checkpoint.beside / f"{name}.gguf"
        export(SHIPPED, path, dtype)
        models["llama.cpp"] = LlamaCpp(path, dtype, SHIPPED_SEQ_LEN)
    for context in SHIPPED_CONTEXTS:
        what = f"shipped model, decode, context {context}"
        calls = {label: model.steps(context) for label, model in models.items()}
        compared(bench, what, name, calls, steps=STEPS)
        models["deepfuse"].release()
    what = f"shipped model, prefill, {PREFILL} tokens"
    calls = {label: model.prefill(PREFILL) for label, model in models.items()}
    compared(bench, what, name, calls)
    models["deepfuse"].release()


def compared(bench: Bench, what: str, name: str, calls: dict[str, Call], steps: int = 1) -> None:
    """The row, or why it is left out: what does not compute the same is not timed side by side."""
    problem = disagreement(calls, getattr(torch, name))
    if problem is not None:
        bench.leave_out(f"{what}, {name}", problem)
        return
    bench.interleaved(f"{what}, {name}", calls, calls=steps, what=what, dtype=name)


BUILD = """
import time
start = time.perf_counter()
import torch
after_torch = time.perf_counter()
import deepfuse as df
after_import = time.perf_counter()
model = df.build(sys.argv[1])
print(json.dumps({"df.build": time.perf_counter() - after_import, "warm": model.report.warm}))
"""


def build(bench: Bench) -> None:
    """The shipped model, batch 1 to 8, with an empty and with a filled compile cache."""
    with tempfile.TemporaryDirectory() as cache:
        for name, rounds in (("cold", 1), ("warm", 5)):
            found = [run_code(BUILD, str(SHIPPED), DEEPFUSE_CACHE_DIR=cache) for _ in range(rounds)]
            assert all(each.pop("warm") == (name == "warm") for each in found)
            what = f"build, {name}"
            seconds = statistics.median(each[PROCESS] for each in found)
            figures = {"df.build": _spread([each["df.build"] for each in found])}
            bench.row(what, figures, unit="s", **{"what": what, "seconds of the process": round(seconds, 3)})


IMPORT = """
import time
seconds = {}
for name in ("torch", "deepfuse", "transformers"):
    start = time.perf_counter()
    __import__(name)
    seconds["import " + name] = time.perf_counter() - start
print(json.dumps(seconds))
"""
HELP = """
import runpy
sys.argv = ["deepfuse", "--help"]
try:
    runpy.run_module("deepfuse", run_name="__main__", alter_sys=True)
finally:
    print("{}")
"""


def imports(bench: Bench) -> None:
    """``import deepfuse`` behind that of torch, transformers' behind both, and the command line's help."""
    found = [run_code(IMPORT) for _ in range(7)]
    for name in [name for name in found[0] if name != PROCESS]:
        bench.row(name, {"import": _spread([each[name] for each in found])}, what=name)
    found = [run_code(HELP) for _ in range(7)]
    bench.row("deepfuse --help", {"process": _spread([each[PROCESS] for each in found])}, what="deepfuse --help")


def _spread(seconds: list[float]) -> Timing:
    return summary(seconds) if len(seconds) > 1 else Timing(seconds[0], seconds[0], seconds[0])


if __name__ == "__main__":
    run_script(__file__)
