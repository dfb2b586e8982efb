"""``grouped_matmul`` and its weight gradient in bfloat16 on a CPU: products of few different sizes.

A product of less than 32 bits a number is oneDNN's, which writes machine code for each size and keeps it: 1.2 to 3.6 ms for
the code, 0.1 ms for a product of 128 x 512 x 512. How many rows a group has is another number in every step. So it is
rounded up, by less than a quarter (or to 8 rows): four sizes from a power of two to the next. A product takes in rows of
neighbours, whose results are not read; a weight gradient sums over rows of zeros.
Source: oneDNN developer guide, "Primitive Cache".
"""

import torch
from torch import Tensor

from deepfuse.ops.groups import groups

LEAST = 8
"""Rows to which fewer are rounded up."""


def rounded_up(rows: int) -> int:
    """The least of 5, 6, 7 or 8 eighths of a power of two, and multiple of ``LEAST``, that is not less than ``rows >= 1``."""
    step = max(1 << (rows - 1).bit_length() >> 3, LEAST)
    return -(-rows // step) * step


def grouped(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """As ``grouped_matmul``."""
    M = x.shape[0]
    y = x.new_empty(M, weight.shape[1])
    for e, rows in groups(offsets):
        size = min(rounded_up(rows.stop - rows.start), M)
        first = min(rows.start, M - size)
        product = torch.mm(x[first : first + size], weight[e].t())
        y[rows] = product[rows.start - first : rows.stop - first]
    return y


def grouped_wgrad(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """As ``grouped_matmul_wgrad``."""
    dweight = x.new_zeros(offsets.shape[0], dy.shape[1], x.shape[1])
    for e, rows in groups(offsets):
        torch.mm(_padded(dy[rows]).t(), _padded(x[rows]), out=dweight[e])
    return dweight


def _padded(x: Tensor) -> Tensor:
    # of both factors: zeros times what is not finite would not be zero
    missing = rounded_up(x.shape[0]) - x.shape[0]
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def refuses(x: Tensor) -> str | None:
    """What other libraries multiply, that make no code for a size."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return f"oneDNN is for float16 and bfloat16 on CPUs, got {x.dtype} on {x.device.type}"
    return None
