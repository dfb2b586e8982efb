"""How often passes rewrite the graphs of presets: where a fusion silently stops to match, a test fails.

Counts are by layer, so that a model cut to few layers says the same of the whole. A pass that is not named has no site.
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
ROUTER = {"fuse_router_logits": Sites(sparse=1)}
MERGED = {"merge_projections": Sites(layer=2)}
"""q_a and kv_a; gate and up, of the dense block or of the shared experts."""
ROUTED = {"merge_projections": Sites(layer=1, dense=1), "merge_shared_expert": Sites(sparse=1)}
"""In a decode step, of few tokens: gate and up of the shared expert lie with those of the routed ones."""
APPENDED = {"fuse_rope_append": Sites(layer=1)}
# the query of each attention, and its values
ABSORBED = {"absorb_mla": Sites(layer=1), "fuse_decode_attention": Sites(layer=2)}
FUSED = {
    # of routed and shared experts; or of the one block of a dense layer
    "fuse_swiglu_quantize": Sites(dense=1, sparse=2),
    "fuse_permute_quantize": Sites(sparse=1),
    # gate with up, and down
    "fuse_quantized_experts": Sites(sparse=2),
}
DECODE = {
    # before q_a with kv_a, before q_b, and before the feed-forward block
    "fuse_norm_quantize": Sites(layer=3),
    # q_a with kv_a, q_b, o; gate with up, and down, of the dense block or of the shared experts
    "fuse_quantized_matmul": Sites(layer=5),
}
DECODE_ROUTED = {
    # what the experts read is quantized where it is sorted
    "fuse_norm_quantize": Sites(layer=2, dense=1),
    "fuse_quantized_matmul": Sites(layer=3, dense=2),
    "fuse_swiglu_quantize": Sites(layer=1),
}
PREFILL = {
    # and kv_b, which reads the latents of the prompt as they come; in decode it is absorbed. The norm before it goes with
    # its quantize, and not into the cache write
    "fuse_norm_quantize": Sites(layer=4),
    "fuse_quantized_matmul": Sites(layer=6),
}
# whole blocks have no rows of zeros to be cut off
WHOLE_BLOCKS = NO_OPS | ROUTER | MERGED | {"eliminate_no_ops": Sites(graph=2, sparse=1)}
# q_a has 96 rows and an expert 64, no multiples of 128: these stay apart, share what they read, and are a product more
APART = NO_OPS | ROUTER | {"merge_projections": Sites(dense=1), "share_quantize": Sites(layer=1, sparse=1)}

MATCHES: Mapping[tuple[str, str, str], Mapping[str, Sites]] = {
    ("v3-671b", "bfloat16", "prefill"): NO_OPS | ROUTER | MERGED | APPENDED,
    ("v3-671b", "bfloat16", "decode"): NO_OPS | ROUTER | ROUTED | APPENDED | ABSORBED,
    ("v3-671b", "fp8", "prefill"): WHOLE_BLOCKS | FUSED | PREFILL,
    ("v3-671b", "fp8", "decode"): WHOLE_BLOCKS | ROUTED | FUSED | DECODE_ROUTED | APPENDED | ABSORBED,
    ("v3-tiny", "bfloat16", "prefill"): NO_OPS | ROUTER | MERGED | APPENDED,
    ("v3-tiny", "bfloat16", "decode"): NO_OPS | ROUTER | ROUTED | APPENDED | ABSORBED,
    ("v3-tiny", "fp8", "prefill"): APART | FUSED | PREFILL | {"fuse_quantized_matmul": Sites(layer=7, sparse=1)},
    ("v3-tiny", "fp8", "decode"): (
        APART | FUSED | DECODE | APPENDED | ABSORBED | {"fuse_quantized_matmul": Sites(layer=6, sparse=1)}
    ),
}
"""Preset, precision of the linear layers, graph -> pass -> its sites. All passes together, on an H200's row of the cost
model."""
