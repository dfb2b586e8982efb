"""Quantize with given scales: the rounding of quantize, saturation, and the count of it."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from accuracy import same_bits
from deepfuse.ops.quantize import BLOCKS, quantize
from deepfuse.ops.quantize_static import _launch, quantize_static, quantize_static_ref

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RUNS = [pytest.param(quantize_static_ref, id="reference"), pytest.param(_launch, id="triton")]
on_kernel_device = pytest.mark.usefixtures("kernel_device")


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
@settings(max_examples=20)
@given(
    M=st.integers(0, 140),
    K=st.integers(0, 300),
    block=st.sampled_from(BLOCKS),
    fp8=st.sampled_from([E4M3, E5M2]),
    power_of_two=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_with_the_scales_of_quantize_it_is_quantize(run, M, K, block, fp8, power_of_two, dtype, seed):
    torch.manual_seed(seed)
    x = torch.randn(M, K, dtype=dtype)
    expected, scale = quantize(x, fp8, *block, power_of_two)
    values, clipped = run(x, scale, fp8, *block)
    assert same_bits(values, expected)
    # the scale of a block is rounded, so its largest may lie half a unit of float32 beyond
    assert clipped.dtype == torch.int64 and clipped.shape == ()
    assert int(clipped) == int((np.abs(_quotient(x, scale, *block)) > torch.finfo(fp8).max).sum())


def _quotient(x, scale, rows, cols):
    M, K = x.shape
    rows, cols = (rows, cols) if rows else (max(M, 1), max(K, 1))
    m, k = torch.arange(M)[:, None] // rows, torch.arange(K)[None] // cols
    return np.float32(x.double().cpu().numpy() / scale.double()[m, k].cpu().numpy())


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("fp8", "largest"), [(E4M3, 448.0), (E5M2, 57344.0)])
def test_saturates_and_counts(run, fp8, largest):
    x = torch.zeros(2, 200)
    # the largest itself is not clipped, what would round down to it is
    x[0, :5] = torch.tensor([largest, -largest, largest * 1.001, -2 * largest, 3e38])
    x[1, 199] = -largest * 1.5
    values, clipped = run(x, torch.ones(1, 1), fp8, 0, 0)
    assert values[0, :5].float().tolist() == [largest, -largest, largest, -largest, largest]
    assert values[1, 199].item() == -largest and int(clipped) == 4


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("fp8", [E4M3, E5M2], ids=str)
def test_what_is_no_number_is_neither_clipped_nor_made_one(run, fp8):
    x = torch.tensor([[float("inf"), float("-inf"), float("nan"), 1.0]])
    values, clipped = run(x, torch.full((1, 1), 0.5), fp8, 0, 0)
    assert values.float()[0, :3].isnan().all() and values[0, 3].item() == 2.0 and int(clipped) == 0


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_spoils_its_block(run, scale):
    scales = torch.tensor([[scale, 1.0]])
    values, clipped = run(torch.ones(1, 256), scales, E4M3, 1, 128)
    assert values[:, :128].float().isnan().all() and (values[:, 128:].float() == 1).all() and int(clipped) == 0


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
def test_the_smallest_scales(run):
    # subnormal scales divide as others do
    x = torch.tensor([[1e-44, -1e-40, 1e-43]])
    values, clipped = run(x, torch.full((1, 1), 1e-42), E4M3, 0, 0)
    expected = np.float32(x.double().cpu().numpy() / float(np.float32(1e-42)))
    assert torch.equal(values.float().cpu(), torch.from_numpy(expected).to(E4M3).float()) and int(clipped) == 0


def test_refuses():
    x, scale = torch.randn(2, 256), torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"quantize_static: want scale \[2, 2\], got \[1, 2\]"):
        quantize_static(x, scale[:1], E4M3, 1, 128)
    with pytest.raises(TypeError, match=r"quantize_static: want scale in float32 or float8_e8m0fnu, got torch.float64"):
        quantize_static(x, scale.double(), E4M3, 1, 128)
    with pytest.raises(TypeError, match=r"quantize_static: want dtype float8_e4m3fn or float8_e5m2, got torch.int8"):
        quantize_static(x, scale, torch.int8, 1, 128)
    with pytest.raises(ValueError, match=r"quantize_static: want blocks of .* got 2x2"):
        quantize_static(x, scale, E4M3, 2, 2)
    with pytest.raises(ValueError, match=r"quantize_static: want x \[M, K\], got \[256\]"):
        quantize_static(x[0], scale, E4M3, 1, 128)
    with pytest.raises(TypeError, match=r"quantize_static: want x in .* got torch.int64"):
        quantize_static(x.long(), scale, E4M3, 1, 128)
