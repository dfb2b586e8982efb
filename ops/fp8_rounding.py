"""The steps of ``quantize`` and its fused forms within a kernel: magnitudes, the scale of a block, the rounded quotient.

Each rounds as its counterpart among the references of ``ops/quantize.py`` does, bit by bit.
"""

import triton
import triton.language as tl

from deepfuse.ir.interpreter import interpreted

FUSED_MULTIPLY_ADD = tl.constexpr(not interpreted())
"""Whether ``tl.fma`` rounds once, which the interpreter's does not."""


@triton.jit
def divide(x, y, reciprocal):
    """``x / y`` rounded to nearest, given ``1 / y`` rounded to nearest, in three instructions instead of a call.

    Right where nothing over- or underflows on the way, and of the right sign where the quotient is 0. Theorem 3 of
    Markstein 1990 (doi:10.1147/rd.341.0111).
    """
    estimate = x * reciprocal
    # its rest negated, so that -0 stays -0
    return tl.fma(tl.fma(estimate, y, -x), -reciprocal, estimate)


@triton.jit
def amax_bits(x, axis: tl.constexpr):
    """Largest magnitude of float32 values along an axis (``None``: of all), as the bits of a float32.

    Floats that are not negative are ordered as their bits are, NaN last: so NaN is passed on, which ``tl.max`` of floats
    does not do, and the order of the comparisons does not matter.
    """
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis)


@triton.jit
def scale_from_amax_bits(bits, FP8_MAX: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """``block_scale`` in a kernel. Returns the scale, float32, and what is stored: it, or the byte of a power of two."""
    # 0x38D1B717 is 1e-4; integers keep NaN
    amax = tl.maximum(bits, 0x38D1B717).to(tl.float32, bitcast=True)
    largest = tl.full(amax.shape, FP8_MAX, tl.float32)
    if FUSED_MULTIPLY_ADD:
        scale = divide(amax, largest, tl.full(amax.shape, 1 / FP8_MAX, tl.float32))
        scale = tl.where(amax < float("inf"), scale, amax)
    else:
        scale = tl.div_rn(amax, largest)
    if POWER_OF_TWO:
        # what is not finite reaches 255, the NaN of the format
        exponent = tl.minimum((scale.to(tl.uint32, bitcast=True) + 0x7FFFFF) >> 23, 255)
        return (exponent << 23).to(tl.float32, bitcast=True), exponent.to(tl.uint8)
    else:  # noqa: RET505 - behind an if with a return Triton would compile both
        return scale, scale


@triton.jit
def quotient_for_fp8(x, scale, FP8_MAX: tl.constexpr):
    """``round_to_fp8`` in a kernel, up to the cast: ``x`` float32, and of its blocks the scales that quantize computes.

    They lie between 1e-9 and 1e36, and quotients below 2**-17 become 0: what underflows does not matter.
    """
    if FUSED_MULTIPLY_ADD:
        divisor = tl.where(scale < float("inf"), scale, float("nan"))
        reciprocal = tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
        return saturate(divide(x, divisor, reciprocal), FP8_MAX)
    else:  # noqa: RET505 - behind an if with a return Triton would compile both
        return saturate(quotient(x, scale), FP8_MAX)


@triton.jit
def quotient(x, scale):
    """``x / scale`` rounded to nearest, whatever the scale; NaN where it is no finite number."""
    divisor = tl.where(scale < float("inf"), scale, float("nan"))
    return tl.div_rn(x, tl.broadcast_to(divisor, x.shape))


@triton.jit
def saturate(x, FP8_MAX: tl.constexpr):
    """Within what FP8 holds; NaN stays."""
    # a GPU's cast saturates, but the interpreter's does not; and min and max must not make numbers of NaN
    return tl.clamp(x, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
