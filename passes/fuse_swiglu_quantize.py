"""SwiGLU and the quantize of its result become one kernel.

    before:  y = swiglu(gate, up);  values, scale = quantize(y, e4m3, 1, 128)
    after:   y, values, scale = swiglu_quantize(gate, up, e4m3, keep)

Why: saves a launch and a read of y, 2 F bytes a row in bfloat16; and where nobody else reads y, its write as well. In
training the weight gradient reads y, quantized along tokens: ``keep`` is then true.
Requires: matrices, blocks of 1 x 128.
Numerics: exact; what is quantized is the rounded y.
"""

from typing import Any

import torch
from torch import Tensor

from deepfuse.ops.quantize import quantize
from deepfuse.ops.swiglu import swiglu
from deepfuse.ops.swiglu_quantize import swiglu_quantize
from deepfuse.passes.fusion import Site, fusion


@fusion(stage="quantize", saves="a launch and a read of y; its write where nobody else reads it")
class FuseSwigluQuantize:
    @staticmethod
    def pattern(gate: Tensor, up: Tensor, dtype: torch.dtype, power_of_two: bool) -> Any:
        return quantize(swiglu(gate, up), dtype, 1, 128, power_of_two)

    @staticmethod
    def replacement(gate: Tensor, up: Tensor, dtype: torch.dtype, power_of_two: bool) -> Any:
        return swiglu_quantize(gate, up, dtype, power_of_two, False)[1:]

    @staticmethod
    def pattern_kept(gate: Tensor, up: Tensor, dtype: torch.dtype, power_of_two: bool) -> Any:
        y = swiglu(gate, up)
        return y, *quantize(y, dtype, 1, 128, power_of_two)

    @staticmethod
    def replacement_kept(gate: Tensor, up: Tensor, dtype: torch.dtype, power_of_two: bool) -> Any:
        return swiglu_quantize(gate, up, dtype, power_of_two, True)

    @staticmethod
    def guard(site: Site) -> str | None:
        return None if site.gate.ndim == 2 else f"gate has {site.gate.ndim} dimensions, the kernel takes rows [M, F]"

    samples = [
        (f"{x}[3, 200]", f"{x}[3, 200]", torch.float8_e4m3fn, power_of_two)
        for x in ("bfloat16", "float16", "float32")
        for power_of_two in (False, True)
    ]
