"""How far an implementation may lie from the reference, per dtype.

A kernel sums in another order than PyTorch, so float32 results differ by a few units in the last place for each of the
sums; rounding the result to a narrow dtype may then fall to the other side, which is one unit in the last place of that
dtype. ``rtol`` is 11 units in the last place for float32 (2**-23; torch.testing's own default, made for sums of some
thousand terms) and two for the narrow dtypes; ``atol`` covers results near zero that are differences of terms near one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest accepted ``|actual - expected|``: ``atol + rtol * |expected|``."""

    atol: float
    rtol: float


EXACT = Tolerance(atol=0.0, rtol=0.0)

DEFAULT_TOLERANCE: Mapping[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(atol=1e-12, rtol=1e-12),
    torch.float32: Tolerance(atol=1e-5, rtol=1.3e-6),  # 24-bit significand
    torch.float16: Tolerance(atol=1e-3, rtol=2e-3),  # 11-bit significand: two units are 2 * 2**-10
    torch.bfloat16: Tolerance(atol=1e-3, rtol=1.6e-2),  # 8-bit significand: two units are 2 * 2**-7
}

ONE_FLOAT8_STEP: Mapping[torch.dtype, Tolerance] = {
    torch.float8_e4m3fn: Tolerance(atol=2**-9, rtol=2**-3),
    torch.float8_e5m2: Tolerance(atol=2**-16, rtol=2**-2),
    torch.float8_e8m0fnu: EXACT,
}
"""For ops that round to float8 what they computed: a difference in the last place may fall to the next value, which is
one unit in the last place away (4-bit and 3-bit significand), or the least positive value. Powers of two do not move."""
