"""What the launchers of ops would launch on a GPU that is not there.

A launcher is called on its arguments while the launch itself is replaced by a note of what to compile, specialized
(alignment, arguments that are 1) as the launch would have been. Nothing runs, so DeepSeek-V3's sizes are ``meta``
tensors, and what a launcher returns holds anything.
"""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from deepfuse.ir.op import OPS, Op
from deepfuse.ir.provider import Provider
from deepfuse.profiling.deepseek_v3_arguments import deepseek_v3_arguments


@dataclass(slots=True)
class Launch:
    """A kernel with its specialization, and the calls that launch it."""

    source: ASTSource
    options: Any
    calls: dict[tuple[str, str], dict[int, tuple[Any, ...]]] = field(default_factory=dict)
    """Op and provider -> number of tokens -> the last arguments of DeepSeek-V3's sizes with so many; none of samples."""


def triton_providers(arch: int = 90) -> Iterator[tuple[Op, Provider]]:
    """Implementations by kernels; those in Gluon are written with instructions of sm_90."""
    for op in OPS.values():
        for provider in op.providers:
            if provider.name.startswith("triton") or (provider.name.startswith("gluon") and arch == 90):
                yield op, provider


def launches(arch: int, ops: Collection[str], samples: bool) -> dict[str, Launch]:
    """What is launched, each once.

    Args:
        arch: 90 for sm_90.
        ops: names of ops whose providers are called.
        samples: whether for the ops' samples, too.
    """
    found: dict[str, Launch] = {}
    target = GPUTarget("cuda", arch, 32)
    calls = deepseek_v3_arguments()
    for op, provider in triton_providers(arch):
        if op.name not in ops:
            continue
        for tokens, args in [*_samples(op, samples), *calls.get(op.name, [])]:
            op.check(*args)
            if provider.supports(*args) is None:
                with _noted(found, target) as noted:
                    provider.fn(*args)
                for launch in noted:
                    by_tokens = launch.calls.setdefault((op.name, provider.name), {})
                    if tokens is not None:
                        by_tokens[tokens] = args
    return found


def _samples(op: Op, wanted: bool) -> Iterator[tuple[None, tuple[Any, ...]]]:
    for dtype in (torch.float32, torch.bfloat16) if wanted else ():
        for args in op.samples(torch.device("cpu"), dtype):
            yield None, args


@contextlib.contextmanager
def _noted(found: dict[str, Launch], target: GPUTarget) -> Iterator[list[Launch]]:
    """Within, a launch is only added to what is found, once for each specialization, and to what is given."""
    backend, noted = make_backend(target), []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        # as JITFunction.run does it, but for a target that is not there
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        options, *source = kernel._pack_args(backend, kwargs, bound, specialization, options)
        kind = GluonASTSource if kernel.is_gluon() else ASTSource
        noted.append(found.setdefault(f"{kernel} {source} {options}", Launch(kind(kernel, *source), options)))

    original, JITFunction.run = JITFunction.run, run
    try:
        yield noted
    finally:
        JITFunction.run = original
