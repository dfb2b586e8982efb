"""Compile every Triton kernel of the op table to sm_90 machine code, on a machine without a GPU, and read it.

A launcher is called on its arguments while the launch itself is replaced by a compilation, specialized (alignment,
arguments that are 1) as the launch would have been. Nothing runs, so DeepSeek-V3's sizes are ``meta`` tensors, and what
a launcher returns holds anything.

Run as a script it prints what it found: where kernels run in Triton's interpreter, only another process can compile.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

import deepfuse.ops
from deepfuse.ir.op import OPS, Op
from deepfuse.ir.provider import Provider

SHARED_BYTES = 227 * 1024
"""Shared memory a program may have on sm_90."""
PROCESSES = 2
_TARGET = GPUTarget("cuda", 90, 32)
_BACKEND = make_backend(_TARGET)
_PENDING: dict[str, tuple[str, ASTSource, Any]] = {}
"""What is to be compiled, and for which op."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineCode:
    """One compiled kernel.

    Attributes:
        op, kernel: who launched, and what.
        arguments: types of the arguments, and the values that were compiled in.
        num_warps: warps of a program.
        registers: of a thread.
        spill_bytes: stack and local memory of a thread.
        shared_bytes: of a program.
        wgmma: whether Hopper's tensor core instructions are in it.
        qgmma: whether those for FP8 are.
        tma: whether tiles are fetched by the tensor memory accelerator.
        stages: blocks of operands that are in shared memory or on their way at a time, where a loop multiplies them; None
            where none does.
    """

    op: str
    kernel: str
    arguments: Mapping[str, str]
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: bool
    qgmma: bool
    tma: bool
    stages: int | None


def import_ops() -> None:
    """Fill the table of ops."""
    for module in pkgutil.iter_modules(deepfuse.ops.__path__, "deepfuse.ops."):
        importlib.import_module(module.name)


def triton_providers() -> Iterator[tuple[Op, Provider]]:
    for op in OPS.values():
        for provider in op.providers:
            if provider.name.startswith(("triton", "gluon")):
                yield op, provider


def read_machine_code(cache: Path) -> list[MachineCode]:
    """What this module prints when run; ``cache`` is a folder for Triton's files."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        # what is unset warns in triton 3.9
        "TRITON_DEFAULT_FP_FUSION": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"machine_code: want exit status 0, got {done.returncode}\n{done.stderr[-4000:]}")
    return [MachineCode(**fields) for fields in json.loads(done.stdout)]


def deepseek_v3_arguments() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of DeepSeek-V3's widths for each op: one token, a batch of decoding sequences, a prompt."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for T in (1, 64, 4096):
        for name, argument_tuples in _deepseek_v3_arguments(T).items():
            found.setdefault(name, []).extend(argument_tuples)
    for T in (1, 64):
        for name, argument_tuple in _one_more_expert(T).items():
            found[name].append(argument_tuple)
    return found


def _one_more_expert(T: int) -> dict[str, tuple[Any, ...]]:
    """Of a decode step whose shared expert is one of the routed ones: 257 experts, nine a token."""
    D, E, K, F, fp8 = 7168, 257, 9, 2048, torch.float8_e4m3fn
    M = T * K

    def t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    offsets, experts = t(E, dtype=torch.int32), t(T, K, dtype=torch.int64)
    inverse, scales = t(M, dtype=torch.int64), t(D // 128, M, dtype=torch.float32).t()
    up_fp8 = t(E, 2 * F, D, dtype=fp8), t(E, 2 * F // 128, D // 128, dtype=torch.float32)
    return {
        "route": (t(T, 256, dtype=torch.float32), None, "sigmoid", "top2_sum", 8, 4, 8, True, 2.5, 1),
        "expert_permute": (t(T, D), experts, E),
        "permute_quantize": (t(T, D), experts, E, fp8, False),
        "grouped_matmul": (t(M, D), t(E, 2 * F, D), offsets),
        "fp8_grouped_matmul": (t(M, D, dtype=fp8), scales, *up_fp8, offsets, torch.bfloat16),
        "expert_unpermute": (t(M, D), inverse, inverse, t(T, K, dtype=torch.float32)),
    }


def _deepseek_v3_arguments(T: int) -> dict[str, list[tuple[Any, ...]]]:
    D, H, C, Q, R, N, E, K, F, V, P = 7168, 128, 512, 1536, 64, 128, 256, 8, 2048, 129280, 64
    M, scale, eps, fp8 = T * K, (N + R) ** -0.5, 1e-6, torch.float8_e4m3fn
    blocks = (M + 127) // 128

    def t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def f(*shape: int) -> torch.Tensor:
        return t(*shape, dtype=torch.float32)

    def i(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return t(*shape, dtype=dtype)

    def attention(heads: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
        return t(T, heads, N + R, dtype=dtype), t(T, heads, 2 * N, dtype=dtype), t(T, R, dtype=dtype)

    starts = (i(2, dtype=torch.int32), i(1, dtype=torch.int32), i(1, dtype=torch.int32))
    cache, table = t(T * P + 1, 64, C + R), i(T, P)
    cache_fp8 = t(T * P + 1, 64, C + 4 * C // 128 + 2 * R, dtype=torch.uint8)
    experts_up, experts_down, offsets = t(E, 2 * F, D), t(E, D, F), i(E, dtype=torch.int32)
    fp8_up = t(E, 2 * F, D, dtype=fp8), f(E, 2 * F // 128, D // 128)
    per_row = (f(T), i(T), f(T), i(T), i(T))
    # kv_b_proj, [H (N + V), C], in bfloat16 and in FP8
    kv_b_weights = (t(2 * H * N, C), None), (t(2 * H * N, C, dtype=fp8), f(2 * H * N // 128, C // 128))
    router = ("sigmoid", "top2_sum", 8, 4, K, True, 2.5)
    return {
        "absorb_query": [
            (t(T, H, N + R)[..., :N], t(T, H, N + R)[..., N:], f(T, R // 2), f(T, R // 2), True, *kv_b)
            for kv_b in kv_b_weights
        ],
        "rms_norm": [(t(T, width), t(width), eps) for width in (D, Q, C)],
        "add_rms_norm": [(t(T, D), t(T, D), t(D), eps)],
        "add_rms_norm_quantize": [(t(T, D), t(T, D), t(D), eps, fp8, False, keep) for keep in (False, True)],
        "append_latent": [(cache, t(T, C), t(T, R), i(T))],
        "append_latent_fp8": [(cache_fp8, t(T, C), t(T, R), i(T))],
        "fp8_grouped_matmul": [
            (t(rows, D, dtype=fp8), f(D // 128, rows).t(), *fp8_up, offsets, torch.bfloat16)
            for rows in (M, 16 * M, 64 * M)
        ]
        # the gradient of the input
        + [(t(M, 2 * F, dtype=fp8), f(2 * F // 128, M).t(), *(u.mT for u in fp8_up), offsets, torch.bfloat16)],
        "fp8_grouped_matmul_masked": [
            (
                t(E, room, D, dtype=fp8),
                f(E, D // 128, room).mT,
                *fp8_up,
                offsets,
                torch.bfloat16,
            )
            for room in (16, 64, 128)
        ],
        "fp8_grouped_matmul_wgrad": [
            (t(M, n, dtype=fp8), f(blocks, n), t(M, k, dtype=fp8), f(blocks, k), offsets, torch.float32)
            for n, k in ((2 * F, D), (D, F))
        ],
        "gather_latent": [(cache, table)],
        "gather_latent_fp8": [(cache_fp8, table, C, torch.bfloat16)],
        "dequantize": [
            (t(T, D, dtype=fp8), f(T, D // 128), 1, 128, torch.bfloat16),
            (t(T, D, dtype=fp8), f((T + 127) // 128, D), 128, 1, torch.bfloat16),
            (t(C + R, D, dtype=fp8), f((C + R + 127) // 128, D // 128), 128, 128, torch.bfloat16),
            (*fp8_up, 128, 128, torch.bfloat16),
        ],
        "fp8_matmul": [
            (
                t(T, k, dtype=fp8),
                f((k + 127) // 128, (T + 3) // 4 * 4).t()[:T],
                t(n, k, dtype=fp8),
                f((n + 127) // 128, (k + 127) // 128),
                128,
                None,
                None,
                torch.bfloat16,
            )
            # every projection of attention, and of the experts
            for n, k in ((Q + C + R, D), (H * (N + R), Q), (H * 2 * N, C), (D, H * N), (2 * F, D), (D, F), (C + R, D))
        ]
        + [
            # the gradients of the input and of the weight
            gradient
            for n, k in ((C + R, D), (2 * F, D))
            for gradient in (
                (
                    t(T, n, dtype=fp8),
                    f((n + 127) // 128, (T + 3) // 4 * 4).t()[:T],
                    t(n, k, dtype=fp8).t(),
                    f((n + 127) // 128, (k + 127) // 128).t(),
                    128,
                    None,
                    None,
                    torch.bfloat16,
                ),
                (
                    t(T, n, dtype=fp8).t(),
                    f((T + 127) // 128, n).t(),
                    t(T, k, dtype=fp8).t(),
                    f((T + 127) // 128, k).t(),
                    1,
                    None,
                    None,
                    torch.float32,
                ),
            )
        ],
        # the most rows whose places a program counts itself; K and E with a shared expert as one more
        "expert_permute": [(t(T, D), i(T, K), E), (t(128, D), i(128, K), E), (t(T, D), i(T, K + 1), E + 1)],
        "expert_unpermute": [(t(M, D), i(M), i(M), f(T, K))],
        "grouped_matmul": [
            (t(M, D), experts_up, offsets),
            (t(M, F), experts_down, offsets),
            # the gradients with respect to the rows
            (t(M, 2 * F), experts_up.mT, offsets),
            (t(M, D), experts_down.mT, offsets),
        ],
        "grouped_matmul_wgrad": [(t(M, 2 * F), t(M, D), offsets), (t(M, D), t(M, F), offsets)],
        # the two sides of kv_b_proj, [H, N + V, C]
        "head_matmul": [
            (t(T, H, N + R)[..., :N], t(H, 2 * N, C)[:, :N]),
            (t(T, H, C), t(H, 2 * N, C)[:, N:].mT),
        ],
        "mla_attention": [(*attention(H), *starts, scale)],
        "mla_attention_backward": [
            (
                t(T, heads, N, dtype=dtype),
                *attention(heads, dtype),
                t(T, heads, N, dtype=dtype),
                f(T, heads),
                *starts,
                scale,
            )
            # numbers of heads and tokens that are no multiple of anything; the wide registers of float32
            for heads, dtype in ((H, torch.bfloat16), (3, torch.bfloat16), (H, torch.float32))
        ],
        "mla_decode": [(t(T, H, C), t(T, H, R), cache, table, i(T, dtype=torch.int32), scale)],
        "mla_decode_fp8": [(t(T, H, C), t(T, H, R), cache_fp8, table, i(T, dtype=torch.int32), scale)],
        # a weight in bfloat16 and in FP8, quantized or not; few and many splits, heads and sequences
        "mla_decode_project": [
            (t(B, H, C), t(B, H, R), to, i(B, pages), i(B, dtype=torch.int32), scale, *kv_b, N, quantized, False, False)
            for B, pages in ((T, P), (min(T, 8), 1024))
            for to in (cache, cache_fp8)
            for kv_b, quantized in ((kv_b_weights[0], None), (kv_b_weights[1], None), (kv_b_weights[1], fp8))
        ],
        "norm_rope_append": [
            (to, t(T, C + R)[:, :C], t(T, C + R)[:, C:], t(C), f(T, R // 2), f(T, R // 2), i(T), eps, True, keep)
            for to in (cache, cache_fp8)
            for keep in (False, True)
        ],
        "permute_quantize": [
            (t(T, D), i(T, K), E, fp8, False),
            (t(128, D), i(128, K), E, fp8, False),
            (t(T, D), i(T, K + 1), E + 1, fp8, False),
        ],
        "quantize": [
            *((t(T, width), fp8, 1, 128, pow2) for width in (D, Q) for pow2 in (False, True)),
            (t(T, D), fp8, 128, 1, False),
            (t(C + R, D), fp8, 128, 128, False),
            (f(C + R, D), fp8, 128, 128, False),
            (experts_up, fp8, 128, 128, False),
            (t(T, D), fp8, 0, 0, False),
        ],
        "quantize_static": [
            (t(T, D), f(1, 1), fp8, 0, 0),
            (t(T, D), f((T + 127) // 128, D), fp8, 128, 1),
            (t(C + R, D), f((C + R + 127) // 128, D // 128), fp8, 128, 128),
        ],
        "rms_norm_quantize": [(t(T, width), t(width), eps, fp8, False, False) for width in (D, Q)],
        # as many tokens as its kernel takes
        "router_logits": [(t(rows, D), t(E, D)) for rows in (T, 2, 4, 8, 16)]
        + [(t(16, D), f(E, D)), (f(16, D), f(E, D))],
        "rotary": [(t(T, heads, R), f(T, R // 2), f(T, R // 2), True) for heads in (H, 1)],
        "route": [(f(T, E), f(E), *router, 0)],
        "sample": [(f(T, V), *per_row), (t(T, V), *per_row)],
        "swiglu": [tuple(t(T, 2 * width).chunk(2, -1)) for width in (9 * F, F)],
        "swiglu_quantize": [(*t(T, 2 * width).chunk(2, -1), fp8, False, False) for width in (9 * F, F)],
    }


def _argument_tuples(op: Op) -> Iterator[tuple[Any, ...]]:
    for dtype in (torch.float32, torch.bfloat16):
        yield from op.samples(torch.device("cpu"), dtype)
    yield from deepseek_v3_arguments().get(op.name, [])


@contextlib.contextmanager
def _launches_noted(op: str) -> Iterator[None]:
    """Within, a launch only adds to ``_PENDING``, once for each specialization."""

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        # as JITFunction.run does it, but for a target that is not there
        bind = create_function_from_signature(kernel.signature, kernel.params, _BACKEND)
        bound, specialization, options = bind(*args, **kwargs)
        options, *source = kernel._pack_args(_BACKEND, kwargs, bound, specialization, options)
        kind = GluonASTSource if kernel.is_gluon() else ASTSource
        _PENDING.setdefault(f"{kernel} {source} {options}", (op, kind(kernel, *source), options))

    original, JITFunction.run = JITFunction.run, run
    try:
        yield
    finally:
        JITFunction.run = original


def _compile(key: str) -> MachineCode:
    op, source, options = _PENDING[key]
    kernel = triton.compile(source, target=_TARGET, options=options.__dict__)
    names = list(source.signature)
    values = {names[path[0]]: str(value) for path, value in source.constants.items()}
    usage = _resource_usage(kernel.asm["cubin"])
    wgmma = "wgmma.mma_async" in kernel.asm["ptx"]
    copies = wgmma or "cp.async" in kernel.asm["ptx"]
    sass = _run_on_file("nvdisasm", "--print-code", kernel.asm["cubin"]) if copies else ""
    return MachineCode(
        op=op,
        kernel=source.name,
        arguments={**source.signature, **values},
        num_warps=kernel.metadata.num_warps,
        registers=usage["REG"],
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        wgmma=wgmma,
        qgmma="QGMMA" in sass,
        tma="UTMALDG" in sass,
        stages=_stages(sass),
    )


def _stages(sass: str) -> int | None:
    """One block that is multiplied, and those whose copies the wait before it lets run on.

    A loop that multiplies (GMMA; FFMA in a kernel without) commits its copies in groups (LDGDEPBAR), as many a turn as a block has, and waits until no
    more than a number of groups are left (DEPBAR.LE SB0). Where another warp fetches (UTMALDG), each block has two
    barriers in shared memory (initialized by SYNCS.EXCH): for full, and for empty.
    """
    if "UTMALDG" in sass:
        return sass.count("SYNCS.EXCH.64") // 2
    lines = sass.splitlines()
    labels = {line.strip(): number for number, line in enumerate(lines) if re.fullmatch(r"\.L_x_\d+:", line.strip())}
    loops, without_tensor_cores = [], []
    for end, line in enumerate(lines):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        begin = labels.get(f"{target[1]}:", end) if target else end
        body = "\n".join(lines[begin:end])
        if "GMMA" in body:
            loops.append(body)
        elif "LDGSTS" in body and "FFMA" in body:
            without_tensor_cores.append(body)
    loops = loops or without_tensor_cores
    if not loops:
        return None
    # the innermost
    body = min(loops, key=len)
    groups = body.count("LDGDEPBAR")
    if groups == 0:
        return 1
    left = min(int(count, 16) for count in re.findall(r"DEPBAR\.LE SB0, (0x[0-9a-f]+)", body))
    return 1 + left // groups


def _resource_usage(cubin: bytes) -> dict[str, int]:
    text = _run_on_file("cuobjdump", "--dump-resource-usage", cubin)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def _run_on_file(tool: str, option: str, cubin: bytes) -> str:
    """What a tool that comes with Triton prints."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(path), option, file.name], capture_output=True, text=True, check=True).stdout


def _compile_all() -> list[MachineCode]:
    torch.manual_seed(0)
    for op, provider in triton_providers():
        with _launches_noted(op.name):
            for args in _argument_tuples(op):
                op.check(*args)
                if provider.supports(*args) is None:
                    provider.fn(*args)
    # forked, as kernels cannot be pickled: the children find them in their copy of this process
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        return pool.map(_compile, _PENDING, chunksize=1)


if __name__ == "__main__":
    import_ops()
    json.dump([asdict(code) for code in _compile_all()], sys.stdout)
