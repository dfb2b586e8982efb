"""Compile every Triton kernel of the op table to sm_90 machine code, on a machine without a GPU, and read it.

A launcher is called on its arguments while the launch itself is replaced by a compilation for the target, with the
specialization (alignment, arguments that are 1) a launch would have had. Nothing is run, so arguments of DeepSeek-V3's
size are ``meta`` tensors, and outputs hold anything.

Run as a script it prints what :func:`compile_all` returns: where tests run kernels in Triton's interpreter, only a
process of its own can compile them.
"""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

SHARED_BYTES = 227 * 1024
"""Shared memory a program may have on sm_90."""
PROVIDER = "triton"
PROCESSES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineCode:
    """One compiled kernel.

    Attributes:
        op, kernel: who launched, and what.
        arguments: types and compile-time values of the kernel's parameters.
        num_warps: warps of a program.
        registers: of a thread.
        spill_bytes: local memory of a thread.
        shared_bytes: of a program.
        wgmma: whether it uses Hopper's tensor core instructions.
        deepseek_v3: whether launched at DeepSeek-V3's widths (else by a sample).
    """

    op: str
    kernel: str
    arguments: str
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: bool
    deepseek_v3: bool


def compile_in_subprocess(cache: Path) -> list[MachineCode]:
    """:func:`compile_all` in a process where Triton compiles; ``cache`` is a folder for what it keeps."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"machine_code: want an exit status of 0, got {done.returncode}:\n{done.stderr}")
    return [MachineCode(**fields) for fields in json.loads(done.stdout)]


def compile_all() -> list[MachineCode]:
    """Compile each kernel of each op for its samples in float32 and bfloat16 and at DeepSeek-V3's widths."""
    launches: dict[str, _Launch] = {}
    with _captured() as captured:
        for op, provider in triton_providers():
            for deepseek_v3, args in _arguments(op):
                op.check(*args)
                if provider.supports(*args) is None:
                    provider.fn(*args)
                for key, compile_kernel in captured:
                    launches.setdefault(key, _Launch(op.name, deepseek_v3, compile_kernel))
                captured.clear()
    global _pending
    _pending = list(launches.values())
    # forked, so that they find the pending launches: kernels cannot be sent
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("fork")) as pool:
        return list(pool.map(_compile_pending, range(len(_pending))))
