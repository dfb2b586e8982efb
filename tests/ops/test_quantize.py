"""Quantize: bit by bit the recipe in float64, and the formats as the OCP specification defines them."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from accuracy import same_bits
from deepfuse.ops.quantize import BLOCKS, _launch, quantize, quantize_ref

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RUNS = [pytest.param(quantize_ref, id="reference"), pytest.param(_launch, id="triton")]
on_kernel_device = pytest.mark.usefixtures("kernel_device")
every_dtype = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)


def table(dtype):
    """What the 256 codes mean, from OCP 8-bit Floating Point Specification 1.0, section 5 (tables 1 and 2)."""
    exponent_bits, bias = (4, 7) if dtype == E4M3 else (5, 15)
    mantissa_bits = 7 - exponent_bits
    meanings = []
    for code in range(256):
        sign = -1.0 if code & 0x80 else 1.0
        exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & (1 << mantissa_bits) - 1
        fraction = mantissa / (1 << mantissa_bits)
        if dtype == E4M3 and code & 0x7F == 0x7F:
            # all ones is the only NaN, and there is no infinity
            meaning = np.nan
        elif dtype == E5M2 and exponent == 31:
            meaning = np.nan if mantissa else sign * np.inf
        elif exponent == 0:
            meaning = sign * fraction * 2.0 ** (1 - bias)
        else:
            meaning = sign * (1 + fraction) * 2.0 ** (exponent - bias)
        meanings.append(meaning)
    return np.array(meanings)


def nearest_code(x, dtype):
    """Code of the finite value next to each float64, ties to the even code, by comparison with the table."""
    values = table(dtype)
    finite = np.flatnonzero(np.isfinite(values[:128]))
    magnitudes = values[finite]
    above = np.clip(np.searchsorted(magnitudes, np.abs(x)), 0, len(finite) - 1)
    below = np.maximum(above - 1, 0)
    # halves of float8 are exact in float64
    middle = (magnitudes[below] + magnitudes[above]) / 2
    up = (np.abs(x) > middle) | ((np.abs(x) == middle) & (finite[above] % 2 == 0))
    code = np.where(up, finite[above], finite[below]) | np.where(np.signbit(x), 0x80, 0)
    return np.where(np.isnan(x), 0x7F, code).astype(np.uint8)


def blocks_of(M, K, rows, cols):
    rows, cols = (max(M, 1), max(K, 1)) if rows == 0 else (rows, cols)
    for i, m in enumerate(range(0, M, rows)):
        for j, k in enumerate(range(0, K, cols)):
            yield (i, j), (slice(m, m + rows), slice(k, k + cols))


def recipe(x, dtype, rows, cols, power_of_two):
    """Codes and float32 scales, computed in float64 with every rounding written out."""
    x = x.detach().cpu().double().numpy()
    largest = 448.0 if dtype == E4M3 else 57344.0
    codes = np.zeros(x.shape, np.uint8)
    shape = (1, 1) if rows == 0 else (-(-x.shape[0] // rows), -(-x.shape[1] // cols))
    scales = np.full(shape, np.float32(1e-4 / largest))
    if power_of_two:
        scales = np.exp2(np.ceil(np.log2(scales)))
    for block, where in blocks_of(*x.shape, rows, cols):
        scale = np.float64(np.float32(np.maximum(np.abs(x[where]).max(), 1e-4) / largest))
        if power_of_two:
            mantissa, exponent = np.frexp(scale)
            # the format has no infinity
            scale = np.ldexp(1.0, exponent - (mantissa == 0.5)) if np.isfinite(scale) else np.nan
        scales[block] = scale
        if np.isfinite(scale):
            quotient = np.clip(np.float32(x[where] / scale), -largest, largest)
            codes[where] = nearest_code(quotient.astype(np.float64), dtype)
        else:
            codes[where] = 0x7F
    return codes, scales.astype(np.float32)


def assert_is_recipe(run, x, dtype, rows, cols, power_of_two):
    values, scale = run(x, dtype, rows, cols, power_of_two)
    codes, scales = recipe(x, dtype, rows, cols, power_of_two)
    assert values.dtype == dtype and values.is_contiguous()
    assert scale.dtype == (torch.float8_e8m0fnu if power_of_two else torch.float32)
    np.testing.assert_array_equal(scale.float().cpu().numpy(), scales)
    # NaN has more than one code
    nan = np.isnan(table(dtype)[codes])
    np.testing.assert_array_equal(values.float().isnan().cpu().numpy(), nan)
    np.testing.assert_array_equal(values.view(torch.uint8).cpu().numpy()[~nan], codes[~nan])


@every_dtype
def test_all_256_codes_are_those_of_the_specification(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(codes.view(dtype).double().numpy(), table(dtype))
    assert torch.finfo(dtype).max == np.nanmax(table(dtype)[np.isfinite(table(dtype))])


# Micikevicius et al. 2022 (arXiv:2209.05433), table 1: codes as binary, their values, and how many codes are no number
PUBLISHED = {
    E4M3: {"0.1111.110": 448.0, "0.0001.000": 2.0**-6, "0.0000.111": 0.875 * 2.0**-6, "0.0000.001": 2.0**-9},
    E5M2: {"0.11110.11": 57344.0, "0.00001.00": 2.0**-14, "0.00000.11": 0.75 * 2.0**-14, "0.00000.01": 2.0**-16},
}
NOT_NUMBERS = {E4M3: (["0.1111.111"], []), E5M2: (["0.11111.01", "0.11111.10", "0.11111.11"], ["0.11111.00"])}
"""NaN, and infinity."""


@every_dtype
def test_codes_have_the_published_values(dtype):
    """The paper's own numbers, so that the table above is not its own witness; of either sign."""
    for sign in (0, 0x80):

        def value(code, sign=sign):
            bits = torch.tensor([int(code.replace(".", ""), 2) | sign], dtype=torch.uint8)
            return bits.view(dtype).double().item() * (-1 if sign else 1)

        assert {code: value(code) for code in PUBLISHED[dtype]} == PUBLISHED[dtype]
        nan, infinity = NOT_NUMBERS[dtype]
        assert all(np.isnan(value(code)) for code in nan)
        assert [value(code) for code in infinity] == [np.inf] * len(infinity)
        zero = value("0.0000.000")
        assert zero == 0 and not np.signbit(zero)
    every = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    finite = every[every.isfinite()]
    # two zeros; all others differ
    assert len(finite) == 256 - 2 * sum(map(len, NOT_NUMBERS[dtype])) == len(finite.unique()) + 1
    assert torch.equal(finite.sort().values, -finite.sort(descending=True).values)


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
@every_dtype
def test_values_that_fp8_holds_come_back_code_by_code(run, dtype):
    finite = [code for code in range(256) if np.isfinite(table(dtype)[code])]
    x = torch.tensor(table(dtype)[finite], dtype=torch.float32)[None]
    # the largest is among them, so that the scale is 1
    values, scale = run(x, dtype, 0, 0, False)
    assert scale.item() == 1.0
    assert values.view(torch.uint8).flatten().tolist() == finite


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
@every_dtype
def test_rounds_to_nearest_and_ties_to_even(run, dtype):
    values = table(dtype)[:128]
    values = values[np.isfinite(values)]
    middles = (values[1:] + values[:-1]) / 2
    x = np.stack([np.nextafter(np.float32(middles), -np.inf), middles, np.nextafter(np.float32(middles), np.inf)])
    x = torch.tensor(np.concatenate([x.ravel(), -x.ravel(), [values[-1]]]), dtype=torch.float32)[None]
    assert_is_recipe(run, x, dtype, 0, 0, False)


SPECIAL = [0.0, -0.0, 1e-40, -1e-45, 1e-8, 65504.0, -3.4e38, 448.0, 464.0, float("inf"), float("-inf"), float("nan")]


def _strided(x, layout):
    """The same values in other memory."""
    if layout == "columns":
        return x.t().contiguous().t()
    if layout == "apart":
        return x.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    if layout == "expanded" and x.shape[0]:
        return x[:1].expand_as(x)
    return x


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
@settings(max_examples=60)
@given(
    M=st.integers(0, 140),
    K=st.integers(0, 300),
    block=st.sampled_from(BLOCKS),
    fp8=st.sampled_from([E4M3, E5M2]),
    power_of_two=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["rows", "columns", "apart", "expanded"]),
    exponent=st.integers(-40, 38),
    special=st.lists(st.sampled_from(SPECIAL), max_size=4),
    seed=st.integers(0, 2**16),
)
def test_is_the_recipe_bit_by_bit(run, M, K, block, fp8, power_of_two, dtype, layout, exponent, special, seed):
    torch.manual_seed(seed)
    x = torch.randn(M, K) * 10.0**exponent
    for value in special if x.numel() else []:
        x[seed % M, (seed // 7 + len(special)) % K] = value
        seed = seed * 31 + 1
    assert_is_recipe(run, _strided(x.to(dtype), layout), fp8, *block, power_of_two)


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
# multiples of 7 in the largest give scales without rounding, and quotients that are ties
@pytest.mark.parametrize("amax", [7.0, 21.0, 1.0, 5.0, 3.0e-5, 6.0e4])
def test_no_bfloat16_is_rounded_another_way(run, amax):
    x = torch.arange(0x8000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x <= amax].unflatten(0, (1, -1))
    x[0, -1] = amax
    assert_is_recipe(run, x, E4M3, 0, 0, False)


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_is_no_number_spoils_its_block_and_no_other(run, power_of_two):
    x = torch.randn(6, 256)
    x[1, 3], x[2, 4], x[3, 255] = float("nan"), float("inf"), float("-inf")
    values, scale = run(x, E4M3, 1, 128, power_of_two)
    spoilt = torch.zeros(6, 2, dtype=torch.bool)
    spoilt[1, 0] = spoilt[2, 0] = spoilt[3, 1] = True
    assert torch.equal(~scale.float().isfinite(), spoilt)
    assert torch.equal(values.float().isnan(), spoilt.repeat_interleave(128, 1))
    if not power_of_two:
        assert scale[2, 0].item() == scale[3, 1].item() == float("inf") and scale[1, 0].isnan()


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("M", [1, 3, 4, 130])
def test_scales_lie_as_the_matrix_product_reads_them(run, power_of_two, M):
    x = torch.randn(M, 300)
    _, scale = run(x, E4M3, 1, 128, power_of_two)
    assert scale.shape == (M, 3) and scale.stride() == (1, (M + 3) // 4 * 4)
    for block, shape in (((128, 1), (-(-M // 128), 300)), ((128, 128), (-(-M // 128), 3)), ((0, 0), (1, 1))):
        _, scale = run(x, E4M3, *block, power_of_two)
        assert scale.shape == shape and scale.is_contiguous()


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
def test_a_power_of_two_is_the_next_and_saturates_nothing(run):
    x = torch.tensor([[448.0, 448.0001, 896.0, 1e-4, 300.0]]).t().contiguous()
    _, scale = run(x, E4M3, 1, 128, True)
    assert scale.float().flatten().tolist() == [1.0, 2.0, 2.0, 2.0**-22, 1.0]


def test_there_is_no_gradient_through_float8():
    x = torch.randn(3, 128, requires_grad=True)
    values, scale = quantize_ref(x, E4M3, 1, 128, False)
    assert not values.requires_grad and not scale.requires_grad


def test_the_reference_is_traced():
    # strides of a compiled graph's results are those of the shape rule
    def run(x):
        return quantize_ref(x, E4M3, 1, 128, True)

    x = torch.randn(5, 200)
    graph = torch.fx.experimental.proxy_tensor.make_fx(run, tracing_mode="symbolic")(x)
    for actual, expected in zip(graph(x), run(x), strict=True):
        assert same_bits(actual, expected) and actual.stride() == expected.stride()


@on_kernel_device
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("block", BLOCKS)
# rows that fill no 16 bytes of scales; several tiles of rows; no rows; no matrices
@pytest.mark.parametrize("shape", [(3, 5, 200), (2, 2, 150, 130), (2, 0, 128), (0, 3, 128)])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_matrix_is_quantized_on_its_own(run, block, shape, transposed):
    # magnitudes of their own, so that a scale of another matrix shows
    x = torch.randn(shape) * torch.logspace(-2, 2, max(shape[0], 1))[: shape[0]].view(-1, *[1] * (len(shape) - 1))
    x = x.mT.contiguous().mT if transposed else x
    values, scale = run(x, E4M3, *block, False)
    assert values.shape == shape and values.is_contiguous() and scale.shape[:-2] == shape[:-2]
    fake = quantize.fake(x, E4M3, *block, False)
    # of no elements, strides say nothing
    assert all(t.stride() == f.stride() for t, f in zip((values, scale), fake, strict=True) if t.numel())
    for i, matrix in enumerate(x.flatten(0, -3)):
        expected = run(matrix, E4M3, *block, False)
        assert same_bits(values.flatten(0, -3)[i], expected[0])
        # the layout is that of the matrix alone
        assert same_bits(scale.flatten(0, -3)[i], expected[1])
        assert scale.flatten(0, -3)[i].stride() == expected[1].stride()


def test_refuses():
    x = torch.randn(2, 128)
    with pytest.raises(ValueError, match=r"quantize: want x \[\.\.\., M, K\], got \[128\]"):
        quantize(x[0], E4M3, 1, 128, False)
    with pytest.raises(TypeError, match=r"quantize: want dtype float8_e4m3fn or float8_e5m2, got torch.bfloat16"):
        quantize(x, torch.bfloat16, 1, 128, False)
    with pytest.raises(ValueError, match=r"quantize: want blocks of 1x128, 128x1, 128x128 or 0x0 \(all\), got 64x128"):
        quantize(x, E4M3, 64, 128, False)
    with pytest.raises(TypeError, match=r"quantize: want x in float16, .* got torch.float8_e4m3fn"):
        quantize(x.to(E4M3), E4M3, 1, 128, False)
    with pytest.raises(TypeError, match=r"got torch.int64"):
        quantize(x.long(), E4M3, 1, 128, False)


def _fma(x, y, z):
    """In one rounding: the product of float32 is exact in float64, and the sum nearly so in 80 bits."""
    return np.float32(np.longdouble(np.float64(x) * np.float64(y)) + np.longdouble(z))


def _divide(x, y):
    """``divide`` of the kernel, as a GPU computes it."""
    reciprocal = np.float32(1) / y
    estimate = x * reciprocal
    return _fma(_fma(estimate, y, -x), -reciprocal, estimate)


@pytest.mark.parametrize("largest", [448.0, 57344.0])
def test_division_by_a_reciprocal_is_division(largest):
    rng = np.random.default_rng(0)
    # scales of the largest magnitudes there are, and of any
    amax = np.float32(10.0 ** rng.uniform(-4, 38.5, 20000))
    amax[:4] = 1e-4, 7.0, 448.0, np.finfo(np.float32).max
    scale = _divide(amax, np.float32(largest))
    np.testing.assert_array_equal(scale, amax / np.float32(largest))

    share = np.float32(rng.uniform(-1, 1, (64, 20000)) * 10.0 ** rng.uniform(-12, 0, (64, 20000)))
    # quotients next to the ties of FP8, which a last bit decides
    ties = table(E4M3 if largest == 448.0 else E5M2)[:100]
    share[:50] = np.float32((ties[1::2] + ties[:-1:2]) / 2 / largest)[:, None]
    x = share * amax
    expected, actual = x / scale, _divide(x, scale)
    decided = np.abs(expected) >= 2.0**-18
    np.testing.assert_array_equal(actual[decided], expected[decided])
    assert (np.abs(actual[~decided]) < 2.0**-17).all()
    zero = np.float32([0.0, -0.0])
    np.testing.assert_array_equal(np.signbit(_divide(zero, scale[:2])), [False, True])
