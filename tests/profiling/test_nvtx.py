"""What NVTX ranges are called, and where they open and close; who takes them hears it in test_model_ranges.py."""

import sys

import pytest
import torch

from deepfuse.passes.sites import Site
from deepfuse.profiling.nvtx import COLORS, Naming, Range, Ranges, listed, nested, open_domain
from deepfuse.profiling.timeline import Part
from nvtx_log import Listener

MODULES = (
    "embed_tokens",
    "layers.0.input_layernorm",
    "layers.0.self_attn.q_a_proj",
    "layers.0.mlp.gate_proj",
    "layers.1.mlp.gate",
    "layers.1.mlp",
    "layers.1",
    "norm.add",
    "lm_head",
    "",
    "mixer",
)
SITES = {module: Site(i, module, "linear") for i, module in enumerate(MODULES)}


def path(*own, taken_in=()):
    part = Part("cpp_fused_0", tuple(SITES[m] for m in own), tuple(SITES[m] for m in taken_in))
    return Naming(SITES.values()).path(part)


@pytest.mark.parametrize(
    ("module", "block", "kind"),
    [
        ("embed_tokens", "embed_tokens", "embedding"),
        ("layers.0.input_layernorm", "layers.0.input_layernorm", "norm"),
        ("layers.0.self_attn.q_a_proj", "layers.0.self_attn", "attention"),
        # with experts and without
        ("layers.0.mlp.gate_proj", "layers.0.mlp", "mlp"),
        ("layers.1.mlp.gate", "layers.1.mlp", "experts"),
        ("layers.1.mlp", "layers.1.mlp", "experts"),
        ("layers.1", "layers.1", "norm"),
        ("norm.add", "norm.add", "norm"),
        ("lm_head", "lm_head", "embedding"),
        ("mixer", "mixer", "other"),
    ],
)
def test_colours_by_kind_of_block(module, block, kind):
    assert path(module) == [Range(block, COLORS[kind], "block"), Range(f"{module}.linear", COLORS[kind], "op")]
    assert len(set(COLORS.values())) == len(COLORS)


def test_what_is_in_no_block_has_its_op_alone():
    assert path("") == [Range("linear", COLORS["other"], "op")]
    # nothing is known of it
    assert path() == [Range("cpp_fused_0", COLORS["other"], "op")]


def test_a_kernel_that_spans_blocks_says_so():
    block, op = path("layers.0.self_attn.q_a_proj", "layers.0.mlp.gate_proj", taken_in=("layers.0.input_layernorm",))
    assert block == Range("layers.0.self_attn + layers.0.mlp", COLORS["several"], "block")
    assert op.color == COLORS["several"]
    assert op.name == (
        "layers.0.self_attn.q_a_proj.linear + layers.0.mlp.gate_proj.linear with layers.0.input_layernorm.linear"
    )


def test_long_lists_are_counted():
    assert listed(["a", "b"]) == "a + b" and listed([]) == ""
    names = [f"layers.{i}.self_attn.q_a_proj.linear" for i in range(40)]
    text = listed(names)
    assert text == " + ".join([*names[:3], "37 more"]) and len(text) < 130
    # one that is too long by itself is there whole
    assert listed(["x" * 200]) == "x" * 200


def test_neighbours_share_what_they_have_in_common():
    paths = [("a", 1), ("a", 2), ("b", 3), (4,), ("b", 5), ("b", 5)]
    assert nested(paths) == [(("a", 1), 1), ((2,), 2), (("b", 3), 2), ((4,), 1), (("b", 5), 0), ((), 2)]
    assert nested([]) == []


def test_an_error_leaves_no_range_open():
    listener = Listener()
    ranges = Ranges(listener, "decode_1", [Range("a", 0, "block"), Range("b", 0, "op")])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mine"), ranges.of_a_call():
            ranges.push(0)
            ranges.push(1)
            ranges.pop()
            ranges.push(1)
            raise RuntimeError("mine")
        assert listener.open == []
    assert listener.heard == ["decode_1", "decode_1/a", "decode_1/a/b", "decode_1/a/b"] * 2


def test_without_package_and_cuda(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    message = r'want the package nvtx, or PyTorch with CUDA, for nvtx=True, got neither; pip install "deepfuse\[nvtx\]"'
    with pytest.raises(RuntimeError, match=message):
        open_domain()
