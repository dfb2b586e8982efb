"""What ops are tested with that end in ``quantize``: they give bit by bit what the two ops give one after the other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from deepfuse.ir.op import Op
from deepfuse.ops.quantize import quantize

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
WIDTHS = st.sampled_from([1, 7, 128, 130, 576])
"""Of a row: less than a block, one, not full ones, several."""
KINDS: dict[str, Any] = {
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "to": st.sampled_from([E4M3, E5M2]),
    "power_of_two": st.booleans(),
    "seed": st.integers(0, 99),
}
MAGNITUDES = st.sampled_from([1e-6, 1.0, 1e4])
every_provider = pytest.mark.parametrize("name", ["reference", "triton"])


def provider(op: Op, name: str) -> Callable[..., Any]:
    return next(p.fn for p in op.providers if p.name == name)


def quantized(name: str, y: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Values and scale of a row's blocks, by the provider of that name."""
    return provider(quantize, name)(y, dtype, 1, 128, power_of_two)
