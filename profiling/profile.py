"""Profile a built model: which block, layer and op its time goes to, step by step.

    with df.profile(model, "runs/a") as run:
        model.generate("Once upon a time", max_new_tokens=32)
    print(run)

The first call of each graph is repeated before it is recorded, as warm-up: graphs write what they are given where they
are told, so that doing it twice changes nothing. Only then is a graph's code copied with clocks in it
(:mod:`deepfuse.profiling.instrument`), whose kernels are compiled the first time.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from deepfuse.ir.device import Device, measured_cpu
from deepfuse.passes.sites import Site
from deepfuse.profiling.instrument import Instrumented, Readings, code_called_by, replaced, spans_of
from deepfuse.profiling.model_ranges import ranged
from deepfuse.profiling.page import write_page
from deepfuse.profiling.roofline import limits_of
from deepfuse.profiling.run import Run
from deepfuse.profiling.tensorboard_log import check_installed, installed, write_log
from deepfuse.profiling.timeline import Part, Step
from deepfuse.profiling.torch_trace import TorchTraces
from deepfuse.profiling.trace import write_trace
from deepfuse.runtime.model import Model

Recorded = tuple[str, int, int, int, int, Readings, dict[str, int]]
"""What :class:`Step` has, its spans as they were read."""


@contextmanager
def profile(
    model: Model,
    out: str | Path | None = None,
    *,
    warmup: int = 2,
    steps: int | None = None,
    device: Device | None = None,
    nvtx: bool = False,
    shapes: bool = False,
    memory: bool = False,
    stacks: bool = False,
    tensorboard: bool | None = None,
) -> Iterator[Run]:
    """Record what the graphs of a model do inside.

    Args:
        model: compiled, on a CPU.
        out: directory to make, for ``run.json``, ``trace.json.gz`` (Perfetto, chrome://tracing) and
            ``<graph>.pt.trace.json.gz`` (TensorBoard); ``None`` writes nothing.
        warmup: how often the first call of each graph is repeated before it counts.
        steps: how many calls of each graph are recorded; ``None`` for all.
        device: whose limits the roofline is drawn with; this CPU's are measured where it is ``None``, in a second.
        nvtx: whether kernels have NVTX ranges by block and op, for a tool such as Nsight Systems. Without ``out`` ranges are
            all there is: nothing is recorded, and the model may be on any device, and uncompiled.
        shapes, memory, stacks: of operands, each allocation, and of Python, in TensorBoard's traces, which are of further
            steps (:mod:`deepfuse.profiling.torch_trace`).
        tensorboard: whether scalars and text are written for it; ``None``: where the package is here.

    Yields:
        The :class:`Run`, which is complete when the block ends.

    Raises:
        TypeError, ValueError: the model is none that can be profiled, a number is out of range, or nothing ran inside.
        FileExistsError, OSError: ``out`` is there already, or cannot be made.
        RuntimeError: neither the package nvtx nor PyTorch's own ranges are there.
    """
    _check(model, warmup, steps, recorded=out is not None or not nvtx)
    if out is None and (shapes or memory or stacks or tensorboard):
        raise ValueError("profile: want a directory for shapes, memory, stacks or tensorboard, got none")
    if tensorboard:
        check_installed("tensorboard")
    ranges = ranged(model) if nvtx else nullcontext()
    if nvtx and out is None:
        with ranges:
            yield Run(model=model.report.model, dtype=model.report.dtype, **_machine())
        return
    folder = None if out is None else Path(out)
    if folder is not None:
        check_out(folder)
        _make(folder)
    traces = None if folder is None else TorchTraces(shapes=shapes, memory=memory, stacks=stacks)
    run = Run(model=model.report.model, dtype=model.report.dtype, **_machine())
    try:
        recorded: list[Recorded] = []
        with (
            ranges,
            ExitStack() as clocks,
            model.engine.wrapped(
                lambda name, graph: _Recorder(name, graph, model, run, recorded, clocks, warmup, steps, traces)
            ),
        ):
            yield run
        run.steps += [_step(r) for r in recorded]
        if not run.steps:
            raise ValueError("profile: want a step of the model inside the block, got none; call or generate inside")
        run.build = _build_of(model)
        run.limits = limits_of(measured_cpu() if device is None else device)
    except BaseException:
        if folder is not None:
            folder.rmdir()
        raise
    if folder is not None and traces is not None:
        run.write(folder / "run.json")
        write_trace(run, folder / "trace.json.gz")
        traces.write(folder)
        write_page(run, model.report.journal.graphs, folder / "page.html")
        if installed("tensorboard") if tensorboard is None else tensorboard:
            write_log(run, folder)


def _check(model: Any, warmup: Any, steps: Any, *, recorded: bool) -> None:
    if not isinstance(model, Model):
        raise TypeError(
            f"profile: want a Model, as deepfuse.build returns it for generation, got {type(model).__name__}"
        )
    if recorded and not model.report.compiled:
        raise ValueError("profile: want a compiled model, got one built with compile=False")
    if recorded and model.engine.device.type != "cpu":
        raise ValueError(f"profile: want a model on the CPU, got one on {model.engine.device}")
    if not isinstance(warmup, int) or warmup < 1:
        raise ValueError(f"profile: want warmup as an integer >= 1, got {warmup!r}")
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ValueError(f"profile: want steps as an integer >= 1 or None, got {steps!r}")


def _build_of(model: Model) -> dict[str, Any]:
    report = model.report
    matches = {g.name: {p.name: p.rewrites for p in g.passes} for g in report.journal.graphs}
    counts = {name: getattr(report, name) for name in ("graph_breaks", "recompiles", "graphs_from_cache")}
    return {"matches": matches, **counts}


def check_out(path: Path) -> None:
    """Whether a run may be written to ``path``, for who builds a model first.

    Raises:
        FileExistsError, OSError: it is there already, or could not be made.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"profile: want a run directory that is not there yet, got {path}")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "nothing can be written there" if above.is_dir() else "it is a file"
        raise OSError(f"profile: want a run directory that can be made, got {path}: {above}: {why}")


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"profile: want a run directory that can be made, got {path}: {error.strerror}") from None


def _machine() -> dict[str, Any]:
    return {
        "device": _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), os.uname().machine)


class _Recorder:
    """A graph of an engine whose calls are recorded."""

    def __init__(
        self,
        name: str,
        graph: Callable[..., Any],
        model: Model,
        run: Run,
        recorded: list[Recorded],
        clocks: ExitStack,
        warmup: int,
        steps: int | None,
        traces: TorchTraces | None,
    ):
        self.name, self.graph, self.model, self.run, self.recorded = name, graph, model, run, recorded
        self.clocks, self.warmup, self.left, self.traces = clocks, warmup, steps, traces
        self.code: Instrumented | None = None

    def __call__(self, *args: Any) -> Any:
        if self.left == 0:
            return self.graph(*args)
        if self.code is None:
            self.code = self._with_clocks(args)
        result, recorded = self._recorded(self.code, args)
        self.recorded.append(recorded)
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.uninstall()
        return result

    def _recorded(self, code: Instrumented, args: tuple[Any, ...]) -> tuple[Any, Recorded]:
        began = time.perf_counter_ns()
        result = self.graph(*args)
        ended = time.perf_counter_ns()
        return result, (self.name, began, ended, code.began, code.ended, code.readings(), dict(code.sizes))

    def _with_clocks(self, args: tuple[Any, ...]) -> Instrumented:
        owner, source = code_called_by(lambda: self.graph(*args))
        code = Instrumented(source, owner)
        sites = next(g.sites for g in self.model.report.journal.graphs if g.name == self.name)
        self.run.parts[self.name] = [
            [_part(kernel.name, own, taken_in, sites) for own, taken_in in kernel.parts] for kernel in code.kernels
        ]
        mine = self.clocks.enter_context(ExitStack())
        mine.enter_context(replaced(owner, code))
        self.uninstall = mine.close
        for _ in range(self.warmup):
            self.graph(*args)
        if self.traces is not None:
            self.traces.record(self.name, lambda: _step(self._recorded(code, args)[1]), self.run.parts[self.name])
        return code


def _step(recorded: Recorded) -> Step:
    return Step(*recorded[:5], spans_of(recorded[5]), recorded[6])


def _part(kernel: str, own: tuple[int, ...], taken_in: tuple[int, ...], sites: list[Site]) -> Part:
    return Part(kernel, tuple(sites[i] for i in own), tuple(sites[i] for i in taken_in))
