"""What is known to have one value, and what is not."""

import pytest
import torch

from deepfuse.ops.quantize import quantize
from deepfuse.passes.value_numbers import ValueNumbers
from graphs import trace

E4M3 = torch.float8_e4m3fn
X = torch.randn(4, 256)


def one_value(fn):
    """Whether the two results of ``fn(x)`` have one number."""
    gm = trace(fn, X)
    (a, b) = gm.graph.output_node().args[0]
    numbers = ValueNumbers([quantize.overload])
    return numbers.of(a) == numbers.of(b)


@pytest.mark.parametrize(
    ("fn", "same"),
    [
        (lambda x: (x.view(-1), x.view(-1)), True),
        (lambda x: (x.view(-1), x.view(2, -1)), False),
        (lambda x: (x[1:], x[2:]), False),
        (lambda x: (x.exp(), x.exp()), False),  # not a call that was asked for
        (lambda x: (quantize(x, E4M3, 1, 128, False)[0], quantize(x, E4M3, 1, 128, False)[0]), True),
        (lambda x: (quantize(x, E4M3, 1, 128, False)[0], quantize(x, E4M3, 1, 128, False)[1]), False),
        (lambda x: (quantize(x, E4M3, 1, 128, False)[0], quantize(x, E4M3, 128, 1, False)[0]), False),
        (lambda x: (quantize(x[1:], E4M3, 1, 128, False)[1], quantize(x[1:], E4M3, 1, 128, False)[1]), True),
        (lambda x: (quantize(x.exp(), E4M3, 1, 128, False)[1], quantize(x.exp(), E4M3, 1, 128, False)[1]), False),
    ],
)
def test_equal_calls_of_equal_values(fn, same):
    assert one_value(fn) is same
