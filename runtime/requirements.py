"""What this machine must have, checked before work begins: a device, memory, and a compiler where one is needed."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch

GIB = 1 << 30


def check_device(device: str | torch.device) -> torch.device:
    """The device asked for; ``auto`` is CUDA where there is one.

    Raises:
        ValueError: it is unknown, or not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ValueError(f"build: want device 'auto', 'cpu' or 'cuda[:i]', got {device!r}") from None
    count = torch.cuda.device_count()
    if wanted.type not in ("cpu", "cuda"):
        raise ValueError(f"build: want device 'auto', 'cpu' or 'cuda[:i]', got {device!r}")
    if wanted.type == "cuda" and (count == 0 or (wanted.index or 0) >= count):
        raise ValueError(f"build: want a device that is there ({count} CUDA devices are), got {device!r}")
    return wanted


def check_memory(device: torch.device, weight_bytes: int, cache_bytes: int) -> None:
    """Whether weights and cache fit, before any of it is allocated.

    Raises:
        MemoryError: with what is needed and what is free.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    needed = weight_bytes + cache_bytes
    if free is not None and needed > free:
        raise MemoryError(
            f"build: want {needed / GIB:.2f} GiB on {device} ({weight_bytes / GIB:.2f} for weights, "
            f"{cache_bytes / GIB:.2f} for the latent cache), got {free / GIB:.2f} GiB free; build with a smaller "
            "max_batch_size or max_seq_len, a narrower dtype, or a smaller model"
        )


def available_memory() -> int | None:
    """Bytes that can be had without swapping, within the container's limit; ``None`` where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    machine = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    container = _left_in_container(Path("/sys/fs/cgroup"))
    return min((free for free in (machine, container) if free is not None), default=None)


def _left_in_container(cgroup: Path) -> int | None:
    """What version 2 of Linux's control groups leaves; ``None`` without a limit. File pages count as free."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return None if limit == "max" else max(int(limit) - used + int(stat["inactive_file"]), 0)


def missing_for_compilation() -> str | None:
    """What keeps Inductor from compiling here, with the package that brings it; ``None`` if nothing does."""
    # what Inductor takes, which looks for no other
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.partition(" ")[0]) is None:
        named = "" if compiler == "g++" else f" ({compiler!r}, which CXX names, is not there)"
        return f"no C++ compiler{named}: install g++ (Debian and Ubuntu: apt-get install g++)"
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        return f"no Python headers in {include}: install python3-dev (Debian and Ubuntu: apt-get install python3-dev)"
    return None
