"""Grouped matmul: against a product row by row in float64, for any sizes of the groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accuracy import assert_as_accurate
from deepfuse.ops.grouped_matmul import _gather, _launch, _torch, grouped_matmul, grouped_matmul_ref

on_kernel_device = pytest.mark.usefixtures("kernel_device")
COUNTS = st.lists(st.integers(0, 20), min_size=1, max_size=6)


def _arguments(counts, N, K, dtype=torch.float32):
    """Arguments of ``grouped_matmul``, and the group of each row."""
    counts = torch.tensor(counts)
    offsets, M = counts.cumsum(0).to(torch.int32), int(counts.sum())
    x = torch.randn(M, K, dtype=dtype)
    weight = torch.randn(len(counts), N, K, dtype=dtype) / K**0.5
    return x, weight, offsets, torch.arange(len(counts)).repeat_interleave(counts)


def _row_by_row(x, weight, group):
    return torch.einsum("mk,mnk->mn", x.double(), weight.double()[group])


@on_kernel_device
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "provider", [grouped_matmul_ref, _launch, _torch, _gather], ids=["reference", "triton", "torch", "gather"]
)
@settings(max_examples=10)
@given(counts=COUNTS, seed=st.integers(0, 99))
def test_every_row_meets_the_weight_of_its_group(provider, transposed, counts, seed):
    torch.manual_seed(seed)
    # bfloat16, which grouped_mm takes on every device
    x, weight, offsets, group = _arguments(counts, 16, 24, torch.bfloat16)
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    y = provider(x, weight, offsets)
    assert y.is_contiguous() and y.dtype == x.dtype
    torch.testing.assert_close(y.double(), _row_by_row(x, weight, group), atol=1e-3, rtol=1.6e-2)


@on_kernel_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# one row; sizes that are no multiples of anything; tiles that are full, in several blocks of columns and of the sum
@pytest.mark.parametrize(("counts", "N", "K"), [([1], 3, 5), ([2, 0, 67], 75, 130), ([130, 70], 160, 96)])
def test_kernel_error_is_at_most_twice_the_error_of_pytorch(dtype, counts, N, K):
    x, weight, offsets, group = _arguments(counts, N, K, dtype)
    exact = _row_by_row(x, weight, group)
    assert_as_accurate(_launch(x, weight, offsets), grouped_matmul_ref(x, weight, offsets), exact)


@on_kernel_device
def test_a_decode_step_of_257_experts():
    # DeepSeek-V3's and the shared one behind them, which every token goes to: beyond a power of two
    counts = [0] * 257
    counts[3], counts[200], counts[256] = 1, 2, 20
    x, weight, offsets, group = _arguments(counts, 8, 24)
    torch.testing.assert_close(
        _launch(x, weight, offsets).double(), _row_by_row(x, weight, group), atol=1e-5, rtol=1e-5
    )


def _within_nan(t):
    """``t`` as a view whose rows have NaN before and after them."""
    return torch.nn.functional.pad(t, (3, 5), value=float("nan"))[..., 3:-5]


@on_kernel_device
@pytest.mark.parametrize("provider", [_launch, _torch], ids=["triton", "torch"])
def test_views(provider):
    x, weight, offsets, group = _arguments([3, 0, 4], 16, 32, torch.bfloat16)
    every_second = weight.repeat_interleave(2, 0)[::2], offsets.repeat_interleave(2)[::2]
    one_later = x.new_zeros(x.numel() + 1)[1:].view_as(x).copy_(x)
    for view, rest in (
        (_within_nan(x), (_within_nan(weight), offsets)),
        (x, (_within_nan(weight.mT.contiguous()).mT, offsets)),
        (x.t().contiguous().t(), every_second),
        (x[:1].expand(7, -1), (weight, offsets)),
        (one_later, (weight, offsets)),
    ):
        actual = provider(view, *rest)
        torch.testing.assert_close(actual.double(), _row_by_row(view, weight, group), atol=1e-3, rtol=1.6e-2)


@pytest.mark.parametrize("transposed", [False, True])
def test_torch_copies_no_weight(monkeypatch, transposed):
    x, weight, offsets, _ = _arguments([3, 4], 16, 32)
    weight = weight.mT.contiguous().mT if transposed else weight
    seen = []
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda x, weight, offs: seen.extend([x, weight]))
    _torch(x, weight, offsets)
    assert [t.data_ptr() for t in seen] == [x.data_ptr(), weight.data_ptr()]
    assert seen[1].stride() == weight.mT.stride()


def test_gradient():
    x, weight, offsets, group = _arguments([3, 0, 5, 1], 7, 6)
    inputs = [t.requires_grad_() for t in (x, weight)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    dy = torch.randn(9, 7)
    actual = torch.autograd.grad(grouped_matmul(x, weight, offsets), inputs, dy)
    expected = torch.autograd.grad(_row_by_row(*exact, group), exact, dy.double())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, atol=1e-5, rtol=1e-5)


def _refusals(choice):
    return dict(choice.refused)


def test_torch_is_taken_where_rows_are_multiples_of_16_bytes():
    x, weight, offsets, _ = _arguments([3, 4], 8, 16)
    assert grouped_matmul.choose((x, weight, offsets)).provider.name == "torch"
    choice = grouped_matmul.choose((x[:, :10], weight[..., :10], offsets))
    assert choice.provider.name == "reference"
    assert "multiple of 16 bytes, got 8 and 10 elements of torch.float32" in _refusals(choice)["torch"]
    choice = grouped_matmul.choose((x.double(), weight.double(), offsets))
    assert choice.provider.name == "reference"
    assert "does not take torch.float64" in _refusals(choice)["torch"]


def test_few_rows_gather_in_a_compiled_graph():
    x, weight, offsets, _ = _arguments([3, 4], 8, 16)
    assert grouped_matmul.choose((x, weight, offsets), compiled=True).provider.name == "gather"


def test_rejects():
    x, weight, offsets, _ = _arguments([3, 4], 8, 16)
    with pytest.raises(ValueError, match=r"got \[7, 16\], \[2, 8, 15\] and \[2\]"):
        grouped_matmul(x, weight[..., :15], offsets)
    with pytest.raises(ValueError, match=r"got \[7, 16\], \[2, 8, 16\] and \[1\]"):
        grouped_matmul(x, weight, offsets[:1])
    with pytest.raises(TypeError, match="got torch.float32, torch.bfloat16 and torch.int32"):
        grouped_matmul(x, weight.bfloat16(), offsets)
    with pytest.raises(TypeError, match="int32 offsets, got torch.float32, torch.float32 and torch.int64"):
        grouped_matmul(x, weight, offsets.long())
