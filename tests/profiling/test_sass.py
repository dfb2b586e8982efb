"""What is read from machine code is what is there: PTX that says it, assembled and disassembled again."""

import re
import subprocess
from pathlib import Path

import pytest
from triton import knobs

from deepfuse.profiling.sass import (
    check_tools,
    copy_instructions,
    disassemble,
    matrix_instructions,
    resource_usage,
    spilled_bytes,
)

HEAD = ".version 8.0\n.target sm_90a\n.address_size 64\n"


def assembled(body: str, folder: Path, *options: str) -> tuple[bytes, str]:
    """Machine code of a kernel that has the argument ``p``, and what ptxas says of it."""
    ptx = folder / "kernel.ptx"
    ptx.write_text(
        f"{HEAD}.visible .entry kernel(.param .u64 p) {{\n.reg .b64 %p;\nld.param.u64 %p, [p];\n{body}\nret;\n}}\n"
    )
    cubin = folder / "kernel.cubin"
    command = [knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", *options, str(ptx), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return cubin.read_bytes(), done.stderr + done.stdout


@pytest.mark.parametrize("limit", [24, 32, 255])
def test_spills_are_those_that_ptxas_reports(tmp_path: Path, limit: int) -> None:
    # all are loaded before the first is stored
    count = 64
    body = [f".reg .f32 %f<{count}>;"]
    body += [f"ld.volatile.global.f32 %f{i}, [%p+{4 * i}];" for i in range(count)]
    body += [f"st.volatile.global.f32 [%p+{4 * (count - i)}], %f{i};" for i in range(count)]
    cubin, said = assembled("\n".join(body), tmp_path, f"-maxrregcount={limit}")
    reported = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    used = re.search(r"Used (\d+) registers", said)
    assert reported and used
    stack, stored, loaded = map(int, reported.groups())
    assert (stored > 0) == (limit < 64)
    assert spilled_bytes(disassemble(cubin)) == (stored, loaded)
    usage = resource_usage(cubin)
    assert (usage["REG"], usage["STACK"]) == (int(used[1]), stack)


def test_copies_are_counted_by_width(tmp_path: Path) -> None:
    body = """
    .reg .b32 %r<8>; .reg .b64 %d; .reg .b16 %h; .reg .pred %q; .shared .align 16 .b8 s[256];
    ld.volatile.global.u32 %r0, [%p];
    setp.ne.b32 %q, %r0, 7;
    @%q ld.volatile.global.u8 %r1, [%p+8];
    ld.volatile.global.u16 %h, [%p+10];
    ld.volatile.global.b64 %d, [%p+16];
    ld.volatile.global.v4.b32 {%r2, %r3, %r4, %r5}, [%p+32];
    @!%q ld.volatile.global.v4.b32 {%r2, %r3, %r4, %r5}, [%p+48];
    cp.async.cg.shared.global [s], [%p], 16;
    cp.async.ca.shared.global [s+16], [%p], 4;
    cp.async.wait_all;
    st.volatile.global.u32 [%p+64], %r1;
    st.volatile.global.u16 [%p+68], %h;
    st.volatile.global.b64 [%p+72], %d;
    st.volatile.global.v4.b32 [%p+80], {%r2, %r3, %r4, %r5};
    """
    cubin, _ = assembled(body, tmp_path)
    assert copy_instructions(disassemble(cubin)) == {
        "LDG.128": 2,
        "LDG.16": 1,
        "LDG.32": 1,
        "LDG.64": 1,
        "LDG.8": 1,
        "LDGSTS.128": 1,
        "LDGSTS.32": 1,
        "STG.128": 1,
        "STG.16": 1,
        "STG.32": 1,
        "STG.64": 1,
    }


def test_products_of_tiles_are_counted_by_kind(tmp_path: Path) -> None:
    body = """
    .reg .b32 %r<4>; .reg .f32 %f<4>; .reg .b64 %a;
    ld.volatile.global.v4.b32 {%r0, %r1, %r2, %r3}, [%p];
    ld.volatile.global.v4.f32 {%f0, %f1, %f2, %f3}, [%p+16];
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {%f0, %f1, %f2, %f3}, {%r0, %r1, %r2, %r3}, {%r0, %r1}, {%f0, %f1, %f2, %f3};
    ld.volatile.global.b64 %a, [%p+32];
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %a, %a, 1, 1, 1, 0, 0;
    wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%f0, %f1, %f2, %f3}, %a, %a, 1, 1, 1;
    wgmma.mma_async.sync.aligned.m64n8k32.f32.e5m2.e4m3 {%f0, %f1, %f2, %f3}, %a, %a, 1, 1, 1;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    st.volatile.global.v4.f32 [%p], {%f0, %f1, %f2, %f3};
    """
    cubin, _ = assembled(body, tmp_path)
    assert matrix_instructions(disassemble(cubin)) == {"HGMMA": 1, "HMMA": 1, "QGMMA": 2}


@pytest.mark.parametrize(
    ("tool", "arch"),
    [("ptxas", "sm_90"), ("ptxas_blackwell", "sm_100"), ("cuobjdump", "sm_90"), ("nvdisasm", "sm_100")],
)
def test_a_tool_that_is_not_here(tool: str, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_tools(arch)
    described = type(knobs.nvidia).__dict__[tool]
    monkeypatch.setattr(described, "default_path", "/does/not/exist")
    monkeypatch.delenv(f"TRITON_{tool.upper()}_PATH", raising=False)
    with pytest.raises(RuntimeError, match=f"kernels: want {tool}, which comes with Triton"):
        check_tools(arch)
