"""One of two ranks of ``overlap.py``: a mixture of experts over a link, timed with other ranks in step.

    python overlap_ranks.py SPEC      SPEC is JSON; rank 0 prints what was measured, as JSON, in its last line

Both ranks start a step at a barrier, and a step has taken what it took on the slower one.
"""

import functools
import gc
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measured_rates import measured_device, measured_link
from rank_group import in_group
from torch import Tensor, fx, nn

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.collectives import all_to_all
from deepfuse.blocks.config import Config
from deepfuse.blocks.expert_parallel import to_expert_parallel
from deepfuse.blocks.moe import MoE
from deepfuse.blocks.presets import PRESETS
from deepfuse.ir.link import Link
from deepfuse.ir.private import compile_inner, pin, with_own_code
from deepfuse.passes.graph_tasks import is_kernel, start_of
from deepfuse.passes.pipeline import default
from deepfuse.passes.runner import Runner

Step = Callable[[], object]
NAME = "overlap_all_to_all"
CHUNKS = 2
CHUNKED = f"{NAME}, {CHUNKS} chunks"
WITHOUT, SEQUENTIAL = "without", "one after the other"
COMPUTE, INDEPENDENT, COMMUNICATION = "compute alone", "independent compute alone", "communication alone"
INDUCTOR: Mapping[str, Any] = {
    "reorder_for_compute_comm_overlap": True,
    "aten_distributed_optimizations.enable_overlap_scheduling": True,
    "aten_distributed_optimizations.compute_estimator": "analytical",
    "aten_distributed_optimizations.collective_estimator": "analytical",
}
"""What Inductor has of its own for overlap."""


class Sequential(Runner):
    """No kernel runs before the waits that stand before it: Inductor's own order has some of them under a transfer."""

    def _last(self, graph: fx.Graph) -> None:
        self.run(graph, "last")
        waits: list[fx.Node] = []
        after: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if start_of(node) is not None:
                waits = [node]
            elif waits and is_kernel(node):
                after[node] = list(waits)
        pin(graph, after)


def layer_config(spec: Mapping[str, Any]) -> Config:
    """A layer of experts as the spec has it."""
    return replace(
        PRESETS["v3-tiny"](),
        hidden_size=spec["hidden"],
        n_routed_experts=spec["experts"],
        num_experts_per_tok=spec["experts_per_token"],
        moe_intermediate_size=spec["intermediate"],
        n_shared_experts=spec["shared"],
        n_group=1,
        topk_group=1,
    )


def layer(config: Config, axis: Axis, chunks: int = 1) -> MoE:
    """With the same numbers on every rank; routing is balanced up to chance."""
    torch.manual_seed(0)
    moe = MoE(config)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    holder: Any = nn.ModuleDict({"moe": moe})
    holder.cuts = {}  # where a model notes how its checkpoint is cut
    to_expert_parallel(holder, axis, chunks=chunks)
    return moe.eval()


def compiled(
    moe: nn.Module,
    x: Tensor,
    settings: Mapping[str, Any],
    *,
    backward: bool,
    ours: bool = False,
    options: Mapping[str, Any] | None = None,
    kind: type[Runner] = Runner,
) -> tuple[Step, Runner]:
    """A step of the layer, and the runner with what its passes said."""
    pipeline = default() if ours else default().without(NAME)
    settings = {"providers": {}, "max_seq_len": len(x), **settings}
    # from a cache, passes would say nothing
    runner = kind(pipeline, settings, strict=True, salt=str(time.time_ns()))
    backend = functools.partial(compile_inner, options={**runner.options(), **(options or {})})
    fn = torch.compile(with_own_code(_call), fullgraph=True, dynamic=False, backend=backend)
    return _step(lambda x: fn(moe, x), moe, x, backward), runner


def _call(moe: nn.Module, x: Tensor) -> Tensor:
    return moe(x)


def _step(fn: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, backward: bool) -> Step:
    def run() -> Tensor:
        if not backward:
            with torch.no_grad():
                return fn(x)
        for parameter in module.parameters():
            parameter.grad = None
        out = fn(x.detach().requires_grad_())
        out.backward(x)
        return out

    return run


def timed(alternatives: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Name -> seconds of each round, of the slower rank; alternatives take turns."""
    for run in alternatives.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    gc.disable()
    for _ in range(rounds):
        for name, run in alternatives.items():
            dist.barrier()
            began = time.perf_counter()
            run()
            taken = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            times[name].append(float(taken))
    gc.enable()
    return times


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def exchanges(x: Tensor, spec: Mapping[str, Any], axis: Axis, backward: bool) -> Step:
    """What travels in a step, alone: counts, dispatch and combine, and the gradients of the last two."""
    rows = len(x) * spec["experts_per_token"] // 2
    message = torch.zeros(2 * rows, x.shape[1])
    load = torch.zeros(spec["experts"], dtype=torch.int64)

    def run() -> None:
        each = spec["experts"] // 2
        all_to_all(load, [each] * 2, [each] * 2, axis)
        for _ in range(4 if backward else 2):
            all_to_all(message, [rows] * 2, [rows] * 2, axis)

    return run


def peak_bytes(run: Step) -> int:
    """Largest memory that the allocator has given out in a step, beyond what it had before."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    totals = [
        (e["ts"], e["args"]["Total Allocated"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"
    ]
    totals.sort()
    return max(total for _, total, _ in totals) - (totals[0][1] - totals[0][2])


def measure(spec: Mapping[str, Any], axis: Axis, alone: Axis, link: Link) -> dict[str, Any]:
    """One number of tokens: the step of each alternative, and its parts alone where ``spec`` asks for them."""
    config = layer_config(spec)
    tokens, backward = spec["tokens"], spec["backward"]
    torch.manual_seed(1 + axis.rank)
    x = torch.randn(tokens, config.hidden_size)
    assert config.n_shared_experts is not None
    width = config.n_shared_experts * config.moe_intermediate_size
    settings = {"device": measured_device(max(tokens, 64), config.hidden_size, width, timed), "link": link}
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        moe = layer(config, axis)
        build = functools.partial(compiled, moe, x, settings, backward=backward)
        if spec["parts"] == "independent":
            return {"times": timed({INDEPENDENT: independent(moe, x, settings, backward)}, spec["rounds"])}
        plain, _ = build()
        ours, runner = build(ours=True)
        steps = {WITHOUT: plain, NAME: ours}
        left_out = ""
        if spec["parts"]:
            steps[SEQUENTIAL], _ = build(kind=Sequential)
            chunked = layer(config, axis, CHUNKS)
            steps[CHUNKED], of_chunks = compiled(chunked, x, settings, backward=backward, ours=True)
            local = layer(replace(config, n_routed_experts=spec["experts"] // 2), alone)
            steps[COMPUTE], _ = compiled(local, x, settings, backward=backward)
            steps[INDEPENDENT] = independent(moe, x, settings, backward)
            steps[COMMUNICATION] = exchanges(x, spec, axis, backward)
            try:
                theirs, _ = build(options=INDUCTOR)
                theirs()
                steps["Inductor's overlap scheduling"] = theirs
            except Exception as error:  # noqa: BLE001 - it is made for GPUs, and what it lacks here is not ours to know
                left_out = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        equal = torch.equal(plain(), ours())  # type: ignore[arg-type]
        times = timed(steps, spec["rounds"])
    said = notes(runner)
    found: dict[str, Any] = {"times": times, "notes": said, "equal": equal, "left_out": left_out}
    if spec["parts"]:
        weights = sum(p.numel() * p.element_size() for p in moe.parameters())
        found["peak"] = {name: weights + peak_bytes(steps[name]) for name in (SEQUENTIAL, NAME, CHUNKED)}
        found["chunked"] = notes(of_chunks)
    return found


def notes(runner: Runner) -> list[str]:
    """What the pass says of the graphs that were compiled."""
    return [note for g in runner.journal.graphs for p in g.passes if p.name == NAME for note in p.notes]


def independent(moe: MoE, x: Tensor, settings: Mapping[str, Any], backward: bool) -> Step:
    """The shared expert alone."""
    shared = moe.shared_experts
    assert shared is not None
    step, _ = compiled(shared, x, settings, backward=backward)
    return step


def main(specs: list[dict[str, Any]], axis: Axis) -> list[dict[str, Any]]:
    """What is measured of each, with one link."""
    groups: list[Any] = [dist.new_group([r]) for r in range(axis.size)]
    alone = Axis("expert", groups[axis.rank].group_name, 1, 0)
    link = measured_link(axis, timed)
    return [measure(spec, axis, alone, link) for spec in specs]


if __name__ == "__main__":
    in_group(main)
