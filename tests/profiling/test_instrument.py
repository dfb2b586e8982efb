"""Clocks in Inductor's code, as text; that the code runs with them is tests/profiling/test_profile.py's."""

import pytest

from deepfuse.ir.private import KERNEL, PART
from deepfuse.profiling.instrument import instrument

CODE = f"""
cpp_fused_add_0 = async_compile.cpp_pybinding(['const float*', 'float*'], r'''
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C"  void  kernel(const float* in_ptr0,
                       float* out_ptr0)
{{
    {PART}
    {{
        out_ptr0[0] = in_ptr0[0];
    }}
    {PART}
    {{
        out_ptr0[1] = in_ptr0[1];
    }}
}}
''')

class Runner:
    def call(self, args):
        arg0_1, arg1_1 = args
        u0 = arg0_1
        buf0 = empty_strided_cpu((u0, 2), (2, 1), torch.float32)
        {KERNEL} 3/1+2|4+5/
        cpp_fused_add_0(arg1_1, buf0)
        {KERNEL} 6/
        # Topologically Sorted Source Nodes: [mm]
        extern_kernels.mm(buf0, reinterpret_tensor(arg1_1, (2, 2),
            (1, 2), 0), out=buf0)
        {KERNEL} 7/
        buf1 = torch.ops.aten.topk.default(buf0, 2)
        del buf0
        return (buf1, )
"""


def test_every_kernel_with_its_parts():
    _, kernels = instrument(CODE)
    assert [k.name for k in kernels] == ["cpp_fused_add_0", "extern_kernels.mm", "torch.ops.aten.topk.default"]
    assert [k.parts for k in kernels] == [[((3,), (1, 2)), ((4, 5), ())], [((6,), ())], [((7,), ())]]
    assert [k.clocked for k in kernels] == [True, False, False]


def test_the_code_is_what_it_was_but_for_clocks():
    text, _ = instrument(CODE)
    compile(text, "code", "exec")
    for line in CODE.splitlines():
        # what is written anew: definition, signature, the calls of C++, what was on two lines, a comment in between
        if not any(part in line for part in ("cpp_fused", "out_ptr0)", PART, "mm", "(1, 2), 0)")):
            assert line in text, line
    assert "cpp_fused_add_0(arg1_1, buf0, deepfuse_marks[0])" in text
    assert 'deepfuse_sizes["u0"] = u0' in text
    assert text.count("deepfuse_log((") == 3


def test_clocks_stand_before_each_part_and_at_the_end():
    text, _ = instrument(CODE)
    kernel = text[text.index("r'''") : text.index("''')")]
    assert "['const float*', 'float*', 'int64_t*']" in text and "float* out_ptr0, int64_t* deepfuse_marks)" in kernel
    order = [
        kernel.index(piece) for piece in ("marks[0] =", "out_ptr0[0] =", "marks[1] =", "out_ptr0[1] =", "marks[2] =")
    ]
    assert order == sorted(order) and PART not in kernel


def test_parts_that_the_comment_does_not_know_are_one():
    # a kernel of another origin: its sites are known together
    text, kernels = instrument(CODE.replace("3/1+2|4+5/", "3/1+2|4+5/|8/"))
    assert kernels[0].parts == [((3, 4, 5, 8), (1, 2))] and not kernels[0].clocked
    assert "cpp_fused_add_0(arg1_1, buf0, deepfuse_unread)" in text


def test_code_without_sites_is_refused():
    with pytest.raises(ValueError, match="want code of a graph that this version of deepfuse built"):
        instrument(CODE.replace(KERNEL, "# kernel:"))
