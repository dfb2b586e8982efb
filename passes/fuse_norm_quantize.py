"""A norm, with the residual before it or without, and the quantize of its result become one kernel.

    before:  y, h = add_rms_norm(x, residual, w, eps);  values, scale = quantize(y, e4m3, 1, 128)
    after:   y, h, values, scale = add_rms_norm_quantize(x, residual, w, eps, e4m3, keep)        likewise rms_norm

Why: saves a launch and a read of y, 2 D bytes a token in bfloat16; and where nobody else reads y, its write as well.
Where a router, the residual or a backward pass does, ``keep`` is true and y is written once.
Requires: matrices, blocks of 1 x 128.
Numerics: exact; what is quantized is the rounded y.
"""

from typing import Any

import torch
from torch import Tensor

from deepfuse.ops.add_rms_norm import add_rms_norm
from deepfuse.ops.add_rms_norm_quantize import add_rms_norm_quantize
from deepfuse.ops.quantize import quantize
from deepfuse.ops.rms_norm import rms_norm
from deepfuse.ops.rms_norm_quantize import rms_norm_quantize
from deepfuse.passes.fusion import Site, fusion

_KINDS = [(dtype, up) for dtype in ("bfloat16", "float16", "float32") for up in (False, True)]
"""Dtype of the activation, and whether scales are powers of two."""


@fusion(stage="quantize", saves="a launch and a read of y; its write where nobody else reads it")
class FuseNormQuantize:
    @staticmethod
    def pattern(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool) -> Any:
        return quantize(rms_norm(x, weight, eps), dtype, 1, 128, power_of_two)

    @staticmethod
    def replacement(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool) -> Any:
        return rms_norm_quantize(x, weight, eps, dtype, power_of_two, False)[1:]

    @staticmethod
    def pattern_kept(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool) -> Any:
        y = rms_norm(x, weight, eps)
        return y, *quantize(y, dtype, 1, 128, power_of_two)

    @staticmethod
    def replacement_kept(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool) -> Any:
        return rms_norm_quantize(x, weight, eps, dtype, power_of_two, True)

    @staticmethod
    def pattern_add(
        x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool
    ) -> Any:
        y, h = add_rms_norm(x, residual, weight, eps)
        return h, *quantize(y, dtype, 1, 128, power_of_two)

    @staticmethod
    def replacement_add(
        x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool
    ) -> Any:
        return add_rms_norm_quantize(x, residual, weight, eps, dtype, power_of_two, False)[1:]

    @staticmethod
    def pattern_add_kept(
        x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool
    ) -> Any:
        y, h = add_rms_norm(x, residual, weight, eps)
        return y, h, *quantize(y, dtype, 1, 128, power_of_two)

    @staticmethod
    def replacement_add_kept(
        x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, power_of_two: bool
    ) -> Any:
        return add_rms_norm_quantize(x, residual, weight, eps, dtype, power_of_two, True)

    @staticmethod
    def guard(site: Site) -> str | None:
        return None if site.x.ndim == 2 else f"x has {site.x.ndim} dimensions, the kernel takes rows [M, D]"

    samples = [(f"{x}[3, 200]", f"{x}[200]", 1e-6, torch.float8_e4m3fn, up) for x, up in _KINDS]
    samples_kept = samples
    samples_add = [(f"{x}[3, 200]", *sample) for (x, _), sample in zip(_KINDS, samples, strict=True)]
    samples_add_kept = samples_add
