"""The cases of the GPU suites in small sizes, and a run of a suite without clocks: where kernels run in the tests."""

from collections.abc import Callable, Mapping
from io import StringIO
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmark_scripts import load_script
from deepfuse.ir.interpreter import interpreted
from deepfuse.profiling.bench import Bench
from deepfuse.profiling.bench_device import facts
from deepfuse.profiling.bench_results import Results
from deepfuse.profiling.timing import Timing

DEVICE = torch.device("cpu" if interpreted() else "cuda")
"""A CPU where kernels run in Triton's interpreter."""
ON_DEVICE = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
"""Marks of the modules whose tests run kernels."""
_WIDTHS = load_script("attention").Widths(H=3, C=160, R=8, N=16, V=128)
SMALL: dict[str, dict[str, Any]] = {
    "dense": {"rows": (1, 70), "weights": [(32, 256)]},
    "grouped": {"groups": [(2, 130), (2, 3)], "experts": [(24, 128)]},
    "fusions": {"tokens": (2,), "D": 256, "F": 128},
    "decode": {"steps": [(2, 128)], "widths": _WIDTHS},
    "prompts": {"batches": [(2, 9)], "widths": _WIDTHS},
}


def new_bench(device: torch.device = DEVICE, **options: Any) -> Bench:
    """A run of no suite, which prints nothing."""
    results = Results(suite="toy", command="", device=facts(device), versions={})
    return Bench(results, console=Console(file=StringIO(), width=200), **options)


def without_clock(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """In these modules each alternative takes a microsecond, and is not called to be timed."""

    def instant(alternatives: Mapping[str, Callable[[], object]], **options: Any) -> dict[str, Timing]:
        return dict.fromkeys(alternatives, Timing(1e-6, 1e-6, 1e-6))

    for module in modules:
        monkeypatch.setattr(module, "device_timing", instant)
        if hasattr(module, "_rounds"):
            monkeypatch.setattr(module, "_rounds", lambda *args: 5)
