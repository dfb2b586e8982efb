"""Several processes with torchrun's variables, started once for many cases."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_ranks(
    worker: str,
    world_size: int,
    folder: Path,
    *arguments: str,
    timeout_s: float = 300,
    want: Sequence[int] | None = None,
) -> list[str]:
    """Run ``worker``, a Python file, in ``world_size`` processes, as ``python worker folder *arguments``.

    Args:
        folder: for what they write; their output goes to ``log0``, ``log1``, ... in it.
        want: exit codes; all 0 where ``None``.

    Returns:
        What each printed.

    Raises:
        AssertionError: they ended otherwise, or not in ``timeout_s``; with the ends of what they printed.
    """
    processes = start_ranks(worker, world_size, folder, *arguments)
    codes: list[int | None] = []
    try:
        codes += [process.wait(timeout=timeout_s) for process in processes]
    except subprocess.TimeoutExpired:
        codes += [None] * (world_size - len(codes))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = [(folder / f"log{rank}").read_text() for rank in range(world_size)]
    assert codes == list(want or [0] * world_size), "\n".join([f"exit codes {codes}", *(log[-3000:] for log in logs)])
    return logs


def start_ranks(worker: str, world_size: int, folder: Path, *arguments: str) -> list[subprocess.Popen[bytes]]:
    """The processes, running; who starts them ends them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DEEPFUSE_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    processes = []
    for rank in range(world_size):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, worker, str(folder), *arguments]
        with (folder / f"log{rank}").open("w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return processes
