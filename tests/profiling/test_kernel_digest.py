"""What changes a kernel's digest, and what does not."""

import json
import os
import subprocess
import sys

import pytest

from deepfuse.profiling.kernel_digest import without_names

KERNELS = """\
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

SCALE = tl.constexpr(2.0)


@triton.jit
def helper(x):
    return x * SCALE


@triton.jit
def middle(x):
    return helper(x) + 1


@triton.jit
def plain(x_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < N)
    tl.store(x_ptr + at, middle(x), mask=at < N)


@gluon.jit
def in_gluon(x_ptr, N, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = gl.arange(0, BLOCK, layout)
    gl.store(x_ptr + at, gl.load(x_ptr + at) * SCALE, mask=at < N)
"""
EDITS = {
    "nothing": ("", ""),
    "comments, and lines moved": ("def plain(x_ptr, N, BLOCK: tl.constexpr):\n", "{}\n\n    # why\n"),
    "plain": ("at < N)\n    tl.store", "at <= N)\n    tl.store"),
    "a helper of plain's helper": ("x * SCALE\n", "x - SCALE\n"),
    "a constant": ("tl.constexpr(2.0)", "tl.constexpr(3.0)"),
    "in_gluon": ("* SCALE, mask", "- SCALE, mask"),
}
"""What is replaced in the file above, the first time it stands there."""

DIGESTS = """
import dataclasses, importlib.util, json, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from deepfuse.profiling.kernel_digest import kernel_digest

def kernels(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def digest(kernel, type="fp32", block=128, aligned=True, arch=90, **options):
    target = GPUTarget("cuda", arch, 32)
    types = {"x_ptr": f"*{type}", "N": "i32", "BLOCK": "constexpr"}
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(kernel, types, {(2,): block}, {(0,): [["tt.divisibility", 16]]} if aligned else {})
    return kernel_digest(source, make_backend(target).parse_options(options), target)

found = {}
for name, path in json.loads(sys.argv[1]).items():
    edited = kernels(path)
    found[name] = [digest(edited.plain), digest(edited.in_gluon)]
plain = edited.plain
found["type"] = digest(plain, type="bf16")
found["block"] = digest(plain, block=256)
found["alignment"] = digest(plain, aligned=False)
found["arch"] = digest(plain, arch=100)
found["warps"] = digest(plain, num_warps=8)
found["stages"] = digest(plain, num_stages=2)
triton.__version__ += ".1"
found["triton"] = digest(plain)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """All of them, from one process without Triton's interpreter."""
    files = {}
    for name, (old, new) in EDITS.items():
        assert old in KERNELS
        # of one name: a helper's has its module's in it
        path = tmp_path_factory.mktemp("edit") / "kernels.py"
        path.write_text(KERNELS.replace(old, new.format(old), 1))
        files[name] = str(path)
    # the last file is the one whose launches vary below
    files["nothing, again"] = files["nothing"]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", DIGESTS, json.dumps(files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_comments_and_lines_decide_nothing(digests: dict[str, list[str]]) -> None:
    assert digests["comments, and lines moved"] == digests["nothing"] == digests["nothing, again"]


@pytest.mark.parametrize(
    ("edit", "changed"),
    [
        ("plain", (True, False)),
        ("a helper of plain's helper", (True, False)),
        ("a constant", (True, True)),
        ("in_gluon", (False, True)),
    ],
)
def test_an_edit_changes_the_kernels_it_is_in(
    edit: str, changed: tuple[bool, bool], digests: dict[str, list[str]]
) -> None:
    pairs = zip(digests[edit], digests["nothing"], strict=True)
    assert tuple(after != before for after, before in pairs) == changed


@pytest.mark.parametrize("other", ["type", "block", "alignment", "arch", "warps", "stages", "triton"])
def test_what_a_launch_and_its_compiler_decide(other: str, digests: dict[str, list[str]]) -> None:
    assert digests[other] != digests["nothing"][0]


CALLS = """\
tt.func public @_kernel(%0: f32) {
  %1 = tt.call @FIRST(%0)
  %2 = tt.call @SECOND(%1)
  %3 = tt.elementwise_inline_asm "@p0 bra done;" {} %2
}
tt.func private @FIRST(%0: f32) { %1 = arith.addf %0, %0 }
tt.func private @SECOND(%0: f32) { %1 = arith.mulf %0, %0 }
"""


def representation(first: str, second: str) -> str:
    return without_names(CALLS.replace("FIRST", first).replace("SECOND", second))


def test_the_file_and_the_name_of_a_function_decide_nothing() -> None:
    names = ("deepfuse.ops.quantize.f__fp32", "deepfuse.ops.fp8_rounding.f__fp32", '"triton.f__(1,)c8"', "f")
    assert len({representation(name, "g") for name in names}) == 1


def test_functions_of_one_name_in_two_files_are_two() -> None:
    text = representation("deepfuse.ops.a.f", "deepfuse.ops.b.f")
    other_call = CALLS.replace("tt.call @SECOND", "tt.call @FIRST")
    assert without_names(other_call) != text == representation("deepfuse.ops.b.f", "deepfuse.ops.a.f")


def test_a_label_of_inline_assembly_is_no_function() -> None:
    assert "@p0 bra" in representation("f", "g")
    assert representation("f", "g") != without_names(CALLS.replace("@p0", "@p1"))
