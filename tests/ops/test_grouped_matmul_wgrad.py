"""The weight gradient of a grouped matmul: against sums of outer products in float64, for any sizes of the groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accuracy import assert_as_accurate
from deepfuse.ops.grouped_matmul_wgrad import _launch, _torch, grouped_matmul_wgrad, grouped_matmul_wgrad_ref

on_kernel_device = pytest.mark.usefixtures("kernel_device")


def _arguments(counts, N, K, dtype=torch.float32):
    """Arguments of ``grouped_matmul_wgrad``, with sums near one, and what they give."""
    counts = torch.tensor(counts)
    offsets, M = counts.cumsum(0).to(torch.int32), int(counts.sum())
    dy, x = torch.randn(M, N, dtype=dtype) / max(M, 1) ** 0.5, torch.randn(M, K, dtype=dtype)
    return dy, x, offsets, _row_by_row(dy, x, counts)


def _row_by_row(dy, x, counts):
    products = torch.einsum("mn,mk->mnk", dy.double(), x.double())
    group = torch.arange(len(counts)).repeat_interleave(torch.as_tensor(counts))
    return products.new_zeros(len(counts), *products.shape[1:]).index_add(0, group, products)


@on_kernel_device
@pytest.mark.parametrize("provider", [grouped_matmul_wgrad_ref, _launch, _torch], ids=["reference", "triton", "torch"])
@settings(max_examples=10)
@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_sums_over_the_rows_of_a_group(provider, counts, seed):
    torch.manual_seed(seed)
    # bfloat16, which grouped_mm takes on every device
    dy, x, offsets, expected = _arguments(counts, 16, 24, torch.bfloat16)
    dweight = provider(dy, x, offsets)
    assert dweight.is_contiguous() and dweight.dtype == x.dtype
    torch.testing.assert_close(dweight.double(), expected, atol=1e-3, rtol=1.6e-2)
    assert not dweight[torch.tensor(counts) == 0].any()


@on_kernel_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# one row; sizes that are no multiples of anything; tiles that are full, in several blocks of the sum
@pytest.mark.parametrize(("counts", "N", "K"), [([1], 3, 5), ([2, 0, 67], 75, 130), ([130, 70], 160, 96)])
def test_kernel_error_is_at_most_twice_the_error_of_pytorch(dtype, counts, N, K):
    dy, x, offsets, exact = _arguments(counts, N, K, dtype)
    assert_as_accurate(_launch(dy, x, offsets), grouped_matmul_wgrad_ref(dy, x, offsets), exact)


def _within_nan(t):
    """``t`` as a view whose rows have NaN before and after them."""
    return torch.nn.functional.pad(t, (3, 5), value=float("nan"))[..., 3:-5]


@on_kernel_device
@pytest.mark.parametrize("provider", [_launch, _torch], ids=["triton", "torch"])
def test_views(provider):
    counts = [3, 0, 4]
    dy, x, offsets, _ = _arguments(counts, 16, 32, torch.bfloat16)
    for dy_view, x_view in (
        (_within_nan(dy), _within_nan(x)),
        (dy.t().contiguous().t(), x.t().contiguous().t()),
        # the gradient of a sum
        (torch.ones(1, 1, dtype=x.dtype).expand(7, 16), x),
    ):
        actual = provider(dy_view, x_view, offsets)
        torch.testing.assert_close(actual.double(), _row_by_row(dy_view, x_view, counts), atol=1e-3, rtol=1.6e-2)


def test_float64_goes_to_the_reference():
    dy, x, offsets, _ = _arguments([3, 4], 8, 16)
    assert grouped_matmul_wgrad.choose((dy, x, offsets)).provider.name == "torch"
    choice = grouped_matmul_wgrad.choose((dy.double(), x.double(), offsets))
    assert choice.provider.name == "reference"
    assert "does not take torch.float64" in dict(choice.refused)["torch"]


def test_rejects():
    dy, x, offsets, _ = _arguments([3, 4], 8, 16)
    with pytest.raises(ValueError, match=r"want dy \[M, N\], x \[M, K\] and offsets \[E\], got \[7\]"):
        grouped_matmul_wgrad(dy[:, 0], x, offsets)
    with pytest.raises(ValueError, match="want x of 5 rows, got 7"):
        grouped_matmul_wgrad(dy[:5], x, offsets)
    with pytest.raises(TypeError, match="want dy and x of one dtype .* got torch.bfloat16, torch.float32"):
        grouped_matmul_wgrad(dy.bfloat16(), x, offsets)
