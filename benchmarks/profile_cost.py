"""What does a timeline cost: steps of the shipped model with `df.profile` around them and without, on one thread?

Steps are timed from outside, in blocks that take turns, one under a profile and one without; what a profile does before its
first step and after its last is not in them. `off` are the same steps without a profile, in the same model, which has been
profiled before; `never profiled` is another model of the same weights and shape, in the same turns.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

import deepfuse as df
from deepfuse.ir.device import CPU
from deepfuse.profiling.bench import Bench
from deepfuse.profiling.bench_suites import run_script
from deepfuse.profiling.timing import summary

MODEL = "v3-tiny"
CONTEXT, PROMPT = 64, 256
SEQUENCES, LENGTH = 2, 256
"""Of a training step."""
BLOCKS = 7
OFF, ON, NEVER = "off", "timeline", "never profiled"

Step = Callable[[], Any]
Profile = Callable[[], AbstractContextManager[Any]]


def suite(bench: Bench) -> None:
    torch.set_num_threads(1)
    if bench.wants("generation", seconds=120):
        # other rooms in the cache: graphs of their own, so that no clock ever comes into the second
        profiled, never = (df.build(MODEL, device="cpu", max_batch_size=1, max_seq_len=n) for n in (512, 520))
        bench.row("decode, context 64", blocks(profiled, decoding(profiled), decoding(never), steps=24))
        bench.row("prefill, 256 tokens", blocks(profiled, prefilling(profiled), prefilling(never), steps=4))
    if bench.wants("training", seconds=240):
        training = df.Training(steps=10_000, batch_size=SEQUENCES, seq_len=LENGTH)
        trainer = df.build(MODEL, device="cpu", training=training)
        tokens = np.random.default_rng(0).integers(trainer.model.config.vocab_size, size=10_000)
        bench.row(
            "training step, 2 x 256 tokens", blocks(trainer, lambda: trainer.train_step(tokens), None, steps=2, count=5)
        )


def decoding(model: df.Model) -> Step:
    engine = model.engine
    place = engine.cache.allocate(CONTEXT + 1)
    engine.prefill([[1] * CONTEXT], [place], last_only=True)

    def step() -> None:
        place.length = CONTEXT
        engine.decode([1], [place])

    return step


def prefilling(model: df.Model) -> Step:
    return lambda: model.engine.prefill([[1] * PROMPT], [None], last_only=True)


def blocks(profiled: Any, step: Step, other: Step | None, *, steps: int, count: int = BLOCKS) -> dict[str, Any]:
    """Times of steps: of ``profiled`` with a profile and without, and of another that never had one."""
    seconds: dict[str, list[float]] = {OFF: [], ON: []} | ({} if other is None else {NEVER: []})
    on: Profile = lambda: df.profile(profiled, warmup=1, device=CPU)
    kinds: dict[str, tuple[Step, Profile]] = {OFF: (step, nullcontext), ON: (step, on)}
    if other is not None:
        kinds[NEVER] = (other, nullcontext)
    for block in range(count + 1):
        for name, (call, around) in kinds.items():
            with around():
                # the first ones put clocks into the code, and warm it up
                times = [timed(call) for _ in range(steps + 2)][2:]
            if block:
                seconds[name] += times
    return {name: summary(values) for name, values in seconds.items()}


def timed(call: Step) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    run_script(__file__)
