"""Rotary position embedding written out in ATen, over heads [B, H, T, R], becomes ``rotary``.

    before:  y = x * cos + cat((-x[half:], x[:half])) * sin                    tables with two equal halves (GPT-NeoX, Llama)
             y = cat((a * cos - b * sin, b * cos + a * sin)); a, b = x[0::2], x[1::2]               (DeepSeek)
    after:   y = deepfuse.rotary(x, cos, sin, interleaved)                     over tokens [B * T, H, R]

Why: one kernel reads x once, where the halves are read twice and joined in memory.
Requires: tables [1 or B, T, ...] that the graph shows to have two equal halves (made by ``cat((f, f))``), since
``rotary`` takes one of them.
Numerics: reassociating; in narrow dtypes it rounds once, the model after each product.
"""

from functools import partial

import torch
from torch import Tensor, fx

from deepfuse.ir.tolerance import Tolerance
from deepfuse.ops.rotary import rotary
from deepfuse.passes.fusion import Site, fusion

aten = torch.ops.aten
_POINTWISE = {
    aten.mul.Tensor,
    aten.cos.default,
    aten.sin.default,
    aten.clone.default,
    torch.ops.prims.convert_element_type.default,
}


def _heads(dtype: str) -> Tensor:
    """``[B, H, T, R]`` as projections leave them: heads lie beside each other in memory."""
    return torch.randn(2, 5, 3, 8).to(getattr(torch, dtype)).transpose(1, 2)


def _table(dtype: str, R: int) -> Tensor:
    """``[1, T, R]`` with two equal halves."""
    half = torch.rand(1, 5, R // 2).to(getattr(torch, dtype))
    return torch.cat((half, half), -1)


@fusion(stage="semantic", kind="reassociating", saves="on CUDA three launches, two reads and two writes of x")
class RecognizeRotary:
    anchor = aten.cat.default

    @staticmethod
    def pattern(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        if interleaved:
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.cat((a * c - b * s, b * c + a * s), -1)
        half = x.shape[-1] // 2
        return x * c + torch.cat((-x[..., half:], x[..., :half]), -1) * s

    @staticmethod
    def replacement(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        B, H, T, R = x.shape
        rows = x.transpose(1, 2).reshape(B * T, H, R)
        tables = (t[..., : R // 2].expand(B, T, R // 2).reshape(B * T, R // 2) for t in (cos, sin))
        y = rotary(rows, *tables, interleaved).view(B, T, H, R).transpose(1, 2)
        # the model's result has the first of each pair before all the second ones
        return torch.cat((y[..., 0::2], y[..., 1::2]), -1) if interleaved else y

    @staticmethod
    def guard(site: Site) -> str | None:
        if not site.interleaved:
            for name in ("cos", "sin"):
                if not _has_equal_halves(site.nodes[name]):
                    return f"the graph does not show that the halves of {name} are equal"
        return None

    # two products are rounded, which may cancel: two roundings of values up to 4, 2**-9 or 2**-12 of them each
    tolerance = {
        torch.bfloat16: Tolerance(atol=8 * 2**-8, rtol=1.6e-2),
        torch.float16: Tolerance(atol=8 * 2**-11, rtol=2e-3),
    }
    samples = [
        (partial(_heads, dtype), partial(_table, dtype, R), partial(_table, dtype, R), R == 4)
        for dtype in ("float32", "bfloat16", "float16")
        for R in (8, 4)
    ]


def _has_equal_halves(table: fx.Node) -> bool:
    """Whether the last dimension is the same numbers twice, as far as the graph says."""
    node = table
    while node.target in _POINTWISE and not any(isinstance(a, fx.Node) for a in node.args[1:]):
        node = node.args[0]  # type: ignore[assignment]
    if node.target is aten.cat.default:
        parts = node.args[0]
        return isinstance(parts, list | tuple) and len(parts) == 2 and parts[0] is parts[1]
    # what Inductor makes of it: [..., n] -> [..., 1, n] -> [..., 2, n] -> [..., 2 n]
    if node.target is not aten.view.default:
        return False
    joined = node.meta["val"]
    while node.target in (aten.view.default, aten.clone.default):
        node = node.args[0]  # type: ignore[assignment]
    if node.target is not aten.expand.default:
        return False
    wide, narrow = node.meta["val"], node.args[0].meta["val"]  # type: ignore[union-attr]
    doubled = wide.ndim == joined.ndim + 1 and wide.shape[-2] == 2 and narrow.shape[-2] == 1
    return doubled and wide.shape[-1] * 2 == joined.shape[-1] and wide.shape[:-1] == (*narrow.shape[:-2], 2)
