"""What is said of fine-grained FP8, computed: errors with an outlier, E4M3 beside E5M2, and long sums.

    python benchmarks/fp8_claims.py

writes `benchmarks/results/fp8_claims.json`, and from it the tables of `docs/fp8.md` and the figures of `docs/figures/`.
All is computed on the CPU, with the ops themselves and with the emulated sums of `ir/tensor_core.py`. An error is the
norm of what is off over the norm of what is right.

Source of the claims: sections 3.3.2 and appendix B of DeepSeek-V3 (arXiv:2412.19437), and what is written about them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from line_chart import line_chart
from sections import computed_or_kept, table, write_sections
from torch import Tensor

from deepfuse.ir.tensor_core import accumulate_fp8
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.quantize import quantize

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fp8_claims.json"
TEXT = ROOT / "docs" / "fp8.md"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GROUP = 128
CLAIMED = 195
"""Times "more effective precision" that a scale for each 1x128 is said to give groups without the outlier."""

OUTLIERS = (*(2**i for i in range(0, 21, 2)), CLAIMED)
SPREADS = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LONGEST_SUM = 4096
"""K of the example in DeepSeek-V3's section 3.3.2."""


def relative_error(got: Tensor, right: Tensor) -> float:
    return float((got.double() - right.double()).norm() / right.double().norm())


def fp8(dtype: torch.dtype) -> Callable[[Tensor, int, int], Tensor]:
    """Quantize in blocks (0x0: one scale) and dequantize."""

    def round_trip(x: Tensor, rows: int, cols: int) -> Tensor:
        return dequantize(*quantize(x, dtype, rows, cols, False), rows, cols, torch.float32)

    return round_trip


def int8(x: Tensor, rows: int, cols: int) -> Tensor:
    """The same with 255 steps of equal width, for comparison; rows of groups, or one scale."""
    groups = x.flatten()[None] if rows == 0 else x.unflatten(-1, (-1, cols))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale).round() * scale).reshape(x.shape)


FORMATS: dict[str, Callable[[Tensor, int, int], Tensor]] = {"E4M3": fp8(E4M3), "E5M2": fp8(E5M2), "INT8": int8}


def groups_with_an_outlier(outlier: float, rows: int = 32, groups: int = 8, seed: int = 0) -> Tensor:
    """``[rows, groups * 128]``, normal, the largest of each group 1; the first element of all is ``outlier``."""
    x = torch.randn(rows, groups, GROUP, generator=torch.Generator().manual_seed(seed))
    x = (x / x.abs().amax(-1, keepdim=True)).flatten(1)
    x[0, 0] = outlier
    return x


def outlier_errors(outlier: float, **size: int) -> dict[str, dict[str, float]]:
    """By format: errors of the groups without the outlier, under one scale for all and under one for each 1x128."""
    x = groups_with_an_outlier(outlier, **size)
    calm = x[:, GROUP:]
    found = {}
    for name, round_trip in FORMATS.items():
        one, each = (relative_error(round_trip(x, *block)[:, GROUP:], calm) for block in ((0, 0), (1, GROUP)))
        found[name] = {"one scale": one, "1x128": each, "times": one / each}
    return found


def scale_ratio(outlier: float) -> float:
    """One scale for all over that of a group without the outlier: the ratio of their largest elements."""
    x = groups_with_an_outlier(outlier)
    one, each = (quantize(x, E4M3, *block, False)[1] for block in ((0, 0), (1, GROUP)))
    return float(one[0, 0] / each[0, 1])


def format_errors(spread: float, rows: int = 32, groups: int = 8, seed: int = 0) -> dict[str, dict[str, float]]:
    """By format, under 1x128, of elements with magnitudes ``2**(spread * normal)``.

    ``error`` is mostly that of the largest elements, ``of one`` the mean over elements of each one's own, and ``lost``
    the share of elements that become 0.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, groups * GROUP)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    x = sign * torch.exp2(spread * torch.randn(shape, generator=generator))
    found = {}
    for name in ("E4M3", "E5M2"):
        y = FORMATS[name](x, 1, GROUP)
        found[name] = {
            "error": relative_error(y, x),
            "of one": float(((y - x) / x).abs().mean()),
            "lost": float((y == 0).float().mean()),
        }
    return found


MEASURES = {"error": "error", "of one": "error of one", "lost": "share lost"}
"""Of ``format_errors``, in the words of tables and figures."""

SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "14 bits": lambda a, b: accumulate_fp8(a, b, None),
    "14 bits, promoted every 128": lambda a, b: accumulate_fp8(a, b, 128),
    "float32": lambda a, b: a.float() @ b.float().t(),
}
OPERANDS: dict[str, Callable[..., Tensor]] = {"normal": torch.randn, "positive": torch.rand}


def sum_errors(K: int, operands: str, size: int = 32, seed: int = 0) -> dict[str, float]:
    """By way of summing: error of ``size`` x ``size`` sums of K products of E4M3 values."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (OPERANDS[operands](size, K, generator=generator).to(E4M3) for _ in range(2))
    exact = a.double() @ b.double().t()
    return {name: relative_error(total(a, b), exact) for name, total in SUMS.items()}


def compute() -> dict[str, Any]:
    return {
        "torch": torch.__version__.partition("+")[0],
        "outlier": {str(outlier): outlier_errors(outlier) for outlier in sorted(OUTLIERS)},
        "scale ratio": {str(CLAIMED): scale_ratio(CLAIMED)},
        "formats": {str(spread): format_errors(spread) for spread in SPREADS},
        "sums": {operands: {str(K): sum_errors(K, operands) for K in LENGTHS} for operands in OPERANDS},
    }


def figures(results: dict[str, Any]) -> dict[str, str]:
    """SVG by file name."""

    def points(rows: dict[str, Any], *path: str) -> list[tuple[float, float]]:
        out = []
        for x, row in rows.items():
            value = row
            for key in path:
                value = value[key]
            out.append((float(x), float(value)))
        return out

    outlier = {}
    for name in FORMATS:
        outlier[f"{name}, one scale"] = points(results["outlier"], name, "one scale")
        outlier[f"{name}, 1x128"] = points(results["outlier"], name, "1x128")
    formats = {}
    for name in ("E4M3", "E5M2"):
        for what, words in MEASURES.items():
            formats[f"{name}, {words}"] = points(results["formats"], name, what)
    sums = {}
    for operands, rows in results["sums"].items():
        for name in SUMS:
            sums[f"{name}, {operands}".replace("promoted every 128", "promoted")] = points(rows, name)
    return {
        "fp8_outlier.svg": line_chart(
            "Error of the groups without the outlier", "outlier over their largest", "error", outlier
        ),
        "fp8_formats.svg": line_chart(
            "E4M3 and E5M2, a scale for each 1x128", "spread of magnitudes, octaves", "error, share", formats
        ),
        "fp8_sums.svg": line_chart("Sums of K products of E4M3", "K", "error", sums),
    }


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Markdown by the section of `docs/fp8.md`."""

    def percent(value: float) -> str:
        return f"{value:.1%}" if value >= 0.001 or value == 0 else f"{value:.0e}"

    def outlier_rows(names: Sequence[str]) -> list[list[str]]:
        rows = []
        for outlier, by_format in results["outlier"].items():
            cells = []
            for name in names:
                found = by_format[name]
                cells += [percent(found["one scale"]), percent(found["1x128"]), f"{found['times']:.1f}"]
            rows.append([outlier, *cells])
        return rows

    head = [f"{name}, {what}" for name in FORMATS for what in ("one scale", "1x128", "times")]
    columns = [(name, what) for what in MEASURES for name in ("E4M3", "E5M2")]
    formats = [
        [spread, *(percent(found[name][what]) for name, what in columns)]
        for spread, found in results["formats"].items()
    ]
    sums = [
        [K, *(percent(results["sums"][operands][K][name]) for operands in OPERANDS for name in SUMS)]
        for K in map(str, LENGTHS)
    ]
    return {
        "fp8_claims: outlier": table(["outlier", *head], outlier_rows(list(FORMATS))),
        "fp8_claims: formats": table(["spread", *(f"{name}, {MEASURES[what]}" for name, what in columns)], formats),
        "fp8_claims: sums": table(["K", *(f"{operands}: {name}" for operands in OPERANDS for name in SUMS)], sums),
    }


def main() -> None:
    results = computed_or_kept(__doc__, RESULTS, compute)
    for name, svg in figures(results).items():
        (ROOT / "docs" / "figures" / name).write_text(svg)
    write_sections(TEXT, tables(results))


if __name__ == "__main__":
    main()
