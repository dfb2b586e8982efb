"""Ranges in Inductor's code, as text; that the code runs with them is tests/profiling/test_profile.py's."""

import json
from dataclasses import asdict

import pytest
import torch

import deepfuse.ops.rms_norm  # noqa: F401 - the op is called by its name
from cuda_code import cuda_code
from deepfuse.ir.private import KERNEL, NOTED
from deepfuse.passes.sites import Site
from deepfuse.profiling.instrument import instrument
from deepfuse.profiling.range_code import with_ranges

MODULES = ("layers.0.self_attn.q_a_proj", "layers.0.self_attn.o_proj", "layers.0.mlp.gate", "norm")
SITES = [Site(i, module, "linear") for i, module in enumerate(MODULES)]
TEXTS = "".join(f"{NOTED} {json.dumps(asdict(site))}\n" for site in SITES)
CODE = f"""
{TEXTS}
cpp_fused_0 = async_compile.cpp_pybinding(['float*'], r'''
''')

def call(args):
    arg0_1, = args
    buf0 = empty_strided_cpu((8, 8), (8, 1), torch.float32)
    {KERNEL} 0/
    extern_kernels.mm(arg0_1, reinterpret_tensor(arg0_1, (8, 8),
        (1, 8), 0), out=buf0)
    {KERNEL} 1/
    # Topologically Sorted Source Nodes: [mm]
    buf1 = torch.ops.aten.topk.default(buf0, 2)
    {KERNEL} 1/0|2/
    cpp_fused_0(buf0)
    del buf0
    {KERNEL} 1/
    cpp_fused_0(buf1)
    for i in range(2):
        {KERNEL} 1/
        cpp_fused_0(buf1)
    {KERNEL} 1/
    cpp_fused_0(buf1)
    return (buf1, )
{KERNEL} 3/
extern_kernels.mm(arg0_1, arg0_1)
"""
A, O, EXPERTS = "layers.0.self_attn", "layers.0.self_attn.o_proj.linear", "layers.0.mlp"


def statements(text):
    """Ranges by name as they open, ``-`` as they close, and the kernels between."""
    text, ranges = with_ranges(text)
    compile(text, "code", "exec")
    found = []
    for line in map(str.strip, text.splitlines()):
        if line.startswith("deepfuse_push("):
            found.append(ranges[int(line.removeprefix("deepfuse_push(")[:-1])].name)
        elif line == "deepfuse_pop()":
            found.append("-")
        elif line.startswith(("extern_kernels", "buf1 = torch", "cpp_fused_0(")):
            found.append(line.partition("(")[0])
    return found


def test_ranges_around_kernels_and_around_those_of_a_block():
    mm, topk, cpp = "extern_kernels.mm", "buf1 = torch.ops.aten.topk.default", "cpp_fused_0"
    assert statements(CODE) == [
        *(A, "layers.0.self_attn.q_a_proj.linear", mm, "-", O, topk, "-", "-"),
        # all parts of a C++ kernel, and what they take in
        *(f"{A} + {EXPERTS}", f"{O} + layers.0.mlp.gate.linear with layers.0.self_attn.q_a_proj.linear", cpp, "-", "-"),
        # a block goes on behind another, and ends with the statements it began in
        *(A, O, cpp, "-", "-"),
        *(A, O, cpp, "-", "-"),
        *(A, O, cpp, "-", "-"),
        *("norm", "norm.linear", mm, "-", "-"),
    ]


def test_the_code_is_what_it_was_but_for_ranges():
    text, _ = with_ranges(CODE)
    kept = [line for line in text.splitlines() if not line.lstrip().startswith("deepfuse_p")]
    assert kept == CODE.splitlines()


def test_clocks_stand_within_the_ranges():
    text, kernels = instrument(with_ranges(CODE)[0])
    compile(text, "code", "exec")
    assert len(kernels) == 7 == text.count("deepfuse_log((")
    lines = [line.strip() for line in text.splitlines()]
    for i, line in enumerate(lines):
        if line.startswith("deepfuse_began ="):
            assert lines[i - 1].startswith("deepfuse_push(")
        if line.startswith("deepfuse_log("):
            assert lines[i + 1] == "deepfuse_pop()"


def test_code_for_a_gpu():
    def layer(x, weight, norm):
        normed = torch.ops.deepfuse.rms_norm.triton(x, norm, 1e-6)
        return torch.softmax(torch.relu(normed @ weight) + 1, -1)

    modules = {"rms_norm": "layers.0.mlp.norm", "mm": "layers.0.mlp.gate", "relu": "layers.0.mlp", "div": "lm_head"}
    code, _ = cuda_code(layer, (8, 128), (128, 128), (128,), modules=modules)
    text, ranges = with_ranges(code)
    compile(text, "code", "exec")
    names = [(r.category, r.name) for r in ranges]
    assert names[:3] == [
        ("block", "layers.0.mlp"),
        ("op", "layers.0.mlp.norm.rms_norm"),
        ("op", "layers.0.mlp.gate.mm"),
    ]
    (_, blocks), (_, ops) = names[3:]
    assert blocks == "lm_head" and ops.startswith("amax + sum + lm_head.div with layers.0.mlp.relu + ")
    lines = [line.strip() for line in text.splitlines()]
    launch = next(i for i, line in enumerate(lines) if ".run(" in line and line.startswith("triton_per_fused"))
    # the stream is asked for outside
    assert "get_raw_stream" in lines[launch - 3] and lines[launch - 2 : launch] == [
        "deepfuse_push(3)",
        "deepfuse_push(4)",
    ]
    assert lines[launch + 1 : launch + 3] == ["deepfuse_pop()"] * 2


def test_code_without_sites_is_refused():
    with pytest.raises(ValueError, match="want code of a graph that this version of deepfuse built, got code without"):
        with_ranges(CODE.replace(KERNEL, "# kernel:"))
