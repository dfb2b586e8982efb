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
from deepfuse.profiling.roofline import limits_of
from deepfuse.profiling.run import Run
from deepfuse.profiling.timeline import Part, Step
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
) -> Iterator[Run]:
    """Record what the graphs of a model do inside.

    Args:
        model: compiled, on a CPU.
        out: directory to make, for ``run.json`` and ``trace.json.gz`` (Perfetto, chrome://tracing); ``None`` writes
            nothing.
        warmup: how often the first call of each graph is repeated before it counts.
        steps: how many calls of each graph are recorded; ``None`` for all.
        device: whose limits the roofline is drawn with; this CPU's are measured where it is ``None``, in a second.
        nvtx: whether kernels have NVTX ranges by block and op, for a tool such as Nsight Systems. Without ``out`` ranges are
            all there is: nothing is recorded, and the model may be on any device, and uncompiled.

    Yields:
        The :class:`Run`, which is complete when the block ends.

    Raises:
        TypeError, ValueError: the model is none that can be profiled, a number is out of range, or nothing ran inside.
        FileExistsError, OSError: ``out`` is there already, or cannot be made.
        RuntimeError: neither the package nvtx nor PyTorch's own ranges are there.
    """
    _check(model, warmup, steps, recorded=out is not None or not nvtx)
    ranges = ranged(model) if nvtx else nullcontext()
    if nvtx and out is None:
        with ranges:
            yield Run(model=model.report.model, dtype=model.report.dtype, **_machine())
        return
    folder = None if out is None else Path(out)
    if folder is not None:
        check_out(folder)
        _make(folder)
    run = Run(model=model.report.model, dtype=model.report.dtype, **_machine())
    try:
        recorded: list[Recorded] = []
        with (
            ranges,
            ExitStack() as clocks,
            model.engine.wrapped(
                lambda name, graph: _Recorder(name, graph, model, run, recorded, clocks, warmup, steps)
            ),
        ):
            yield run
        run.steps += [Step(*r[:5], spans_of(r[5]), r[6]) for r in recorded]
        if not run.steps:
            raise ValueError("profile: want a step of the model inside the block, got none; call or generate inside")
        run.limits = limits_of(measured_cpu() if device is None else device)
    except BaseException:
        if folder is not None:
            folder.rmdir()
        raise
    if folder is not None:
        run.write(folder / "run.json")
        write_trace(run, folder / "trace.json.gz")


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


def check_out(path: Path) -> None:
    """Whether a run may be written to ``path``, for who builds a model first.

    Raises:
        FileExistsError: it is there already.
    """
    if os.path.exists(path):
        raise FileExistsError(f"profile: want a run directory that is not there yet, got {path}")


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
    ):
        self.name, self.graph, self.model, self.run, self.recorded = name, graph, model, run, recorded
        self.clocks, self.warmup, self.left = clocks, warmup, steps
        self.code: Instrumented | None = None

    def __call__(self, *args: Any) -> Any:
        if self.left == 0:
            return self.graph(*args)
        if self.code is None:
            self.code = self._with_clocks(args)
        began = time.perf_counter_ns()
        result = self.graph(*args)
        ended = time.perf_counter_ns()
        code = self.code
        self.recorded.append((self.name, began, ended, code.began, code.ended, code.readings(), dict(code.sizes)))
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.uninstall()
        return result

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
        return code


def _part(kernel: str, own: tuple[int, ...], taken_in: tuple[int, ...], sites: list[Site]) -> Part:
    return Part(kernel, tuple(sites[i] for i in own), tuple(sites[i] for i in taken_in))
