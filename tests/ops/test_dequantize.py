"""Dequantize: every code times its scale, and the pair with quantize."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from accuracy import same_bits
from deepfuse.ops.dequantize import _launch, dequantize, dequantize_ref, straight_through
from deepfuse.ops.quantize import BLOCKS, quantize

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RUNS = [pytest.param(dequantize_ref, id="reference"), pytest.param(_launch, id="triton")]
on_kernel_device = pytest.mark.usefixtures("kernel_device")


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("fp8", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_code_times_its_scale(run, fp8, dtype):
    values = torch.arange(256, dtype=torch.uint8).view(fp8).reshape(2, 128)
    scale = torch.tensor([[0.3], [7e-3]])
    expected = (values.double() * scale.double()).float().to(dtype)
    torch.testing.assert_close(run(values, scale, 1, 128, dtype), expected, rtol=0, atol=0, equal_nan=True)


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
def test_every_power_of_two_is_a_scale(run):
    codes = torch.arange(256, dtype=torch.uint8)
    scale = codes.view(torch.float8_e8m0fnu).reshape(256, 1)
    y = run(torch.ones(256, 1).to(E4M3), scale, 1, 128, torch.float32)
    expected = torch.exp2(codes.double() - 127).float()
    expected[255] = float("nan")
    torch.testing.assert_close(y[:, 0], expected, rtol=0, atol=0, equal_nan=True)


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
@settings(max_examples=30)
@given(
    M=st.integers(0, 140),
    K=st.integers(0, 300),
    block=st.sampled_from(BLOCKS),
    fp8=st.sampled_from([E4M3, E5M2]),
    power_of_two=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_each_block_has_its_scale(run, M, K, block, fp8, power_of_two, transposed, seed):
    torch.manual_seed(seed)
    values, scale = quantize(torch.randn(M, K), fp8, *block, power_of_two)
    rows, cols = block if block[0] else (max(M, 1), max(K, 1))
    m, k = torch.arange(M)[:, None] // rows, torch.arange(K)[None] // cols
    expected = (values.double() * scale.double()[m, k]).float()
    if transposed:
        values = values.t().contiguous().t()
        scale = scale.contiguous()
    y = run(values, scale, *block, torch.float32)
    assert y.is_contiguous() and same_bits(y, expected)


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_matrix_has_scales_of_its_own(run, block, transposed):
    values, scale = quantize(
        torch.randn(2, 2, 150, 130) * torch.logspace(-2, 1, 4).view(2, 2, 1, 1), E4M3, *block, False
    )
    if transposed:
        values, scale = values.mT.contiguous().mT, scale.mT.contiguous().mT
    y = run(values, scale, *block, torch.float32)
    assert y.is_contiguous()
    for i in range(2):
        for j in range(2):
            assert same_bits(y[i, j], run(values[i, j], scale[i, j], *block, torch.float32))


@on_kernel_device
@pytest.mark.parametrize(("fp8", "bits"), [(E4M3, 3), (E5M2, 2)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_there_and_back_is_within_half_a_unit(fp8, bits, power_of_two):
    x = torch.randn(150, 260)
    y = dequantize(*quantize(x, fp8, 128, 128, power_of_two), 128, 128, torch.float32)
    # of the last place; below the smallest normal number units stay what they are there
    floor = torch.finfo(fp8).smallest_normal * 2 * x.abs().max() / torch.finfo(fp8).max
    assert ((y - x).abs() <= torch.maximum(x.abs(), floor) * 2.0 ** -(bits + 1) * 1.0001).all()


def test_what_is_no_number_stays_none():
    x = torch.randn(4, 256)
    x[1, 3], x[2, 200] = float("inf"), float("nan")
    y = dequantize(*quantize(x, E4M3, 1, 128, False), 1, 128, torch.float32)
    assert y[1, :128].isnan().all() and y[2, 128:].isnan().all() and y.isnan().sum() == 256


def test_straight_through_is_the_pair_with_the_gradient_of_the_identity():
    x = torch.randn(5, 200, dtype=torch.bfloat16, requires_grad=True)
    y = straight_through(x, E4M3, 1, 128, False)
    assert same_bits(y, dequantize(*quantize(x, E4M3, 1, 128, False), 1, 128, torch.bfloat16))
    dy = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy)


def test_refuses():
    values, scale = quantize(torch.randn(2, 256), E4M3, 1, 128, False)
    with pytest.raises(ValueError, match=r"dequantize: want scale \[2, 2\], got \[2, 1\]"):
        dequantize(values, scale[:, :1], 1, 128, torch.float32)
    with pytest.raises(ValueError, match=r"dequantize: want scale \[1, 1\], got \[1\]"):
        dequantize(values, scale[0, :1], 0, 0, torch.float32)
    with pytest.raises(TypeError, match=r"want scale in float32 or float8_e8m0fnu, got torch.bfloat16"):
        dequantize(values, scale.bfloat16(), 1, 128, torch.float32)
    with pytest.raises(TypeError, match=r"want dtype float8_e4m3fn or float8_e5m2, got torch.float32"):
        dequantize(values.float(), scale, 1, 128, torch.float32)
    with pytest.raises(TypeError, match=r"want dtype float16, .* got torch.int8"):
        dequantize(values, scale, 1, 128, torch.int8)
    with pytest.raises(ValueError, match=r"got 1x64"):
        dequantize(values, scale, 1, 64, torch.float32)
    with pytest.raises(ValueError, match=r"want values \[\.\.\., M, K\], got \[256\]"):
        dequantize(values[0], scale, 1, 128, torch.float32)
    with pytest.raises(ValueError, match=r"want scale \[1, 2, 2\], got \[2, 2\]"):
        dequantize(values[None], scale, 1, 128, torch.float32)
