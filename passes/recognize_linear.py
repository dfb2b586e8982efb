"""A linear layer written out in ATen becomes ``linear``.

    before:  y = view(mm(view(x), permute(weight)));  with a bias, addmm
    after:   y = deepfuse.linear(x, weight, bias)

Why: its matrix product can then go to the provider for its number of rows, and later passes see one node.
Requires: a weight [N, K] and x [..., K] of one dtype.
Numerics: exact; ``linear`` means ``torch.nn.functional.linear``, which is what stood there.
"""

from torch import Tensor
from torch.nn import functional

from deepfuse.ops.linear import linear
from deepfuse.passes.fusion import fusion


@fusion(stage="semantic", saves="nothing by itself: a decode step on a CPU reads weights once for all its rows")
class RecognizeLinear:
    @staticmethod
    def pattern(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)

    @staticmethod
    def replacement(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias)

    samples = [
        (f"{dtype}{x}", f"{dtype}[24, 32]", bias and f"{dtype}{bias}")
        for dtype in ("float32", "bfloat16", "float16")
        for x in ("[2, 3, 32]", "[5, 32]")
        for bias in (None, "[24]")
    ]
