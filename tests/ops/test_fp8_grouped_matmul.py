"""Grouped matmul in FP8: against the dequantized product row by row in float64, in both layouts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accuracy import same_bits
from deepfuse.ops import fp8_grouped_matmul_masked as masked
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.fp8_grouped_matmul import (
    _launch,
    _tile,
    fp8_grouped_matmul,
    fp8_grouped_matmul_ref,
)
from deepfuse.ops.fp8_grouped_matmul_masked import fp8_grouped_matmul_masked, fp8_grouped_matmul_masked_ref
from deepfuse.ops.quantize import quantize

E4M3 = torch.float8_e4m3fn
on_kernel_device = pytest.mark.usefixtures("kernel_device")
every_provider = pytest.mark.parametrize("run", [fp8_grouped_matmul_ref, _launch], ids=["reference", "triton"])
every_masked_provider = pytest.mark.parametrize(
    "run", [fp8_grouped_matmul_masked_ref, masked._launch], ids=["reference", "triton"]
)


def _arguments(counts, N, K, power_of_two=False, dtype=torch.float32):
    """Arguments of ``fp8_grouped_matmul``, and the product in float64. Scales lie four decimal places apart."""
    counts = torch.tensor(counts)
    M, E = int(counts.sum()), len(counts)
    x = torch.randn(M, K) * torch.logspace(-2, 2, max(M, 1))[:M, None]
    weight = torch.randn(E, N, K) * torch.logspace(-2, 2, N)[:, None] / max(K, 1) ** 0.5
    x_pair, weight_pair = (quantize(t, E4M3, rows, 128, power_of_two) for t, rows in ((x, 1), (weight, 128)))
    x_MK = dequantize(*x_pair, 1, 128, torch.float64)
    weight_MNK = dequantize(*weight_pair, 128, 128, torch.float64)[torch.arange(E).repeat_interleave(counts)]
    exact = torch.einsum("mk,mnk->mn", x_MK, weight_MNK), torch.einsum("mk,mnk->mn", x_MK.abs(), weight_MNK.abs())
    return (*x_pair, *weight_pair, counts.cumsum(0).to(torch.int32), dtype), exact


def _assert_near(actual, exact):
    """``exact`` is the sum, and the sum of magnitudes, of which float32 may miss some units of the last place."""
    total, magnitudes = exact
    bound = magnitudes * 2.0**-20
    if actual.dtype == torch.bfloat16:
        bound = bound + total.abs() * 2.0**-8
    assert ((actual.double() - total).abs() <= bound).all()


@on_kernel_device
@every_provider
@settings(max_examples=12)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    N=st.sampled_from([1, 16, 130]),
    # bytes that are read one by one, and in vectors; whole blocks, and 576's half
    K=st.sampled_from([1, 24, 150, 128, 192]),
    power_of_two=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_every_row_meets_the_weight_of_its_group(run, counts, N, K, power_of_two, dtype, seed):
    torch.manual_seed(seed)
    args, exact = _arguments(counts, N, K, power_of_two, dtype)
    y = run(*args)
    assert y.is_contiguous() and y.dtype == dtype
    _assert_near(y, exact)


@on_kernel_device
# tiles of 32, 64 and 128 rows, the last not full; several blocks of columns
@pytest.mark.parametrize(("counts", "N"), [([30, 33], 16), ([64, 20, 60], 200), ([150, 0, 120], 130)])
def test_large_tiles(counts, N):
    args, exact = _arguments(counts, N, 192)
    _assert_near(_launch(*args), exact)


@on_kernel_device
def test_a_decode_step_of_257_experts():
    # DeepSeek-V3's and the shared one behind them, which every token goes to: beyond a power of two
    counts = [0] * 257
    counts[3], counts[200], counts[256] = 1, 2, 20
    args, exact = _arguments(counts, 8, 24)
    _assert_near(_launch(*args), exact)


def test_tiles_are_as_high_as_groups():
    assert [_tile(rows)[0] for rows in (1, 16, 32, 64, 128, 4096)] == [16, 16, 32, 64, 128, 128]


@on_kernel_device
def test_scales_of_any_stride_and_transposed_weights():
    (x, x_scale, weight, weight_scale, offsets, dtype), exact = _arguments([5, 0, 17], 144, 160)
    transposed = weight.mT.contiguous().mT, weight_scale.mT.contiguous().mT
    for args in ((x, x_scale.contiguous(), weight, weight_scale), (x, x_scale, *transposed)):
        _assert_near(_launch(*args, offsets, dtype), exact)
    wide = torch.zeros(22, 200, dtype=torch.uint8).view(E4M3)
    wide[:, 7:167] = x
    _assert_near(_launch(wide[:, 7:167], x_scale, weight, weight_scale, offsets, dtype), exact)


@on_kernel_device
@every_provider
# few rows a group and many; sizes that are no multiples of 16, or of anything
@pytest.mark.parametrize(("counts", "N", "K"), [([5, 0, 17], 144, 160), ([70, 60], 131, 40), ([150, 1], 200, 129)])
def test_the_gradient_of_the_input(run, counts, N, K):
    counts = torch.tensor(counts)
    dy, weight = torch.randn(int(counts.sum()), N), torch.randn(len(counts), N, K)
    dy_pair, (weight, scale) = quantize(dy, E4M3, 1, 128, False), quantize(weight, E4M3, 128, 128, False)
    dx = run(*dy_pair, weight.transpose(1, 2), scale.transpose(1, 2), counts.cumsum(0).to(torch.int32), torch.float32)
    dy = dequantize(*dy_pair, 1, 128, torch.float64)
    weight = dequantize(weight, scale, 128, 128, torch.float64)[torch.arange(len(counts)).repeat_interleave(counts)]
    _assert_near(dx, (torch.einsum("mn,mnk->mk", dy, weight), torch.einsum("mn,mnk->mk", dy.abs(), weight.abs())))


@on_kernel_device
def test_a_block_that_holds_nan_spoils_its_row_alone():
    (x, x_scale, *rest), _ = _arguments([3, 2], 16, 256)
    x_scale[1, 0] = float("nan")
    for run in (fp8_grouped_matmul_ref, _launch):
        assert run(x, x_scale, *rest).isnan().any(1).tolist() == [False, True, False, False, False]


@on_kernel_device
def test_repeats_bit_by_bit():
    args, _ = _arguments([40, 3], 130, 384)
    first = _launch(*args)
    assert all(same_bits(first, _launch(*args)) for _ in range(3))


def _in_places(args, counts, room, filler):
    """The same arguments in the masked layout; unused rows and their scales hold ``filler``."""
    x, x_scale, weight, weight_scale, _, dtype = args
    group = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    place = torch.cat([torch.arange(count) for count in counts])
    wide = torch.full((len(counts), room, x.shape[1]), filler).to(x.dtype)
    wide_scale = torch.full((len(counts), room, x_scale.shape[1]), filler).to(x_scale.dtype)
    bits = torch.uint8 if x_scale.itemsize == 1 else torch.int32
    wide[group, place] = x
    wide_scale.view(bits)[group, place] = x_scale.view(bits)
    counts = torch.tensor(counts, dtype=torch.int32)
    return (wide, wide_scale, weight, weight_scale, counts, dtype), (group, place)


@on_kernel_device
@every_masked_provider
@settings(max_examples=12)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    spare=st.integers(0, 70),
    N=st.sampled_from([1, 16, 130]),
    K=st.sampled_from([24, 150, 192]),
    power_of_two=st.booleans(),
    seed=st.integers(0, 99),
)
def test_masked_rows_are_zero_and_the_others_as_in_the_contiguous_layout(run, counts, spare, N, K, power_of_two, seed):
    torch.manual_seed(seed)
    args, exact = _arguments(counts, N, K, power_of_two)
    wide, places = _in_places(args, counts, max(counts) + spare, float("nan"))
    y = run(*wide)
    assert y.is_contiguous() and y.shape == (len(counts), max(counts) + spare, N)
    _assert_near(y[places], exact)
    y[places] = 0
    assert torch.equal(y, torch.zeros_like(y))


def test_refuses_what_does_not_fit():
    (x, x_scale, weight, weight_scale, offsets, dtype), _ = _arguments([3, 4], 130, 200)
    with pytest.raises(ValueError, match=r"got \[7, 200\], \[2, 130, 199\] and \[2\]"):
        fp8_grouped_matmul(x, x_scale, weight[..., :199], weight_scale, offsets, dtype)
    with pytest.raises(ValueError, match=r"got \[7, 200\], \[2, 130, 200\] and \[1\]"):
        fp8_grouped_matmul(x, x_scale, weight, weight_scale, offsets[:1], dtype)
    with pytest.raises(ValueError, match=r"fp8_grouped_matmul: want x_scale \[7, 2\], got \[7, 1\]"):
        fp8_grouped_matmul(x, x_scale[:, :1], weight, weight_scale, offsets, dtype)
    with pytest.raises(ValueError, match=r"want weight_scale \[2, 2, 2\], got \[2, 1, 2\]"):
        fp8_grouped_matmul(x, x_scale, weight, weight_scale[:, :1], offsets, dtype)
    with pytest.raises(TypeError, match="want float8 x and weight .* got torch.float32, torch.float8_e4m3fn"):
        fp8_grouped_matmul(x.float(), x_scale, weight, weight_scale, offsets, dtype)
    with pytest.raises(TypeError, match="int32 offsets or counts, got .* and torch.int64"):
        fp8_grouped_matmul(x, x_scale, weight, weight_scale, offsets.long(), dtype)
    with pytest.raises(TypeError, match="want two scales of one dtype, got torch.float8_e8m0fnu and torch.float32"):
        fp8_grouped_matmul(x, x_scale.to(torch.float8_e8m0fnu), weight, weight_scale, offsets, dtype)
    with pytest.raises(TypeError, match="want a result in bfloat16 or float32, got torch.float16"):
        fp8_grouped_matmul(x, x_scale, weight, weight_scale, offsets, torch.float16)
    for wrong in ([3, 8], [4, 3], [-1, 7], [3, 6]):
        with pytest.raises(ValueError, match=r"want offsets that never decrease and end at M = 7, got \[-?\d, \d\]"):
            fp8_grouped_matmul(x, x_scale, weight, weight_scale, torch.tensor(wrong, dtype=torch.int32), dtype)


def test_masked_refuses_what_does_not_fit():
    args, _ = _arguments([3, 4], 130, 200)
    (x, x_scale, *rest), _ = _in_places(args, [3, 4], 5, 0.0)
    with pytest.raises(ValueError, match=r"masked: want x \[E, C, K\].*got \[5, 200\]"):
        fp8_grouped_matmul_masked(x[0], x_scale[0], *rest)
    with pytest.raises(ValueError, match=r"got \[1, 5, 200\], \[2, 130, 200\] and \[2\]"):
        fp8_grouped_matmul_masked(x[:1], x_scale[:1], *rest)
    with pytest.raises(ValueError, match=r"masked: want x_scale \[2, 5, 2\], got \[2, 4, 2\]"):
        fp8_grouped_matmul_masked(x, x_scale[:, :4], *rest)


@on_kernel_device
def test_wrong_offsets_reach_nothing_but_the_rows():
    (x, x_scale, weight, weight_scale, _, dtype), _ = _arguments([3, 4], 16, 32)
    for wrong in ([3, 900], [-5, 7], [9, 2]):
        y = _launch(x, x_scale, weight, weight_scale, torch.tensor(wrong, dtype=torch.int32), dtype)
        assert y.shape == (7, 16)
