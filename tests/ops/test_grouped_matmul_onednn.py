"""Grouped products whose row counts are rounded up: against each group's own product in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfuse.ops.grouped_matmul import grouped_matmul
from deepfuse.ops.grouped_matmul_onednn import LEAST, grouped, grouped_wgrad, rounded_up
from deepfuse.ops.grouped_matmul_wgrad import grouped_matmul_wgrad

COUNTS = st.lists(st.integers(0, 150), min_size=1, max_size=5)


def _arguments(counts, dtype):
    offsets, M = torch.tensor(counts).cumsum(0).to(torch.int32), sum(counts)
    x, dy = torch.randn(M, 24).to(dtype), torch.randn(M, 16).to(dtype) / max(M, 1) ** 0.5
    return x, dy, torch.randn(len(counts), 16, 24).to(dtype) / 24**0.5, offsets


@given(st.integers(1, 1 << 20))
def test_rows_are_rounded_up_by_less_than_a_quarter(rows):
    size = rounded_up(rows)
    assert rows <= size < max(rows * 1.25, rows + LEAST)
    assert rounded_up(size) == size


def test_few_sizes_are_left():
    assert len({rounded_up(rows) for rows in range(1, 16385)}) == 8 + 4 * 8  # up to 64, and of eight powers of two


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=15, deadline=None)
@given(counts=COUNTS, transposed=st.booleans(), seed=st.integers(0, 99))
def test_each_group_by_itself(dtype, counts, transposed, seed):
    torch.manual_seed(seed)
    x, dy, weight, offsets = _arguments(counts, dtype)
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    y, dweight = grouped(x, weight, offsets), grouped_wgrad(dy, x, offsets)
    assert y.dtype == dweight.dtype == dtype and y.is_contiguous() and dweight.is_contiguous()
    parts = zip(x.double().split(counts), dy.double().split(counts), strict=True)
    for e, (x_e, dy_e) in enumerate(parts):
        rows = slice(sum(counts[:e]), sum(counts[: e + 1]))
        # float32 sums of numbers near one, rounded once: half of bfloat16's 2**-8, with room for a sum's own error
        torch.testing.assert_close(y[rows].double(), x_e @ weight[e].double().t(), atol=1e-3, rtol=2**-8)
        torch.testing.assert_close(dweight[e].double(), dy_e.t() @ x_e, atol=1e-3, rtol=2**-8)


def test_what_is_not_finite_stays_in_its_group():
    x, dy, weight, offsets = _arguments([3, 70, 5], torch.bfloat16)
    x[3:73], dy[3:73] = float("nan"), float("inf")
    y, dweight = grouped(x, weight, offsets), grouped_wgrad(dy, x, offsets)
    assert y[:3].isfinite().all() and y[73:].isfinite().all() and dweight[::2].isfinite().all()
    assert y[3:73].isnan().all() and dweight[1].isnan().all()


def test_it_is_taken_for_what_onednn_multiplies():
    for dtype, name in ((torch.bfloat16, "onednn"), (torch.float16, "onednn"), (torch.float32, "torch")):
        x, dy, weight, offsets = _arguments([30, 40], dtype)
        assert grouped_matmul.choose((x, weight, offsets)).provider.name == name
        assert grouped_matmul_wgrad.choose((dy, x, offsets)).provider.name == name
        # rows that are no multiples of 16 bytes too
        odd = "onednn" if name == "onednn" else "reference"
        assert grouped_matmul.choose((x[:, :21], weight[..., :21], offsets)).provider.name == odd
