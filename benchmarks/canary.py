"""Whether providers that no run of their own has shown to work do so here: each on its op's samples, in another process.

    python benchmarks/canary.py fp8_matmul.gluon

A kernel that faults or hangs takes the device from its whole process: better from this one than from a benchmark's.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from cases import providers

from deepfuse.ir.op import OPS
from deepfuse.ops import import_ops

SECONDS = 90.0
OTHER = 2.0**-7
"""Of the norm of a result: two roundings to bfloat16 of the same number are at most 2**-8 of it apart."""


def refused(names: Sequence[str], device: torch.device, *, seconds: float = SECONDS) -> dict[str, str]:
    """Those of the providers that do not come through -> why.

    Args:
        names: each ``op.provider``.
        seconds: for one of them, its process and the compiling of its kernels.
    """
    return {name: why for name in names if (why := _why(name, device, seconds)) is not None}


def _why(name: str, device: torch.device, seconds: float) -> str | None:
    command = [sys.executable, str(Path(__file__).resolve()), name, device.type]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"its samples took more than {seconds:.0f} s"
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines()
    return f"its samples ended with status {done.returncode}: {said[-1][:300] if said else 'no word'}"


def check(name: str, device: torch.device) -> None:
    """Run a provider on the samples that it takes.

    Raises:
        ValueError: it takes none, or its results are others than the reference's.
    """
    import_ops()
    op_name, _, provider = name.partition(".")
    op, ran = OPS[op_name], 0
    for args in op.samples(device, torch.bfloat16):
        fn = providers(op, args, device).get(provider)
        if fn is None:
            continue
        actual, expected = fn(), op.reference(*args)
        difference, size = (actual.float() - expected.float()).norm().item(), expected.float().norm().item()
        if not difference <= OTHER * size:
            raise ValueError(
                f"canary: want {name} to give the reference's results, got others by {difference:.2g} of {size:.2g}"
            )
        ran += 1
    if not ran:
        raise ValueError(f"canary: want a provider that takes a sample on {device.type}, got {name}")


if __name__ == "__main__":
    check(sys.argv[1], torch.device(sys.argv[2]))
