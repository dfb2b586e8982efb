"""Samples of a rule: shapes and dtypes in the words of a printed graph, and the tensors made of them.

    samples = [("bfloat16[3, 128]", "bfloat16[128]", 1e-6)]

A string is a tensor of normal numbers; a function without parameters makes a tensor whose values matter (offsets,
indices); anything else is taken as it is.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_TENSOR = re.compile(r"(\w+)\[([\d, ]*)\]")


def tensor(text: str, *, zeros: bool = False) -> Tensor:
    """``"bfloat16[3, 128]"`` -> such a tensor of normal numbers; of zeros if asked, and where the dtype holds no others.

    Raises:
        ValueError: the text is no dtype with a shape.
    """
    dtype, shape = _parsed(text)
    if zeros or not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape).to(dtype)


def dtypes_of(sample: Iterable[Any]) -> set[torch.dtype]:
    """Of the tensors written as text."""
    return {_parsed(value)[0] for value in sample if isinstance(value, str)}


def materialized(sample: Iterable[Any], *, zeros: bool = False) -> list[Any]:
    """Arguments made of one sample, on the CPU."""
    return [_made(value, zeros) for value in sample]


def _parsed(text: str) -> tuple[torch.dtype, list[int]]:
    found = _TENSOR.fullmatch(text.strip())
    dtype = getattr(torch, found[1], None) if found else None
    if found is None or not isinstance(dtype, torch.dtype):
        raise ValueError(f"samples: want tensors as 'bfloat16[3, 128]', got {text!r}")
    return dtype, [int(size) for size in found[2].replace(" ", "").split(",") if size]


def _made(value: Any, zeros: bool) -> Any:
    if isinstance(value, str):
        return tensor(value, zeros=zeros)
    return value() if callable(value) else value
