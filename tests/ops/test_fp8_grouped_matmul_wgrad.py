"""The weight gradient of a grouped matmul in FP8: against sums of outer products in float64, wherever groups end."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accuracy import same_bits
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.fp8_grouped_matmul_wgrad import (
    _launch,
    _pieces,
    fp8_grouped_matmul_wgrad,
    fp8_grouped_matmul_wgrad_ref,
)
from deepfuse.ops.quantize import quantize

E4M3 = torch.float8_e4m3fn
on_kernel_device = pytest.mark.usefixtures("kernel_device")
every_provider = pytest.mark.parametrize("run", [fp8_grouped_matmul_wgrad_ref, _launch], ids=["reference", "triton"])


def _arguments(counts, N, K, power_of_two=False, dtype=torch.float32):
    """Arguments of the op. Scales of columns lie four decimal places apart, and those of blocks differ."""
    counts = torch.tensor(counts)
    M = int(counts.sum())
    magnitude = torch.logspace(-1, 1, max(M, 1))[:M, None]
    dy = torch.randn(M, N) * magnitude * torch.logspace(-2, 2, N)
    x = torch.randn(M, K) * magnitude * torch.logspace(2, -2, K)
    pairs = [quantize(t, E4M3, 128, 1, power_of_two) for t in (dy, x)]
    return (*pairs[0], *pairs[1], counts.cumsum(0).to(torch.int32), dtype)


def _assert_is_the_sum(actual, args):
    """Sums over each group in float64, and of magnitudes, of which float32 may miss some units of the last place."""
    dy, dy_scale, x, x_scale, offsets, dtype = args
    dy, x = dequantize(dy, dy_scale, 128, 1, torch.float64), dequantize(x, x_scale, 128, 1, torch.float64)
    assert actual.is_contiguous() and actual.dtype == dtype
    assert actual.shape == (len(offsets), dy.shape[1], x.shape[1])
    begin = 0
    for dweight, end in zip(actual, offsets.tolist(), strict=True):
        rows = slice(begin, max(begin, end))
        total, magnitudes = dy[rows].t() @ x[rows], dy[rows].t().abs() @ x[rows].abs()
        bound = magnitudes * 2.0**-20 + (total.abs() * 2.0**-8 if dtype == torch.bfloat16 else 0)
        assert ((dweight.double() - total).abs() <= bound).all()
        begin = end


@on_kernel_device
@every_provider
@settings(max_examples=12)
@given(
    # borders anywhere in a block, at its end, and blocks of several groups
    counts=st.lists(st.sampled_from([0, 1, 7, 100, 127, 128, 129, 300]), min_size=1, max_size=5),
    N=st.sampled_from([1, 16, 130]),
    K=st.sampled_from([1, 24, 150]),
    power_of_two=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@example(counts=[128, 0, 128, 0, 0, 5], N=16, K=24, power_of_two=False, dtype=torch.float32, seed=0)
@example(counts=[1, 1, 1, 1, 1], N=16, K=24, power_of_two=False, dtype=torch.float32, seed=0)
def test_sums_over_the_rows_of_a_group(run, counts, N, K, power_of_two, dtype, seed):
    torch.manual_seed(seed)
    args = _arguments(counts, N, K, power_of_two, dtype)
    dweight = run(*args)
    _assert_is_the_sum(dweight, args)
    assert not dweight[torch.tensor(counts) == 0].any()


@on_kernel_device
def test_pieces_hold_every_row_once_and_zeros_else():
    offsets = torch.tensor([5, 5, 130, 256, 300], dtype=torch.int32)
    x = torch.randint(1, 100, (300, 7), dtype=torch.uint8)
    pieces = _pieces(x.view(E4M3), offsets).view(torch.uint8)
    assert pieces.shape == (3 + 5 - 1, 7, 128)
    # block and group of each piece that is written
    for block, group, begin, end in [
        (0, 0, 0, 5),
        (0, 2, 5, 128),
        (1, 2, 128, 130),
        (1, 3, 130, 256),
        (2, 4, 256, 300),
    ]:
        expected = torch.zeros(7, 128, dtype=torch.uint8)
        expected[:, begin - 128 * block : end - 128 * block] = x[begin:end].t()
        assert torch.equal(pieces[block + group], expected)


@on_kernel_device
@every_provider
def test_what_is_no_number_reaches_its_group_and_no_other(run):
    dy, dy_scale, x, x_scale, offsets, dtype = _arguments([100, 30, 60], 8, 16)
    # a row of the second group, in a block that it shares with the first; a scale of the block that all groups share
    x[110, 3] = float("nan")
    dweight = run(dy, dy_scale, x, x_scale, offsets, dtype)
    assert dweight.isnan().any(1).any(1).tolist() == [False, True, False]
    assert torch.equal(dweight[1].isnan().any(0), torch.arange(16) == 3)
    x_scale[0, 5] = float("nan")
    dweight = run(dy, dy_scale, x, x_scale, offsets, dtype)
    assert dweight[:, :, 5].isnan().all(1).tolist() == [True, True, False]


@on_kernel_device
@every_provider
def test_views(run):
    dy, dy_scale, x, x_scale, offsets, dtype = _arguments([100, 0, 60], 16, 32)
    padded = torch.full((160, 40), 0x7F, dtype=torch.uint8).view(E4M3)
    padded[:, 3:35] = x
    args = dy.t().contiguous().t(), dy_scale.t().contiguous().t(), padded[:, 3:35], x_scale, offsets, dtype
    _assert_is_the_sum(run(*args), args)


@on_kernel_device
def test_repeats_bit_by_bit():
    args = _arguments([140, 3, 200], 130, 140)
    first = _launch(*args)
    assert all(same_bits(first, _launch(*args)) for _ in range(3))


@on_kernel_device
def test_wrong_offsets_reach_nothing_but_the_rows():
    dy, dy_scale, x, x_scale, _, dtype = _arguments([3, 4], 16, 32)
    for wrong in ([3, 900], [-5, 7], [9, 2], [-900, -800]):
        dweight = _launch(dy, dy_scale, x, x_scale, torch.tensor(wrong, dtype=torch.int32), dtype)
        assert dweight.shape == (2, 16, 32)


def test_float64_goes_to_the_reference():
    args = _arguments([3, 4], 8, 16)
    choice = fp8_grouped_matmul_wgrad.choose((*args[:-1], torch.float64))
    assert choice.provider.name == "reference"
    _assert_is_the_sum(fp8_grouped_matmul_wgrad(*args[:-1], torch.float64), (*args[:-1], torch.float64))


def test_refuses_what_does_not_fit():
    dy, dy_scale, x, x_scale, offsets, dtype = _arguments([3, 140], 8, 16)
    with pytest.raises(ValueError, match=r"want dy \[M, N\], x \[M, K\] and offsets \[E\], got \[143\], \[143, 16\]"):
        fp8_grouped_matmul_wgrad(dy[:, 0], dy_scale, x, x_scale, offsets, dtype)
    with pytest.raises(ValueError, match="want x of 5 rows, got 143"):
        fp8_grouped_matmul_wgrad(dy[:5], dy_scale[:1], x, x_scale, offsets, dtype)
    with pytest.raises(ValueError, match=r"want dy_scale \[2, 8\], got \[1, 8\]"):
        fp8_grouped_matmul_wgrad(dy, dy_scale[:1], x, x_scale, offsets, dtype)
    with pytest.raises(ValueError, match=r"want x_scale \[2, 16\], got \[143, 1\]"):
        fp8_grouped_matmul_wgrad(dy, dy_scale, *quantize(x.float(), E4M3, 1, 128, False), offsets, dtype)
    with pytest.raises(TypeError, match="want float8 dy and x and int32 offsets, got torch.float32"):
        fp8_grouped_matmul_wgrad(dy.float(), dy_scale, x, x_scale, offsets, dtype)
    with pytest.raises(TypeError, match="int32 offsets, got .* and torch.int64"):
        fp8_grouped_matmul_wgrad(dy, dy_scale, x, x_scale, offsets.long(), dtype)
    with pytest.raises(TypeError, match="want two scales of one dtype, got torch.float8_e8m0fnu and torch.float32"):
        fp8_grouped_matmul_wgrad(dy, dy_scale.to(torch.float8_e8m0fnu), x, x_scale, offsets, dtype)
    with pytest.raises(TypeError, match="want a result in bfloat16 or float32, got torch.float16"):
        fp8_grouped_matmul_wgrad(dy, dy_scale, x, x_scale, offsets, torch.float16)
    for wrong in ([3, 150], [143, 3], [-1, 143], [3, 142]):
        with pytest.raises(ValueError, match=r"want offsets that never decrease and end at M = 143, got \["):
            fp8_grouped_matmul_wgrad(dy, dy_scale, x, x_scale, torch.tensor(wrong, dtype=torch.int32), dtype)
