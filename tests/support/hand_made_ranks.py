"""Runs of several processes, made by hand: steps of kernels and collectives at given times, in nanoseconds."""

from collections.abc import Iterable, Sequence

from deepfuse.passes.collective_call import WAIT
from deepfuse.passes.sites import Site
from deepfuse.profiling.clock_offset import Clock, Offset
from deepfuse.profiling.rank_run import Process
from deepfuse.profiling.run import Run
from deepfuse.profiling.timeline import Part, Span, Step

GROUP, MODULE, GRAPH = "0", "layers.0.mlp", "decode_1"
ALL_TO_ALL, COMBINE, REDUCE = (
    f"{MODULE}.{name}" for name in ("all_to_all_single", "all_to_all_single #2", "all_reduce")
)
MATMUL, SHARED = f"{MODULE}.grouped_matmul", f"{MODULE}.shared_experts.linear"
_C10D = "torch.ops._c10d_functional"
_MESSAGE = {"dtype": "float32", "group": GROUP, "message": "256*u0"}
KERNELS = {
    "start": (f"{_C10D}.all_to_all_single.default", Site(1, MODULE, "all_to_all_single", **_MESSAGE)),
    "wait": (f"{_C10D}.wait_tensor.default", Site(2, MODULE, WAIT, start=1)),
    "again": (f"{_C10D}.all_to_all_single.default", Site(3, MODULE, "all_to_all_single", **_MESSAGE)),
    "wait again": (f"{_C10D}.wait_tensor.default", Site(4, MODULE, WAIT, start=3)),
    "reduce": (f"{_C10D}.all_reduce_.default", Site(5, MODULE, "all_reduce", **_MESSAGE)),
    "wait reduce": (f"{_C10D}.wait_tensor.default", Site(6, MODULE, WAIT, start=5)),
    "matmul": ("extern_kernels.mm", Site(7, MODULE, "grouped_matmul")),
    "shared": ("extern_kernels.addmm", Site(8, f"{MODULE}.shared_experts", "linear")),
    # a loop that Inductor names after the collective it copies for
    "copy": ("cpp_fused_all_to_all_single_0", Site(1, MODULE, "all_to_all_single", **_MESSAGE)),
}
Done = tuple[str, int, int]


def made_run(*steps: Sequence[Done], graphs: Sequence[str] = (), around: int = 0) -> Run:
    """A run of steps; each is what was done from when to when, with ``around`` of wrapper and of guards at both ends."""
    names = list(KERNELS)
    run = Run(model="m", dtype="float32", device="cpu", threads=1, torch="2", date="2026-01-01")
    for number, done in enumerate(steps):
        graph = graphs[number] if graphs else GRAPH
        run.parts.setdefault(graph, [[Part(kernel, (site,), ())] for kernel, site in KERNELS.values()])
        spans = [Span(names.index(name), 0, began, ended) for name, began, ended in done]
        began, ended = spans[0].began - around, spans[-1].ended + around
        run.steps.append(Step(graph, began - around, ended + around, began, ended, spans, {"u0": 2}))
    return run


def process(
    rank: int, ranks: Iterable[int] = (0, 1), *, ns: float = 0.0, off: float = 0.0, session: str = "s"
) -> Process:
    """A process whose clock is ``ns`` behind that of the first, give or take ``off``."""
    ranks = tuple(ranks)
    clock = Clock(Offset(0, ns, off), Offset(10**9, ns, off))
    return Process(session=session, rank=rank, ranks=ranks, host="here", groups={GROUP: ranks}, clock=clock)
