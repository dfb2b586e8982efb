"""A float32 product of operands that are stored narrower reads them as they are stored: the router's logits.

    before:  logits = linear(x.float(), weight.float(), None)
    after:   logits = router_logits(x, weight)

Why: saves two launches, and a write and a read of both operands in float32. DeepSeek-V3's router converts its weight at
every step, 3.7 MB read and 7.3 MB written and read again, where the product needs the 3.7 MB. Products of many tokens go
to the tensor cores.
Requires: a conversion that nobody else reads; where that is one of the two, the other operand stays wide. In training the
gradients read both, and nothing is rewritten: the conversions would stay.
Numerics: reassociating; the same products, exact in float32, but kernels add them in another order. On a CPU the op is the
graph that stood there.
"""

from torch import Tensor

from deepfuse.ops.linear import linear
from deepfuse.ops.router_logits import router_logits
from deepfuse.passes.fusion import Site, fusion


@fusion(
    stage="semantic", kind="reassociating", saves="two launches, a write and a read of x and of the weight in float32"
)
class FuseRouterLogits:
    @staticmethod
    def pattern(x: Tensor, weight: Tensor) -> Tensor:
        return linear(x.float(), weight.float(), None)

    @staticmethod
    def replacement(x: Tensor, weight: Tensor) -> Tensor:
        return router_logits(x, weight)

    @staticmethod
    def guard(site: Site) -> str | None:
        return None if site.x.ndim == 2 else f"x has {site.x.ndim} dimensions, rule wants 2"

    samples = [
        (f"{x}[3, 32]", f"{weight}[8, 32]")
        for narrow in ("bfloat16", "float16")
        for x, weight in ((narrow, narrow), (narrow, "float32"), ("float32", narrow))
    ]
