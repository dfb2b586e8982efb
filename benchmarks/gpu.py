"""How fast are kernels and a whole model on this GPU, beside PyTorch, and what share of its limits do they reach?

Within nine minutes. FP8 products over DeepSeek-V3's shapes, beside PyTorch's and bfloat16; attention; products in groups;
fusions with quantize: two minutes that compile little. Then a model of DeepSeek-V2-Lite's shape with random weights, in
bfloat16 and FP8, beside transformers eager and, last, compiled; building it, with an empty and a filled cache. Kernels are timed by the device's own clock, with the L2
cache cold (flushed before each call) and warm, models by the host's. From a plain checkout, with torch 2.11 and without
the packages of the command line:

    PYTHONPATH=src python benchmarks/gpu.py --json benchmarks/results/gpu.json
"""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from attention import decode, prompts
from canary import refused
from cases import SPARE_SECONDS, Ceilings, Part, attempt, measure, run_parts
from fusions import fusions
from products import dense, grouped
from v2_lite import STEPS, Ours, Transformers

import deepfuse as df
from deepfuse.blocks.parameters import count_parameters
from deepfuse.blocks.presets import v2_lite
from deepfuse.profiling.bench import Bench
from deepfuse.profiling.bench_suites import run_script
from deepfuse.profiling.device_timing import first_error
from deepfuse.profiling.timing import interleaved

DEVICE = "cuda"
BUDGET = 540.0
UNTRIED = ("fp8_matmul.gluon", "fp8_grouped_matmul.gluon")
"""Providers that are run in another process first."""
MEASURING_SECONDS = 40.0
"""That decode and prefill of all models take."""
WHAT = "the shape of DeepSeek-V2-Lite, random weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured; tests take small ones.

    Attributes:
        dense, grouped, fusions, decode, prompts: arguments of the generators of cases.
        ceilings: of :func:`~deepfuse.profiling.measured_gpu.measured_gpu`.
        config, batches, context, prompt, compile: of the model.
        rounds: of a kernel; of a model half as many.
    """

    dense: dict[str, Any] = field(default_factory=dict)
    grouped: dict[str, Any] = field(default_factory=dict)
    fusions: dict[str, Any] = field(default_factory=dict)
    decode: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, int] = field(default_factory=dict)
    config: df.Config = field(default_factory=v2_lite)
    batches: tuple[int, ...] = (1, 8, 64)
    context: int = 1024
    prompt: int = 2048
    compile: bool = True
    rounds: int = 20


def suite(bench: Bench, sizes: Sizes = Sizes()) -> None:
    # a compile cache of its own: a build is cold once, whatever ran before
    with (
        tempfile.TemporaryDirectory(prefix="deepfuse-bench-", ignore_cleanup_errors=True) as cache,
        mock.patch.dict(os.environ, {"DEEPFUSE_CACHE_DIR": cache}),
    ):
        run_parts(bench, Gpu(bench, sizes).parts())


class Gpu:
    """The parts, and what they share: the measured ceilings, and which providers fail here."""

    def __init__(self, bench: Bench, sizes: Sizes):
        self.bench, self.sizes, self.device = bench, sizes, bench.torch_device
        self.ceilings = Ceilings(self.device, **sizes.ceilings)

    def parts(self) -> Iterator[Part]:
        sizes = self.sizes
        yield self.ceilings.part()
        yield "dense products", 90, lambda _: self.cases(dense, {**sizes.dense, "refused": self.refused()})
        yield "attention", 40, lambda _: self.cases(decode, sizes.decode, prompts, sizes.prompts)
        yield "grouped products", 40, lambda _: self.cases(grouped, {**sizes.grouped, "refused": self.refused()})
        yield "fusions", 20, lambda _: self.cases(fusions, sizes.fusions)
        yield "model", 150, self.models
        yield "build, filled cache", 40, self.warm_build
        yield "transformers compiled", 90, self.compiled_peer

    @functools.cache  # noqa: B019 - it lives as long as the run
    def refused(self) -> dict[str, str]:
        """Of the providers that are untried."""
        found = refused(UNTRIED, self.device)
        for name, why in found.items():
            self.bench.leave_out(name, why)
        return found

    def cases(self, *made: Any) -> None:
        """Generators of cases, each followed by its arguments."""
        for make, arguments in zip(made[::2], made[1::2], strict=True):
            measure(self.bench, make(self.device, **arguments), self.ceilings.limits, rounds=self.sizes.rounds)

    def models(self, bench: Bench) -> None:
        """Ours in both formats and transformers eager, in turn; in FP8 if there is time for another build."""
        models: dict[str, Ours | Transformers] = {}
        build_seconds = self.add_ours(models, "bfloat16")
        eager = self.attempt(
            "transformers eager", lambda: Transformers(self.sizes.config, device=self.device, compiled=False)
        )
        if eager is not None:
            models["transformers eager"] = eager
        needed = build_seconds + MEASURING_SECONDS
        if bench.seconds_left < needed:
            bench.leave_out("deepfuse fp8", f"takes some {needed:.0f} s, {bench.seconds_left:.0f} s are left")
        else:
            self.add_ours(models, "fp8")
        self.rows(models, "")

    def add_ours(self, models: dict[str, Ours | Transformers], dtype: str) -> float:
        """Seconds of the build, which are a row too; 0 where it fails."""
        ours = self.attempt(f"deepfuse {dtype}", lambda: self.ours(dtype))
        if ours is None:
            return 0.0
        models[f"deepfuse {dtype}"] = ours
        return self.build_row(f"build, {dtype}, empty cache", ours)

    def compiled_peer(self, bench: Bench) -> None:
        """By itself, and last: it compiles for each batch."""
        peer = Transformers(self.sizes.config, device=self.device, compiled=True)
        self.rows({"transformers compiled": peer}, ", compiled peer")

    def warm_build(self, bench: Bench) -> None:
        """Once more, the graphs read from the compile cache that the part ``model`` filled."""
        ours = self.ours("bfloat16")
        if ours.model.report.warm:
            self.build_row("build, bfloat16, filled cache", ours)
        else:
            bench.leave_out("build, bfloat16, filled cache", "the cache has no graphs of it")

    def ours(self, dtype: str) -> Ours:
        sizes = self.sizes
        return Ours(
            sizes.config,
            device=self.device,
            fp8=dtype == "fp8",
            batches=sizes.batches,
            max_seq_len=max(sizes.context + STEPS, sizes.prompt),
            compile=sizes.compile,
        )

    def build_row(self, name: str, ours: Ours) -> float:
        """Weights are there already: passes, compiling and recording."""
        report = ours.model.report
        graphs = report.graphs_at_build
        self.bench.row(name, {"deepfuse": report.build_seconds}, unit="s", graphs=graphs, what=WHAT)
        return report.build_seconds

    def rows(self, models: Mapping[str, Ours | Transformers], suffix: str) -> None:
        """Decode at each batch, and prefill."""
        sizes = self.sizes
        prefill = f"prefill, {sizes.prompt} tokens{suffix}"
        self.row(prefill, models, lambda model: model.prefill(sizes.prompt), calls=1, tokens=sizes.prompt)
        for batch in sizes.batches:
            name = f"decode, batch {batch}, context {sizes.context}{suffix}"
            steps = partial(_steps, batch=batch, context=sizes.context)
            self.row(name, models, steps, calls=STEPS, tokens=batch, bound=batch == 1)
            for model in models.values():
                model.release()

    def row(
        self,
        name: str,
        models: Mapping[str, Any],
        call: Callable[[Any], Callable[[], object]],
        *,
        calls: int,
        tokens: int,
        bound: bool = False,
    ) -> None:
        """Those of the models that come through a first call.

        Args:
            calls: of what is counted, in one call; each is of so many tokens.
            bound: whether a call reads the weights of one token, at least.
        """
        able: dict[str, Callable[[], object]] = {}
        for label, model in models.items():
            if self.bench.seconds_left < SPARE_SECONDS:
                self.bench.leave_out(f"{name}: {label}", "the budget is spent")
                continue
            fn = self.attempt(f"{name}: {label}", partial(call, model))
            error = None if fn is None else first_error(fn, self.device)
            if error is not None:
                self.bench.leave_out(f"{name}: {label}", error)
            elif fn is not None:
                able[label] = fn
        if not able:
            return
        timings = interleaved(able, rounds=max(self.sizes.rounds // 2, 5))
        seconds = {label: timing.median / calls for label, timing in timings.items()}
        facts: dict[str, Any] = {"tokens/s": {label: round(tokens / s, 1) for label, s in seconds.items()}}
        if bound:
            size = count_parameters(self.sizes.config).active * torch.bfloat16.itemsize
            least = size / self.ceilings.limits.memory_bandwidth
            facts["share of reading the active weights"] = {
                label: round(least / s, 3) for label, s in seconds.items() if not label.endswith("fp8")
            }
        self.bench.row(name, timings, calls=calls, what=WHAT, **facts)

    def attempt(self, name: str, make: Callable[[], Any]) -> Any:
        """What is made, or ``None``, and the error is kept."""
        made, error = attempt(make, self.device)
        if made is None:
            self.bench.leave_out(name, error)
        return made


def _steps(model: Ours | Transformers, *, batch: int, context: int) -> Callable[[], None]:
    return model.steps(batch, context)


if __name__ == "__main__":
    run_script(__file__)
