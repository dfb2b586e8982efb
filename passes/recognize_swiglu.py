"""SwiGLU written out in ATen becomes ``swiglu``.

    before:  y = silu(gate) * up               silu stands there as gate / (1 + exp(-gate)), or gate * sigmoid(gate)
    after:   y = deepfuse.swiglu(gate, up)

Why: later passes match it by name, and take the quantization that follows into its kernel.
Requires: gate and up of one dtype and shape; nobody else reads silu(gate). A training graph keeps values between for
its backward, so that it stays written out there.
Numerics: reassociating; ``swiglu`` rounds once, after the product.
"""

from torch import Tensor
from torch.nn.functional import silu

from deepfuse.ops.swiglu import swiglu
from deepfuse.passes.fusion import fusion


@fusion(stage="semantic", kind="reassociating", saves="where it was eager, one write and one read of silu(gate)")
class RecognizeSwiglu:
    @staticmethod
    def pattern(gate: Tensor, up: Tensor) -> Tensor:
        return silu(gate) * up

    @staticmethod
    def pattern_sigmoid(gate: Tensor, up: Tensor) -> Tensor:
        return gate * gate.sigmoid() * up

    @staticmethod
    def replacement(gate: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate, up)

    @staticmethod
    def guard(site) -> str | None:
        if site.gate.shape != site.up.shape:
            return f"gate {list(site.gate.shape)} and up {list(site.up.shape)} are broadcast"
        return None

    samples = [(f"{dtype}[2, 3, 48]",) * 2 for dtype in ("float32", "bfloat16", "float16")]
