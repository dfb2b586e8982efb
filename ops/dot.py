"""The product of two tiles, as every kernel here takes it: ``acc + a @ b``, summed in float32."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, DOT_FLOAT32: tl.constexpr):
    """``DOT_FLOAT32`` widens the tiles first, for Triton's interpreter: it computes bfloat16 on raw bits."""
    if DOT_FLOAT32:
        a, b = a.to(tl.float32), b.to(tl.float32)
    # float32 tiles as they are, not rounded to TF32
    return tl.dot(a, b, acc, input_precision="ieee")
