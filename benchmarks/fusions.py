"""Cases of what is bound by memory: quantizing, and norms and SwiGLU that quantize their result, beside the ops one by one.

Dims: T tokens, D model width, F width of an expert.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from cases import Case, Work, providers
from torch import Tensor

from deepfuse.ops.add_rms_norm import add_rms_norm
from deepfuse.ops.add_rms_norm_quantize import add_rms_norm_quantize
from deepfuse.ops.quantize import quantize
from deepfuse.ops.rms_norm import rms_norm
from deepfuse.ops.rms_norm_quantize import rms_norm_quantize
from deepfuse.ops.swiglu import swiglu
from deepfuse.ops.swiglu_quantize import swiglu_quantize

E4M3 = torch.float8_e4m3fn
TOKENS = (1, 128, 4096, 16384)
EPS = 1e-6


def fusions(device: torch.device, tokens: Iterable[int] = TOKENS, D: int = 7168, F: int = 2048) -> Iterator[Case]:
    """``quantize``, alone and fused, as much as there is to read first."""
    for T in sorted(tokens, reverse=True):
        for name, make in MADE.items():
            width = F if name.startswith("swiglu") else D
            yield Case(f"{name} {T} x {width}", lambda make=make, T=T, width=width: make(device, T, width))  # type: ignore[misc]


def _quantize(device: torch.device, T: int, D: int) -> Work:
    args = (_random(device, T, D), E4M3, 1, 128, False)
    return _work(quantize, args, device, {})


def _quantize_weight(device: torch.device, T: int, D: int) -> Work:
    args = (_random(device, T, D), E4M3, 128, 128, False)
    return _work(quantize, args, device, {})


def _rms_norm(device: torch.device, T: int, D: int) -> Work:
    x, weight = _random(device, T, D), _random(device, D)
    args = (x, weight, EPS, E4M3, False, False)
    return _work(rms_norm_quantize, args, device, {"two ops": lambda: _quantized(rms_norm(x, weight, EPS))})


def _add_rms_norm(device: torch.device, T: int, D: int) -> Work:
    x, residual, weight = _random(device, T, D), _random(device, T, D), _random(device, D)
    args = (x, residual, weight, EPS, E4M3, False, False)
    apart = {"two ops": lambda: _quantized(add_rms_norm(x, residual, weight, EPS)[0])}
    return _work(add_rms_norm_quantize, args, device, apart)


def _swiglu(device: torch.device, T: int, F: int) -> Work:
    # halves of one product
    gate, up = _random(device, T, 2 * F).chunk(2, -1)
    return _work(
        swiglu_quantize, (gate, up, E4M3, False, False), device, {"two ops": lambda: _quantized(swiglu(gate, up))}
    )


MADE: dict[str, Callable[[torch.device, int, int], Work]] = {
    "swiglu_quantize": _swiglu,
    "add_rms_norm_quantize": _add_rms_norm,
    "rms_norm_quantize": _rms_norm,
    "quantize 1x128": _quantize,
    "quantize 128x128": _quantize_weight,
}


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize(x, E4M3, 1, 128, False)


def _work(op: Any, args: tuple[Any, ...], device: torch.device, apart: dict[str, Callable[[], object]]) -> Work:
    alternatives = {**providers(op, args, device), **apart} or {"reference": lambda: op.reference(*args)}
    return Work(
        alternatives=alternatives, cost=op.cost(*args), dtype=torch.float32, facts={"shape": list(args[0].shape)}
    )


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)
