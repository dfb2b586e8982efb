"""Compile every Triton kernel of the table of ops to machine code, on a machine without a GPU, and read it.

A process of its own does it, which this file is when it is run: where kernels run in Triton's interpreter, only another
one can compile. It prints how many there are and then for each, in a line, a JSON list: a record for each op that
launches it.

Compiling takes minutes. Where a table is kept, a kernel with the digest of one of its rows has the row's machine code; one
of each source is compiled all the same, and refused if it differs from its row.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from deepfuse.ir.op import OPS
from deepfuse.ops import import_ops
from deepfuse.profiling.machine_code import ARCHS, MachineCode, bound_of, call_text
from deepfuse.profiling.occupancy import ctas_per_multiprocessor


def compile_kernels(
    arch: str = "sm_90",
    op: str | None = None,
    *,
    samples: bool = False,
    kept: Path | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[MachineCode]:
    """Every kernel that launch code may choose for DeepSeek-V3's decode steps and prompts.

    Args:
        arch: ``sm_90`` or ``sm_100``.
        op: of one op only.
        samples: also those that the samples of ops launch.
        kept: table that ``deepfuse kernels --json`` wrote with the Triton that is here: only what is not in it is compiled,
            and one kernel of each source.
        cache: folder for Triton's files, where what is compiled already is found; Triton's own if ``None``.
        progress: called with how many are done, and of how many.

    Raises:
        ValueError: an unknown arch or op, or an op without a kernel.
        RuntimeError: Triton, or a tool that comes with it, is not here; a kernel does not compile, or compiles to
            something else than the kept kernel of its digest.
    """
    check_request(arch, op)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", "deepfuse.profiling.compile_kernels", f"--arch={arch}"]
    command += [f"--op={op}"] * (op is not None) + ["--samples"] * samples
    command += [f"--kept={kept}"] * (kept is not None)
    found: list[list[MachineCode]] = []
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            total = int(process.stdout.readline() or 0)
            for line in process.stdout:
                found.append([MachineCode.from_json(fields) for fields in json.loads(line)])
                progress(len(found), total)
        if process.returncode:
            errors.seek(0)
            said = errors.read().strip()[-4000:]
            raise RuntimeError(f"kernels: want all kernels compiled, got exit status {process.returncode}: {said}")
    return [code for records in found for code in records]


def check_request(arch: str, op: str | None) -> None:
    """Raise what :func:`compile_kernels` raises before it compiles."""
    if arch not in ARCHS:
        raise ValueError(f"kernels: want arch {' or '.join(ARCHS)}, got {arch!r}")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("kernels: want the package triton, which comes with torch on Linux, got none")
    from deepfuse.profiling.launches import triton_providers
    from deepfuse.profiling.sass import check_tools

    import_ops()
    with_kernels = {op.name for op, _ in triton_providers()}
    if op is not None and op not in with_kernels:
        if op in OPS:
            raise ValueError(f"kernels: want an op that has a Triton kernel, got {op!r}, which has none")
        near = get_close_matches(op, with_kernels, n=3) or sorted(with_kernels)
        raise ValueError(f"kernels: want an op that has a Triton kernel ({', '.join(near)}), got {op!r}")
    check_tools(arch)


_WORK: tuple[str, dict[str, Any]] = ("", {})
"""Arch, and launches by name; set before processes are forked, as kernels cannot be sent to them."""


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def _digest(key: str) -> str:
    """Of one launch."""
    from deepfuse.profiling.kernel_digest import kernel_digest

    arch, found = _WORK
    return kernel_digest(found[key].source, found[key].options, _target(arch))


def _compiled(key: str) -> dict[str, Any]:
    """Compile one kernel: the facts of its machine code."""
    import triton

    from deepfuse.profiling import sass as read

    arch, found = _WORK
    kernel = triton.compile(found[key].source, target=_target(arch), options=found[key].options.__dict__)
    usage, sass = read.resource_usage(kernel.asm["cubin"]), read.disassemble(kernel.asm["cubin"])
    stored, loaded = read.spilled_bytes(sass)
    num_warps, shared_bytes = kernel.metadata.num_warps, kernel.metadata.shared
    return {
        "num_warps": num_warps,
        "registers": usage["REG"],
        "spill_bytes": usage["STACK"] + usage["LOCAL"],
        "spill_store_bytes": stored,
        "spill_load_bytes": loaded,
        "shared_bytes": shared_bytes,
        "ctas": ctas_per_multiprocessor(usage["REG"], shared_bytes, num_warps),
        "matrix": read.matrix_instructions(sass),
        "copies": read.copy_instructions(sass),
        "stages": read.stages(sass),
    }


def _records(key: str, digest: str, facts: dict[str, Any]) -> list[MachineCode]:
    """A record for each op that launches the kernel."""
    arch, found = _WORK
    source = found[key].source
    names = list(source.signature)
    records = []
    for (op, provider), by_tokens in found[key].calls.items():
        calls = sorted(by_tokens.items(), key=lambda call: call[0])
        ends = dict([*calls[:1], *calls[-1:]])
        records.append(
            MachineCode(
                op=op,
                provider=provider,
                kernel=source.name,
                call=call_text(calls[-1][1]) if calls else "",
                tokens=[tokens for tokens, _ in calls],
                bounds=[bound_of(OPS[op], args, tokens, ARCHS[arch]) for tokens, args in ends.items()],
                types=dict(source.signature),
                constants={names[path[0]]: str(value) for path, value in source.constants.items()},
                digest=digest,
                **facts,
            )
        )
    return records


def _known(kept: Path | None, digests: dict[str, str]) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """Facts by digest that a table has, and launches that are compiled although they are known: one of each source."""
    if kept is None:
        return {}, set()
    from deepfuse.profiling.kernel_table import read_table

    table = read_table(kept)
    known = {code.digest: code.facts for code in (*table.kernels, *table.samples)}
    checked: dict[str, str] = {}
    for key, digest in digests.items():
        if digest in known:
            checked.setdefault(_WORK[1][key].source.name, key)
    return known, set(checked.values())


def _compile_all(arch: str, ops: Collection[str], samples: bool, kept: Path | None) -> None:
    global _WORK
    from deepfuse.profiling.launches import launches

    torch.manual_seed(0)
    _WORK = arch, launches(int(arch.removeprefix("sm_")), ops, samples)
    keys = list(_WORK[1])
    print(len(keys), flush=True)
    forked = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0)), forked) as pool:
        digests = dict(zip(keys, pool.map(_digest, keys, chunksize=8), strict=True))
        known, checked = _known(kept, digests)
        compiled = pool.map(_compiled, (key for key in keys if key in checked or digests[key] not in known))
        for key, digest in digests.items():
            old = known.get(digest)
            facts = next(compiled) if key in checked or old is None else old
            if old not in (None, facts):
                raise RuntimeError(
                    f"kernels: want {_WORK[1][key].source.name} as the table has it, {old}, got {facts}: the digest "
                    f"{digest} leaves something out, or the row was changed by hand; write the table anew"
                )
            print(json.dumps([code.to_json() for code in _records(key, digest, facts)]), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--op")
    parser.add_argument("--samples", action="store_true")
    parser.add_argument("--kept", type=Path)
    asked = parser.parse_args()
    import_ops()
    _compile_all(asked.arch, [asked.op] if asked.op else list(OPS), asked.samples, asked.kept)
