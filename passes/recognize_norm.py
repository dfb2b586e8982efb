"""RMSNorm written out in ATen becomes ``rms_norm``.

    before:  h = x * rsqrt(mean(x ** 2) + eps);  y = weight * h        as Llama and its kin write it, and as torch does
    after:   y = deepfuse.rms_norm(x, weight, eps)

Why: later passes match norms by name, and on CUDA it is one kernel that reads x once.
Requires: x and weight of one dtype; nobody else reads what is between. A training graph keeps those values for its
backward, so that norms stay written out there.
Numerics: reassociating; many models round to their dtype before the product with the weight, ``rms_norm`` after it.
"""

import torch
from torch import Tensor

from deepfuse.ops.rms_norm import rms_norm
from deepfuse.passes.fusion import Site, fusion

aten = torch.ops.aten


@fusion(stage="semantic", kind="reassociating", saves="on CUDA two launches, one read and one write of x")
class RecognizeNorm:
    anchor = aten.rsqrt.default

    @staticmethod
    def pattern(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        h = x.float()
        return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    @staticmethod
    def pattern_converted_twice(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    @staticmethod
    def pattern_rounded_last(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)

    @staticmethod
    def pattern_converted_twice_rounded_last(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        return (x.float() * scale * weight.float()).to(x.dtype)

    @staticmethod
    def pattern_of_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    def guard(site: Site) -> str | None:
        # the gradient of a norm has such a product too, with the gradient in the place of the weight
        return None if site.weight.ndim == 1 else f"weight {list(site.weight.shape)} is no vector"

    @staticmethod
    def replacement(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    # an eps that float32 holds: torch.nn.functional.rms_norm rounds it
    samples = [(f"{dtype}[2, 3, 48]", f"{dtype}[48]", 2**-20) for dtype in ("float32", "bfloat16", "float16")]
