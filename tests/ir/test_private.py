"""Comments in Inductor's code for a GPU; those for a CPU are read wherever a profile is tested."""

import re

import torch

import deepfuse.ops.rms_norm  # noqa: F401 - the op is called by its name
from cuda_code import cuda_code
from deepfuse.ir.private import KERNEL


def layer(x, weight, norm):
    normed = torch.ops.deepfuse.rms_norm.triton(x, norm, 1e-6)
    # a kernel that takes things in, a library's, one of ours, and one that spans reduction and result
    return torch.softmax(torch.relu(normed @ weight) + 1, -1)


def test_kernels_on_a_gpu_say_their_sites():
    code, sites = cuda_code(layer, (8, 128), (128, 128), (128,))
    assert "with torch.cuda._DeviceGuard(0):" in code
    lines = [line.strip() for line in code.splitlines()]
    called = []
    for comment, *rest in (lines[i : i + 4] for i, line in enumerate(lines) if line.startswith(KERNEL)):
        own, _, taken_in = comment.removeprefix(KERNEL).strip().partition("/")
        ops = [[sites[int(n)].op for n in side.split("+") if n] for side in (own, taken_in)]
        # before a kernel of Triton's its stream is asked for
        call = next(line for line in rest if "get_raw_stream" not in line)
        called.append((re.search(r"[\w.]+(?=\()", call.split(" = ")[-1])[0], *ops))
    (norm, *norm_ops), (mm, *mm_ops), (fused, own, taken_in) = called
    assert (norm, norm_ops) == ("torch.ops.deepfuse.rms_norm.triton", [["rms_norm"], []])
    assert (mm, mm_ops) == ("extern_kernels.mm", [["mm"], []])
    assert re.fullmatch(r"triton_per_fused_\w*0\.run", fused)
    # softmax: the largest, the sum, and the quotients
    assert own[-1] == "div" and {"relu", "add"} <= {*own, *taken_in}
