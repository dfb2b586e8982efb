"""Sorting tokens by expert and the quantize of the sorted rows become one kernel.

    before:  rows, order, inverse, offsets = expert_permute(x, experts, E);  values, scale = quantize(rows, e4m3, 1, 128)
    after:   values, scale, order, inverse, offsets = permute_quantize(x, experts, E, e4m3)

Why: with K experts a token, saves a launch, and a write and a read of the rows: 4 K D bytes a token in bfloat16. A token
is quantized once instead of K times.
Requires: rows that nobody else reads, blocks of 1 x 128. In training the weight gradient reads the rows too.
Numerics: exact.
"""

from typing import Any

import torch
from torch import Tensor

from deepfuse.ops.expert_permute import expert_permute
from deepfuse.ops.permute_quantize import permute_quantize
from deepfuse.ops.quantize import quantize
from deepfuse.passes.fusion import fusion


@fusion(stage="quantize", saves="a launch, a write and a read of all tokens' rows, one for each expert")
class FusePermuteQuantize:
    @staticmethod
    def pattern(x: Tensor, experts: Tensor, num_experts: int, dtype: torch.dtype, power_of_two: bool) -> Any:
        rows, *places = expert_permute(x, experts, num_experts)
        return *quantize(rows, dtype, 1, 128, power_of_two), *places

    @staticmethod
    def replacement(x: Tensor, experts: Tensor, num_experts: int, dtype: torch.dtype, power_of_two: bool) -> Any:
        return permute_quantize(x, experts, num_experts, dtype, power_of_two)

    free = ("num_experts",)
    samples = [
        (f"{x}[3, 200]", lambda: torch.tensor([[0, 2], [3, 1], [2, 3]]), 4, torch.float8_e4m3fn, power_of_two)
        for x in ("bfloat16", "float16", "float32")
        for power_of_two in (False, True)
    ]
