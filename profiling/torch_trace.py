"""Traces in torch.profiler's own format, for TensorBoard's plugin and for who wants shapes, memory or stacks.

    <folder>/<graph>.pt.trace.json.gz        what ``torch.profiler.tensorboard_trace_handler`` would have written
    <folder>/<graph>.memory.pickle           with ``memory``, of graphs on a GPU: PyTorch's snapshot of its allocator

They are recorded in steps of their own, since torch.profiler slows down what it looks at: the first call of each graph is
repeated, as for the warm-up. Inside of a compiled graph it sees allocations and calls of libraries alone. So our blocks
and sites stand beside them, from the clocks of the same steps, in a thread of their own (``deepfuse``): the plugin lists
them as operators.

The plugin (torch-tb-profiler 0.4.3, its last release) has an older word for the category of calls of CUDA, without which it
finds no kernel's operator. It is given that word.
"""

import gzip
import json
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function, schedule
from torch.profiler import profile as torch_profile

from deepfuse.ir.private import cuda_memory_snapshot
from deepfuse.profiling.timeline import Part, Step
from deepfuse.profiling.trace import ROWS, kernel_events

STEPS = 3
"""Recorded of each graph: the plugin compares steps."""
SUFFIX = ".pt.trace.json.gz"
THREAD = 2**31 - 1
"""Number of our row: no thread of a process has it."""
TICK = 2.0**-10
"""Microseconds: a nanosecond that sums of floats keep exactly."""
OLDER_WORDS = {"cuda_runtime": "runtime", "cuda_driver": "runtime"}

Trace = dict[str, Any]


class TorchTraces:
    """Records graphs, and writes the traces when all is done."""

    def __init__(self, *, shapes: bool = False, memory: bool = False, stacks: bool = False):
        """``shapes`` of operands, ``memory`` (each allocation) and ``stacks`` of Python are recorded where asked for."""
        self.options: dict[str, Any] = {"record_shapes": shapes, "profile_memory": memory, "with_stack": stacks}
        self.traces: dict[str, Trace] = {}
        self.snapshots: dict[str, Any] = {}

    def record(self, graph: str, call: Callable[[], Step], parts: list[list[Part]]) -> None:
        """Add the trace of one graph.

        Args:
            call: runs it once, and says what our clocks saw.
            parts: kernel -> part.
        """
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        steps: list[tuple[int, Step]] = []
        with (
            _quiet(),
            torch_profile(
                activities=activities,
                schedule=schedule(wait=0, warmup=1, active=STEPS, repeat=1),
                acc_events=True,  # of its only cycle; without it torch 2.11 warns
                **self.options,
            ) as profiler,
        ):
            for _ in range(1 + STEPS):
                before = time.perf_counter_ns()
                with record_function(graph):
                    # its range in the trace began between these two
                    began = (before + time.perf_counter_ns()) // 2
                    steps.append((began, call()))
                profiler.step()
        with _quiet():
            trace = _exported(profiler)
        events = in_older_words(trace["traceEvents"])
        ranges = sorted(e["ts"] for e in events if e["name"] == graph and e.get("cat") == "user_annotation")
        trace["traceEvents"] = events + list(_ours(dict(zip(ranges, steps[1:], strict=True)), parts))
        self.traces[graph] = trace
        if self.options["profile_memory"] and torch.cuda.is_available():
            self.snapshots[graph] = cuda_memory_snapshot(call)

    def write(self, folder: Path) -> None:
        for graph, trace in self.traces.items():
            with gzip.open(folder / f"{graph}{SUFFIX}", "wt") as file:
                json.dump(trace, file)
        for graph, snapshot in self.snapshots.items():
            (folder / f"{graph}.memory.pickle").write_bytes(pickle.dumps(snapshot))


def in_older_words(events: list[Trace]) -> list[Trace]:
    """Events of a trace with the categories that the plugin knows."""
    return [{**e, "cat": OLDER_WORDS.get(e["cat"], e["cat"])} if "cat" in e else e for e in events]


def _exported(profiler: torch_profile) -> Trace:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(), strict=False)


def _ours(steps: Mapping[float, tuple[int, Step]], parts: list[list[Part]]) -> Iterator[Trace]:
    """Our names, in the process of the rest.

    Args:
        steps: where the trace has a step, in its microseconds -> when that was by our clock, and the step.
    """
    ours = {"pid": os.getpid(), "tid": THREAD}
    yield {"ph": "M", "name": "thread_name", "ts": 0, "args": {"name": "deepfuse"}, **ours}
    # the first of the threads
    yield {"ph": "M", "name": "thread_sort_index", "ts": 0, "args": {"sort_index": -1}, **ours}
    for began, (origin, step) in steps.items():
        for event in kernel_events(parts, step, origin):
            starts, ends = (_exact(began, after) for after in (event["ts"], event["ts"] + event["dur"]))
            if event["cat"] == ROWS[3] and ends > starts:
                ends -= TICK  # else a block of one part might be taken for what lies inside of it
            yield {**event, "cat": "cpu_op", "ts": starts, "dur": ends - starts, **ours}


def _exact(began: float, after: float) -> float:
    """Their sum in microseconds, to a tick: times since the system's epoch, whose sums and differences are then exact.

    The plugin reads two events of which one ends when the next begins as nested if rounding makes them overlap.
    """
    return round((began + round(after * 1e3) / 1e3) / TICK) * TICK


@contextmanager
def _quiet() -> Iterator[None]:
    """Kineto complains about GPUs that are not there, and says when it begins."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = "99" if before is None else before
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
