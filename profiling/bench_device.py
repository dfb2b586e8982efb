"""What a benchmark ran on, and with which versions: the facts that make two runs comparable."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("triton", "numpy", "transformers", "llama-cpp-python")
"""Beside torch and ourselves: what figures depend on, where it is installed."""


def facts(device: torch.device) -> dict[str, Any]:
    """A device in words: two runs are compared only where these are equal."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "kind": "cuda",
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "gigabytes": round(properties.total_memory / 1e9),
        }
    return {
        "kind": "cpu",
        "name": cpu_name(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def versions() -> dict[str, str]:
    """By name; CUDA's where torch was built with it."""
    import deepfuse

    found = {"deepfuse": deepfuse.__version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def cpu_name() -> str:
    """As the system has it; the kind of processor where it has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
