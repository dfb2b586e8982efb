"""Profile a built model: which block, layer and op its time goes to, step by step.

    with df.profile(model, "runs/a") as run:
        model.generate("Once upon a time", max_new_tokens=32)
    print(run)

What is recorded of each graph, and when, is :mod:`deepfuse.profiling.recorder`'s. A trainer's steps are recorded in four
parts: ``copy_weights``, ``forward``, ``backward`` and ``optimizer``, of which the second and third are compiled graphs.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from deepfuse.ir.device import Device, measured_cpu
from deepfuse.passes.journal import Journal
from deepfuse.profiling.bench_device import cpu_name
from deepfuse.profiling.measured_gpu import measured_gpu
from deepfuse.profiling.model_ranges import ranged
from deepfuse.profiling.page import write_page
from deepfuse.profiling.recorder import Recorder, Recording, WholeRecorder
from deepfuse.profiling.roofline import limits_of
from deepfuse.profiling.run import Run
from deepfuse.profiling.tensorboard_log import check_installed, installed, write_log
from deepfuse.profiling.torch_trace import TorchTraces
from deepfuse.profiling.trace import write_trace
from deepfuse.runtime.cuda_graph import kernel_by_kernel
from deepfuse.runtime.model import Model
from deepfuse.runtime.module import CompiledModule
from deepfuse.runtime.trainer import Trainer


@contextmanager
def profile(
    model: Model | Trainer | CompiledModule,
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
    """Record what the graphs of a model, or of its training, do inside.

    Args:
        model: compiled, on a CPU or a CUDA device.
        out: directory to make, for ``run.json``, ``trace.json.gz`` (Perfetto, chrome://tracing), ``page.html``, and of a
            generation ``<graph>.pt.trace.json.gz`` (TensorBoard); ``None`` writes nothing.
        warmup: how often the first call of each graph is repeated before it counts; of a trainer nothing is repeated, and
            the first ``1 + warmup`` steps do not count.
        steps: how many calls of each graph are recorded; ``None`` for all.
        device: whose limits the roofline is drawn with; those of the model's device are measured where it is ``None``.
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
    _check(model, warmup, steps, recorded=out is not None or not nvtx, nvtx=nvtx)
    if out is None and (shapes or memory or stacks or tensorboard):
        raise ValueError("profile: want a directory for shapes, memory, stacks or tensorboard, got none")
    if isinstance(model, Trainer) and (shapes or memory or stacks):
        # they are recorded in further calls of a graph, and a step of training is not repeated
        raise TypeError("profile: want a Model for shapes, memory or stacks, got a Trainer")
    if tensorboard:
        check_installed("tensorboard")
    ranges = ranged(model) if nvtx else nullcontext()
    if nvtx and out is None:
        with ranges:
            yield Run(**_what(model), **_machine(_device(model)))
        return
    folder = None if out is None else Path(out)
    if folder is not None:
        check_out(folder)
        _make(folder)
    traces = TorchTraces(shapes=shapes, memory=memory, stacks=stacks)
    run = Run(**_what(model), **_machine(_device(model)))
    try:
        with ranges, ExitStack() as clocks:
            recording = Recording(run, warmup, steps, clocks, None if folder is None else traces, _device(model))
            with _recorded(model, recording):
                yield run
        recording.finish()
        if not run.steps:
            raise ValueError(_nothing(model, warmup))
        run.build = _build_of(model)
        run.limits = limits_of(_limits(_device(model)) if device is None else device)
    except BaseException:
        if folder is not None:
            with suppress(OSError):  # the caller may have put something into it
                folder.rmdir()
        raise
    if folder is not None:
        run.write(folder / "run.json")
        write_trace(run, folder / "trace.json.gz")
        traces.write(folder)
        write_page(run, _journal(model).graphs, folder / "page.html")
        if installed("tensorboard") if tensorboard is None else tensorboard:
            write_log(run, folder)


def _check(model: Any, warmup: Any, steps: Any, *, recorded: bool, nvtx: bool) -> None:
    if not isinstance(model, Model | Trainer | CompiledModule):
        raise TypeError(f"profile: want what deepfuse.build returns, got {type(model).__name__}")
    if nvtx and recorded and not isinstance(model, Model):
        raise ValueError(f"profile: want no directory with nvtx=True for a {type(model).__name__}, got one")
    compiled, device = model.report.compiled if isinstance(model, Model) else model.compiled, _device(model)
    if recorded and not compiled:
        raise ValueError("profile: want a compiled model, got one built with compile=False")
    if recorded and device.type not in ("cpu", "cuda"):
        raise ValueError(f"profile: want a model on a CPU or a CUDA device, got one on {device}")
    # True is an int
    if type(warmup) is bool or not isinstance(warmup, int) or warmup < 1:
        raise ValueError(f"profile: want warmup as an integer >= 1, got {warmup!r}")
    if steps is not None and (type(steps) is bool or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"profile: want steps as an integer >= 1 or None, got {steps!r}")


def _device(model: Model | Trainer | CompiledModule) -> torch.device:
    return model.engine.device if isinstance(model, Model) else model.device


def _limits(device: torch.device) -> Device:
    """What was measured of it, in a second or some."""
    return measured_cpu() if device.type == "cpu" else measured_gpu(device)


def _journal(model: Model | Trainer | CompiledModule) -> Journal:
    return model.report.journal if isinstance(model, Model) else model.runner.journal


def _build_of(model: Model | Trainer | CompiledModule) -> dict[str, Any]:
    matches = {g.name: {p.name: p.rewrites for p in g.passes} for g in _journal(model).graphs}
    if not isinstance(model, Model):
        return {"matches": matches}
    names = ("graph_breaks", "recompiles", "graphs_from_cache")
    return {"matches": matches, **{name: getattr(model.report, name) for name in names}}


def check_out(path: Path) -> None:
    """Whether a run may be written to ``path``, for who builds a model first.

    Raises:
        FileExistsError, OSError: it is there already, or could not be made.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"profile: want a run directory that is not there yet, got {path}")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = os.strerror(errno.EACCES if above.is_dir() else errno.ENOTDIR)
        raise OSError(f"profile: want a run directory that can be made, got {path}: {why}")


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"profile: want a run directory that can be made, got {path}: {error.strerror}") from None


@contextmanager
def _recorded(model: Model | Trainer | CompiledModule, recording: Recording) -> Iterator[None]:
    """Inside, graphs of the model are recorded."""
    if isinstance(model, Trainer):
        parts: dict[str, Recorder | WholeRecorder] = {
            name: WholeRecorder(name, recording) for name in ("copy_weights", "optimizer")
        }

        def around(name: str, part: Callable[[], Any]) -> Any:
            return parts.setdefault(name, Recorder(name, recording, repeat=False))(part)

        # a thread of its own for backward would not be seen
        with torch.autograd.set_multithreading_enabled(model.device.type == "cpu"), model.wrapped(around):
            yield
        return

    if isinstance(model, CompiledModule):
        with model.wrapped(Recorder("forward", recording, repeat=True)):
            yield
        return

    def wrap(name: str, graph: Callable[..., Any]) -> Callable[..., Any]:
        recorder = Recorder(name, recording, repeat=True)
        # a replayed CUDA graph runs no Python: its step is launched kernel by kernel
        launched = kernel_by_kernel(graph)
        return lambda *args: recorder(lambda: launched(*args))

    with model.engine.wrapped(wrap):
        yield


def _what(model: Model | Trainer | CompiledModule) -> dict[str, Any]:
    if isinstance(model, Model):
        return {"model": model.report.model, "dtype": model.report.dtype}
    if isinstance(model, CompiledModule):
        dtype = next((p.dtype for p in model.parameters()), torch.get_default_dtype())
        return {"model": type(model.module).__name__, "dtype": str(dtype).removeprefix("torch.")}
    t, config = model.training, model.model.config
    what = f"training of {config.model_type}, {config.num_hidden_layers} layers, {t.batch_size} x {t.seq_len} tokens"
    return {"model": what, "dtype": str(t.dtype).removeprefix("torch.")}


def _nothing(model: Model | Trainer | CompiledModule, warmup: int) -> str:
    if isinstance(model, Trainer):
        return (
            f"profile: want more than 1 + warmup = {1 + warmup} steps of training inside the block, as these do not count, "
            "got no more"
        )
    return "profile: want a step of the model inside the block, got none; call or generate inside"


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
