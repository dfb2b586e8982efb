"""What launch code chooses for a kernel, and what it might have chosen instead: the search space of ``gpu_tuning``.

A knob is a function of launch code, in whose place another stands that always answers the same; or a kernel, in whose place
another stands that is launched with other options. Values are of the function, or options by name.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock


@dataclass(frozen=True, slots=True)
class Knob:
    """``name`` of ``module``, which is a file of ``ops/``, and its values.

    Attributes:
        cases: how the names of the cases begin that it is for.
        fits: which of the values are for a number of rows.
    """

    module: str
    name: str
    values: tuple[Any, ...]
    cases: str = ""
    fits: Callable[[Any, int], bool] = lambda value, rows: True

    @contextmanager
    def set(self, value: Any) -> Iterator[None]:
        """Within, launch code has this value."""
        module = importlib.import_module(f"deepfuse.ops.{self.module}")
        given = getattr(module, self.name)
        other = _Launched(given, value) if isinstance(value, dict) else lambda *args: value
        with mock.patch.object(module, self.name, other):
            yield


class _Launched:
    """A kernel that is launched with other options."""

    def __init__(self, kernel: Any, options: dict[str, int]):
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        launch = self.kernel[grid]
        return lambda *args, **given: launch(*args, **{**given, **self.options})


def _every(*values: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(itertools.product(*values))


def _options(**values: tuple[int, ...]) -> tuple[dict[str, int], ...]:
    return tuple(dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values()))


ROW_TILES = _every((1, 2, 4, 8, 16, 32), (128,), (1, 2, 4, 8))

KNOBS: dict[str, tuple[Knob, ...]] = {
    # rows and columns of a tile, warps, stages. Few rows are columns, and a tile is as wide as they are many; one of more
    # than 128 would lie across the scales of a weight
    "fp8_matmul.triton": (
        Knob(
            "fp8_matmul_triton",
            "_tile",
            (*_every((64, 128), (16, 32, 64), (4, 8), (3, 4, 6, 8)), *_every((64, 128), (128,), (4, 8), (3, 4))),
            fits=lambda tile, rows: tile[1] == min(max(rows, 16), 64) if rows <= 64 else tile[1] >= 64,
        ),
        Knob("fp8_matmul_triton", "_splits", (1, 2, 4, 8, 16), fits=lambda splits, rows: rows <= 64),
    ),
    "fp8_grouped_matmul.triton": (
        Knob(
            "fp8_grouped_matmul",
            "_tile",
            _every((16, 32, 64, 128), (64, 128), (4, 8), (3, 4, 5)),
            fits=lambda tile, rows: tile[0] // 2 <= max(rows, 16) and tile[0] * 2 >= min(max(rows, 16), 128),
        ),
    ),
    "mla_decode.triton": (
        Knob("mla_decode_splits", "num_splits_for", (1, 2, 4, 8, 16, 32, 64)),
        Knob("mla_decode_splits", "_mla_decode_splits_kernel", _options(num_warps=(4, 8), num_stages=(1, 2, 3))),
        Knob("mla_decode_splits", "_mla_decode_reduce_kernel", _options(num_warps=(1, 2, 4, 8))),
    ),
    "mla_decode_fp8.triton": (
        Knob("mla_decode_splits", "num_splits_for", (1, 2, 4, 8, 16, 32, 64)),
        Knob("mla_decode_splits", "_mla_decode_splits_kernel", _options(num_warps=(4, 8), num_stages=(1, 2, 3))),
    ),
    "mla_decode_project.triton": (
        Knob("mla_decode_project", "_mla_decode_project_kernel", _options(num_warps=(4, 8), num_stages=(2, 3, 4))),
    ),
    "mla_attention.triton": (
        Knob("mla_attention", "_mla_attention_kernel", _options(num_warps=(4, 8), num_stages=(1, 2, 3))),
    ),
    # rows and columns of a tile, and warps
    "quantize.triton": (
        # blocks of 128x128 are a tile each
        Knob("quantize", "tile_of", ROW_TILES, cases="quantize 1x128", fits=lambda tile, rows: tile[0] < 2 * rows),
        Knob("quantize", "_quantize_kernel", _options(num_warps=(2, 4, 8, 16))),
    ),
    "swiglu_quantize.triton": (
        Knob("swiglu_quantize", "tile_of", ROW_TILES, fits=lambda tile, rows: tile[0] < 2 * rows),
    ),
    "rms_norm_quantize.triton": (
        Knob("rms_norm_quantize", "_rms_norm_quantize_kernel", _options(num_warps=(1, 2, 4, 8, 16))),
    ),
    "add_rms_norm_quantize.triton": (
        Knob("add_rms_norm_quantize", "_add_rms_norm_quantize_kernel", _options(num_warps=(1, 2, 4, 8, 16))),
    ),
    "fp8_grouped_matmul_wgrad.triton": (
        Knob(
            "fp8_grouped_matmul_wgrad",
            "_fp8_grouped_matmul_wgrad_kernel",
            _options(num_warps=(4, 8), STAGES=(2, 3, 4)),
        ),
    ),
    "fp8_matmul.gluon": (Knob("fp8_matmul_gluon", "turns_of", (1, 2), fits=lambda turns, rows: rows > 64),),
}
"""``op.provider`` -> its knobs, in the order in which they are turned: each with the best values of those before it."""
