"""Keys of kept graphs: everything that a captured graph depends on, and does not check when it is called."""

import hashlib
import inspect
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import deepfuse.blocks
from deepfuse.blocks.axis import Axis
from deepfuse.blocks.config import Config
from deepfuse.blocks.model import CausalLM
from deepfuse.passes.pipeline import Pipeline
from deepfuse.runtime import choose_overlap, engine, large_prefill, overlap_form, prompt_halves, steps


def graph_key(
    pipeline: Pipeline,
    settings: Mapping[str, Any],
    cfg: Config,
    dtype: torch.dtype,
    device: torch.device,
    room: Mapping[str, Any],
) -> str:
    """Of everything a captured graph depends on."""
    parts = [
        torch.__version__,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        str(torch.get_num_threads()),
        pipeline.key(sorted(settings.items())),
        repr(cfg),
        f"{dtype} {device} {sorted(room.items())}",
        # which graphs there are, and what they are of
        *(inspect.getsource(m) for m in (engine, steps, choose_overlap, large_prefill, overlap_form, prompt_halves)),
        # a graph goes through modules and functions of any of them
        *(path.read_text() for path in sorted(Path(deepfuse.blocks.__path__[0]).glob("*.py"))),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def module_key(causal_lm: CausalLM) -> str:
    """Of what a captured graph takes for granted of a module, and does not check at a call.

    Configuration and dtype do not settle it: a module may come with a router bias in bfloat16 (after ``.bfloat16()``),
    with a setting changed by hand, or with blocks of the caller's own.
    """
    parts = []
    for name, module in causal_lm.named_modules():
        settings = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str | Config | Axis)}
        parts.append(f"{name} {type(module).__module__}.{type(module).__qualname__} {sorted(settings.items())}")
    for name, tensor in (*causal_lm.named_parameters(), *causal_lm.named_buffers()):
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.device}")
    for kind in sorted({type(m) for m in causal_lm.modules()}, key=lambda t: (t.__module__, t.__qualname__)):
        try:
            parts.append(inspect.getsource(inspect.getmodule(kind) or kind))
        except (OSError, TypeError):  # typed into a prompt: there is no file, but there is the code
            functions = [f.__code__ for f in vars(kind).values() if inspect.isfunction(f)]
            parts.append(repr([(c.co_name, c.co_code, c.co_consts, c.co_names) for c in functions]))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
