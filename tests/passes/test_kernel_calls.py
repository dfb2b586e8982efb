"""Calls of kernels in Inductor's code for a GPU, as it is written; those for a CPU are in test_instrument.py."""

import pytest
import torch

import deepfuse.ops.rms_norm  # noqa: F401 - the op is called by its name
from cuda_code import cuda_code
from deepfuse.ir.private import KERNEL
from deepfuse.passes.kernel_calls import kernel_calls
from deepfuse.profiling.instrument import instrument


def layer(x, weight, norm):
    normed = torch.ops.deepfuse.rms_norm.triton(x, norm, 1e-6)
    return torch.softmax(torch.relu(normed @ weight) + 1, -1)


@pytest.fixture(scope="module")
def code():
    return cuda_code(layer, (8, 128), (128, 128), (128,))


def test_calls_of_ops_of_libraries_and_of_triton(code):
    text, sites = code
    lines = text.splitlines()
    norm, product, fused = kernel_calls(lines)
    assert norm.name == "torch.ops.deepfuse.rms_norm.triton"
    assert product.name == "extern_kernels.mm"
    assert fused.name.startswith("triton_per_fused_") and fused.name.endswith(".run")
    ops = [[[sites[n].op for n in side] for side in call.parts[0]] for call in (norm, product, fused)]
    assert ops[:2] == [[["rms_norm"], []], [["mm"], []]]
    # softmax: the largest, the sum, and the quotients
    own, taken_in = ops[2]
    assert own[-1] == "div" and {"relu", "add"} <= {*own, *taken_in}
    # the stream is asked for between the comment and the call
    assert "get_raw_stream" in lines[fused.first - 1] and fused.comment < fused.first - 1
    assert lines[fused.last].endswith(f"stream={lines[fused.first - 1].split()[0]})")


def test_clocks_around_the_kernels_on_a_gpu(code):
    text, kernels = instrument(code[0])
    compile(text, "code", "exec")
    assert [k.clocked for k in kernels] == [False] * 3
    lines = [line.strip() for line in text.splitlines()]
    for kernel in kernels:
        at = next(i for i, line in enumerate(lines) if f"{kernel.name}(" in line)
        assert lines[at - 1] == "deepfuse_began = deepfuse_now()" and lines[at + 1].startswith("deepfuse_log((")


CODE = f"""
def call(args):
    {KERNEL} 1/
    workspace_0 = empty_strided_cuda((128, ), (1, ), torch.uint8)
    workspace_0.zero_()
    triton_red_fused_0_xnumel = 64*u0
    torch.cuda.set_device(0)
    stream0 = get_raw_stream(0)
    triton_red_fused_0.run(arg0_1, buf0, workspace_0, triton_red_fused_0_xnumel,
        stream=stream0)
    {KERNEL} 2/
    assert_size_stride(buf0, (8, 8), (8, 1))
    {KERNEL} 3/
    aten.index_put_(buf0, [buf1], buf2)
    multi_kernel_0.run(buf0)
triton_red_fused_0 = async_compile.triton('triton_red_fused_0', '''
multi_kernel_0 = async_compile.multi_kernel('multi_kernel_0', [
"""


def test_what_stands_before_a_kernel_is_none():
    calls = kernel_calls(CODE.splitlines())
    assert [(c.name, c.parts, c.last - c.first) for c in calls] == [
        ("triton_red_fused_0.run", (((1,), ()),), 1),
        # nothing is called behind the second comment
        ("aten.index_put_", (((3,), ()),), 0),
    ]


def test_code_without_sites_is_refused():
    with pytest.raises(ValueError, match="want code of a graph that this version of deepfuse built, got code without"):
        kernel_calls(CODE.replace(KERNEL, "# kernel:").splitlines())
