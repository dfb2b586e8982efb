"""Comparisons of float8 tensors and their scales."""

from collections.abc import Iterable

import torch
from torch import Tensor


def assert_same_bits(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Bitwise equal, in dtype and strides too; NaN equals NaN, of which formats have several."""
    for a, e in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (e.dtype, e.shape, e.stride())
        a, e = a.double(), e.double()
        assert torch.equal(a.isnan(), e.isnan())
        assert torch.equal(a.nan_to_num(), e.nan_to_num())
        assert torch.equal(a.signbit() & ~a.isnan(), e.signbit() & ~e.isnan())
