"""FP8 products: against the dequantized product in float64 (tight) and the unquantized one (the recipe's own error)."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from accuracy import assert_as_accurate, same_bits
from deepfuse.ops import fp8_matmul_triton as module
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.fp8_matmul import fp8_matmul, fp8_matmul_ref
from deepfuse.ops.fp8_matmul_scaled_mm import scaled_mm as by_scaled_mm
from deepfuse.ops.fp8_matmul_scaled_mm import scaled_mm_refuses
from deepfuse.ops.fp8_matmul_triton import _splits, launch
from deepfuse.ops.quantize import quantize

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RUNS = [pytest.param(fp8_matmul_ref, id="reference"), pytest.param(launch, id="triton")]
on_kernel_device = pytest.mark.usefixtures("kernel_device")


def _operands(M, N, K, b_rows=128, fp8=E4M3, power_of_two=False):
    """Two matrices, and both quantized as ``fp8_matmul`` takes them."""
    a, b = torch.randn(M, K), torch.randn(N, K) / max(K, 1) ** 0.5
    return a, b, (*quantize(a, E4M3, 1, 128, power_of_two), *quantize(b, fp8, b_rows, 128, power_of_two), b_rows)


def _exact(a, a_scale, b, b_scale, b_rows):
    a64 = dequantize(a, a_scale, 1, 128, torch.float64)
    return a64 @ dequantize(b, b_scale, b_rows, 128, torch.float64).t()


def _difference(x, y):
    """DeepGEMM's measure: 0 for equal, 1 for unrelated."""
    x, y = x.double(), y.double()
    return (1 - 2 * (x * y).sum() / (x * x + y * y).sum()).item()


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
@settings(max_examples=15)
@given(
    M=st.sampled_from([0, 1, 3, 16, 17, 64, 65, 130]),
    N=st.sampled_from([1, 16, 100, 128, 192]),
    K=st.sampled_from([0, 1, 16, 127, 128, 129, 576, 1200]),
    b_rows=st.sampled_from([1, 128]),
    fp8=st.sampled_from([E4M3, E5M2]),
    power_of_two=st.booleans(),
    bias=st.booleans(),
    residual=st.booleans(),
    seed=st.integers(0, 99),
)
def test_is_the_dequantized_product(run, M, N, K, b_rows, fp8, power_of_two, bias, residual, seed):
    torch.manual_seed(seed)
    *_, operands = _operands(M, N, K, b_rows, fp8, power_of_two)
    exact = _exact(*operands)
    bias = torch.randn(N, dtype=torch.bfloat16) if bias else None
    # strided, as a slice of something
    residual = torch.randn(N, M).t() if residual else None
    for term in (bias, residual):
        exact = exact if term is None else exact + term.double()
    y = run(*operands, bias, residual, torch.float32)
    assert y.is_contiguous() and y.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, atol=1e-5, rtol=1.3e-6)


@on_kernel_device
# a decode step whose K is split; partial blocks everywhere; tiles of the many rows
@pytest.mark.parametrize(("M", "N", "K"), [(1, 576, 2176), (33, 72, 300), (140, 200, 576)])
@pytest.mark.parametrize("b_rows", [1, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_is_as_accurate_as_pytorch_and_quantization_costs_little(M, N, K, b_rows, dtype):
    a, b, operands = _operands(M, N, K, b_rows)
    exact = _exact(*operands)
    y = launch(*operands, None, None, dtype)
    assert_as_accurate(y, fp8_matmul_ref(*operands, None, None, dtype), exact)
    assert _difference(y, exact) < 1e-5
    assert _difference(y, a.double() @ b.double().t()) < 1e-3
    # and again: nothing depends on who comes first
    assert same_bits(y, launch(*operands, None, None, dtype))


@on_kernel_device
@pytest.mark.parametrize("M", [5, 80])
def test_more_programs_than_one_band_of_tiles(monkeypatch, M):
    # tiles of the least size, so that there are many of them
    monkeypatch.setattr(module, "_tile", lambda M, N: (64, 16, 4, 2))
    *_, operands = _operands(M, 700, 144)
    torch.testing.assert_close(
        launch(*operands, None, None, torch.float32).double(), _exact(*operands), atol=1e-5, rtol=1.3e-6
    )


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
# few tokens and many, one; sizes that are no multiples of 16, or of anything
@pytest.mark.parametrize(("T", "N", "K"), [(150, 72, 260), (33, 130, 48), (1, 128, 576), (257, 65, 131)])
def test_the_matrix_products_of_a_gradient(run, T, N, K):
    x, weight, dy = torch.randn(T, K), torch.randn(N, K), torch.randn(T, N)
    weight, weight_scale = quantize(weight, E4M3, 128, 128, False)
    # of the input: the same weight, read transposed
    operands = (*quantize(dy, E4M3, 1, 128, False), weight.t(), weight_scale.t(), 128)
    dx = run(*operands, None, None, torch.float32)
    torch.testing.assert_close(dx.double(), _exact(*operands), atol=1e-4, rtol=1e-5)
    # of the weight: a sum over tokens, along which scales are 128x1
    columns = [quantize(t, E4M3, 128, 1, False) for t in (dy, x)]
    operands = tuple(t.t() for pair in columns for t in pair) + (1,)
    dweight = run(*operands, None, None, torch.float32)
    torch.testing.assert_close(dweight.double(), _exact(*operands), atol=1e-4, rtol=1e-5)
    assert _difference(dweight, dy.double().t() @ x.double()) < 2e-3


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("M", [4, 70])
def test_what_is_no_number_reaches_its_row_and_no_other(run, M):
    a = torch.randn(M, 256)
    a[1, 3], a[2, 200] = float("nan"), float("inf")
    b = torch.randn(16, 256)
    y = run(*quantize(a, E4M3, 1, 128, False), *quantize(b, E4M3, 128, 128, False), 128, None, None, torch.float32)
    assert y[1:3].isnan().all() and y.isnan().sum() == 32


def test_torch_gets_the_layouts_it_wants(monkeypatch):
    # as ScaledBlas.cpp checks them
    def scaled_mm(a, b, a_scale, a_kind, b_scale, b_kind, output_dtype):
        (M, K), N = a.shape, b.shape[1]
        blocks = -(-K // 128)
        assert M % 4 == 0 and a.is_contiguous() and b.stride() == (1, K)
        assert a_scale.shape == (M, blocks) and a_scale.stride() == (1, M)
        if b_kind == torch.nn.functional.ScalingType.BlockWise128x128:
            padded = -(-blocks // 4) * 4
            assert b_scale.shape == (padded, -(-N // 128)) and b_scale.stride() == (1, padded)
            b_scale = b_scale[:blocks].t()
        else:
            assert b_scale.shape == (N, blocks) and b_scale.stride() == (1, N)
        rows = 1 if b_kind == torch.nn.functional.ScalingType.BlockWise1x128 else 128
        return fp8_matmul_ref(a, a_scale, b.t(), b_scale, rows, None, None, output_dtype)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    for M, N, K, b_rows in [(70, 128, 576, 128), (128, 144, 512, 128), (65, 144, 272, 1), (0, 16, 16, 128)]:
        *_, operands = _operands(M, N, K, b_rows)
        arguments = (*operands, None, None, torch.bfloat16)
        y = by_scaled_mm(*arguments)
        assert y.is_contiguous()
        torch.testing.assert_close(y, fp8_matmul_ref(*arguments))


def test_torch_is_taken_where_it_can():
    *_, operands = _operands(80, 144, 256)
    assert scaled_mm_refuses(*operands, None, None, torch.bfloat16) is None
    assert "gives bfloat16" in scaled_mm_refuses(*operands, None, None, torch.float32)
    assert "before it adds" in scaled_mm_refuses(*operands, torch.ones(144), None, torch.bfloat16)
    assert "float32 scales" in scaled_mm_refuses(
        *_operands(80, 144, 256, 128, E4M3, True)[2], None, None, torch.bfloat16
    )
    assert "up to 64 rows" in scaled_mm_refuses(*_operands(64, 144, 256)[2], None, None, torch.bfloat16)
    assert "got [144, 100]" in scaled_mm_refuses(*_operands(80, 144, 100)[2], None, None, torch.bfloat16)


def test_k_is_split_where_programs_are_few():
    assert _splits(9, 56) == 14  # N 576, K 7168: 126 programs for 132 processors
    assert _splits(112, 128) == 1 and _splits(512, 4) == 1 and _splits(1, 4) == 1 and _splits(1, 0) == 1


def test_bias_and_residual_have_gradients():
    *_, operands = _operands(3, 8, 128)
    bias, residual = torch.randn(8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    dy = torch.randn(3, 8)
    y = fp8_matmul(*operands, bias, residual, torch.float32)
    dbias, dresidual = torch.autograd.grad(y, (bias, residual), dy)
    assert torch.equal(dresidual, dy)
    torch.testing.assert_close(dbias, dy.sum(0))


def test_refuses():
    *_, (a, a_scale, b, b_scale, _) = _operands(3, 200, 300)

    def refuses(error, match, *arguments):
        with pytest.raises(error, match=match):
            fp8_matmul(*arguments, torch.float32)

    none = (None, None)
    refuses(
        ValueError,
        r"want a \[M, K\] and b \[N, K\], got \[3, 300\] and \[200, 299\]",
        a,
        a_scale,
        b[:, :299],
        b_scale,
        128,
        *none,
    )
    refuses(ValueError, r"want a_scale \[3, 3\], got \[3, 2\]", a, a_scale[:, :2], b, b_scale, 128, *none)
    refuses(ValueError, r"want b_scale \[200, 3\], got \[2, 3\]", a, a_scale, b, b_scale, 1, *none)
    refuses(ValueError, r"want b_rows 1 or 128, got 64", a, a_scale, b, b_scale, 64, *none)
    refuses(
        TypeError,
        r"want a and b in float8.*, got torch.float8_e4m3fn and torch.float32",
        a,
        a_scale,
        b.float(),
        b_scale,
        128,
        *none,
    )
    refuses(
        TypeError,
        r"scales of one dtype, got torch.float32 and torch.float8_e8m0fnu",
        a,
        a_scale,
        b,
        b_scale.to(torch.float8_e8m0fnu),
        128,
        *none,
    )
    refuses(
        TypeError,
        r"want a_scale in float32 or float8_e8m0fnu, got torch.float64",
        a,
        a_scale.double(),
        b,
        b_scale,
        128,
        *none,
    )
    refuses(ValueError, r"want bias \[200\], got \[3\]", a, a_scale, b, b_scale, 128, torch.ones(3), None)
    refuses(ValueError, r"want residual \[3, 200\], got \[3, 1\]", a, a_scale, b, b_scale, 128, None, torch.ones(3, 1))
    with pytest.raises(TypeError, match="want dtype bfloat16, float32 or float64, got torch.float16"):
        fp8_matmul(a, a_scale, b, b_scale, 128, *none, torch.float16)
