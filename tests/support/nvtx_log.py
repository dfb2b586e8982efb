"""What a tool that listens to NVTX is told by a Python program: ``nvtx_injection.c`` stands in for Nsight Systems."""

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from deepfuse.profiling.nvtx import Range

SOURCE = Path(__file__).with_name("nvtx_injection.c")


class Heard(NamedTuple):
    """A range: how many were open around it, and what it says of itself; ``color`` is ARGB in hexadecimal."""

    depth: int
    domain: str
    color: str
    category: str
    name: str


class Listener:
    """Takes ranges within this process."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.heard: list[str] = []
        """Names, from the outside in, ``/`` between them."""

    def prepared(self, range: Range) -> str:
        return range.name

    def push(self, name: str) -> None:
        self.open.append(name)
        self.heard.append("/".join(self.open))

    def pop(self) -> None:
        self.open.pop()


@functools.cache
def _library() -> Path:
    built = Path(tempfile.mkdtemp(prefix="deepfuse-nvtx-")) / "injection.so"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-Wall", "-Werror", "-o", built, SOURCE]
    subprocess.run(command, check=True)
    return built


def heard_from(code: str, folder: Path, environment: Mapping[str, str] | None = None) -> list[Heard]:
    """The ranges that a program opened, in order, each of which it closed.

    Args:
        code: of the program, which imports what this process can.
        folder: for what it says.
        environment: variables beside those of this process.
    """
    log = folder / "nvtx.log"
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "NVTX_INJECTION64_PATH": str(_library()),
        "DEEPFUSE_NVTX_LOG": str(log),
        **(environment or {}),
    }
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    ranges: list[Heard] = []
    depth = 0
    for line in log.read_text().splitlines() if log.exists() else []:
        what, domain, *rest = line.split("\t")
        if what == "pop":
            depth -= 1
            assert depth >= 0, "a range is closed that nobody opened"
        else:
            color, category, name = rest
            ranges.append(Heard(depth, domain, color, category, name))
            depth += 1
    assert depth == 0, "a range stays open"
    return ranges
