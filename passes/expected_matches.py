"""How often passes rewrite the graphs of presets: where a fusion silently stops to match, a test fails.

Counts are by layer, so that a model cut to few layers says the same of the whole. What is not named has no site.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sites:
    """Rewrites of a pass in one graph."""

    graph: int = 0
    """Outside of the layers."""
    layer: int = 0
    """In every layer."""
    dense: int = 0
    """More, in a layer whose feed-forward block is dense."""
    sparse: int = 0
    """More, in a layer of experts."""

    def of(self, dense_layers: int, sparse_layers: int) -> int:
        """In a model of so many layers."""
        layers = dense_layers + sparse_layers
        return self.graph + self.layer * layers + self.dense * dense_layers + self.sparse * sparse_layers


NO_OPS = {"eliminate_no_ops": Sites(graph=2)}
"""cos and sin times 1, which the released models' mscale is."""
FUSED = {
    # routed and shared experts; or the one block of a dense layer
    "fuse_swiglu_quantize": Sites(dense=1, sparse=2),
    "fuse_permute_quantize": Sites(sparse=1),
}
MERGED = {
    # q_a and kv_a; gate and up, of the dense block or of the shared experts
    "merge_projections": Sites(layer=2),
}
# of widths 96 and 64, which are no multiples of 128, FP8 weights stay apart and share what they read
TINY_APART = {"merge_projections": Sites(dense=1), "share_quantize": Sites(layer=1, sparse=1)}
# before q_a and kv_a, before q_b, and before the feed-forward block
DECODE_NORMS = {"fuse_norm_quantize": Sites(layer=3)}
# and before kv_b, which reads the latents of the prompt as they come; in decode it reads the cache
PREFILL_NORMS = {"fuse_norm_quantize": Sites(layer=4)}

MATCHES: Mapping[tuple[str, str, str], Mapping[str, Sites]] = {
    ("v3-671b", "bfloat16", "prefill"): NO_OPS | MERGED,
    ("v3-671b", "bfloat16", "decode"): NO_OPS | MERGED | {"absorb_mla": Sites(layer=1)},
    ("v3-671b", "fp8", "prefill"): NO_OPS | MERGED | PREFILL_NORMS | FUSED,
    ("v3-671b", "fp8", "decode"): NO_OPS | MERGED | DECODE_NORMS | FUSED,
    ("v3-tiny", "bfloat16", "prefill"): NO_OPS | MERGED,
    ("v3-tiny", "bfloat16", "decode"): NO_OPS | MERGED | {"absorb_mla": Sites(layer=1)},
    ("v3-tiny", "fp8", "prefill"): NO_OPS | TINY_APART | PREFILL_NORMS | FUSED,
    ("v3-tiny", "fp8", "decode"): NO_OPS | TINY_APART | DECODE_NORMS | FUSED,
}
"""Preset, precision of the linear layers, graph -> pass -> its sites. All passes together, on an H200's row of the cost
model."""
