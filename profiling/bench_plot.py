"""What a benchmark found as a figure: a panel for each part, a bar for each alternative of a row, the quartiles on it."""

import math
from itertools import groupby

from deepfuse.profiling.bench_results import Results, Row, words
from deepfuse.profiling.svg import COLORS, drawing, line, text

WIDTH, LEFT, RIGHT = 900, 330, 110
BAR, GAP = 14, 8
"""Heights: of a bar, and between rows."""
HEAD, FOOT = 34, 22
"""Above the bars of a panel its name, below them its axis."""
TOP = 66
TICKS = 5


def bar_chart(results: Results) -> str:
    """The figure, as SVG.

    Raises:
        ValueError: there are no rows, or none whose figures are 0 or more.
    """
    panels = [(part, unit, list(rows)) for (part, unit), rows in groupby(results.rows, key=lambda r: (r.part, r.unit))]
    labels = list(dict.fromkeys(label for row in results.rows for label in row.figures))
    lowest = min((low for row in results.rows for _, low, _ in row.figures.values()), default=-1.0)
    if lowest < 0:
        raise ValueError(f"bench plot: want rows of figures >= 0, got {len(results.rows)} rows")
    colors = {label: COLORS[i % len(COLORS)] for i, label in enumerate(labels)}
    out = [
        text(12, 20, results.suite, "start", 'font-weight="bold"'),
        text(12, 38, f"{words(results.device)}; torch {results.versions.get('torch', '')}", "start"),
    ]
    x = 12.0
    for label, color in colors.items():
        out += [f'<rect x="{x:.1f}" y="46" width="12" height="12" fill="{color}"/>', text(x + 17, 56, label, "start")]
        x += 40 + 7 * len(label)
    y = float(TOP)
    for part, unit, rows in panels:
        elements, y = _panel(f"{part}, {unit}" if part else unit, rows, colors, y)
        out += elements
    return drawing(WIDTH, round(y), out)


def _panel(name: str, rows: list[Row], colors: dict[str, str], top: float) -> tuple[list[str], float]:
    """Elements of a panel, and where it ends."""
    longest = max(high for row in rows for _, _, high in row.figures.values()) or 1.0
    step = _step(longest)
    scale = (WIDTH - LEFT - RIGHT) / longest
    bottom = top + HEAD + sum(BAR * len(row.figures) + GAP for row in rows)
    out = [text(12, top + 20, name, "start", 'font-weight="bold"')]
    for i in range(int(longest / step + 1e-9) + 1):
        x = LEFT + i * step * scale
        out += [line((x, top + HEAD - 6), (x, bottom)), text(x, bottom + 14, f"{i * step:g}")]
    y = top + HEAD
    for row in rows:
        height = BAR * len(row.figures)
        out.append(text(LEFT - 8, y + height / 2 + 4, row.name, "end"))
        for label, (median, low, high) in row.figures.items():
            middle, end = y + BAR / 2, LEFT + median * scale
            out.append(
                f'<rect x="{LEFT}" y="{y:.1f}" width="{end - LEFT:.1f}" height="{BAR - 2}" fill="{colors[label]}"/>'
            )
            if high > low:
                out.append(line((LEFT + low * scale, middle - 1), (LEFT + high * scale, middle - 1), "#000000"))
            out.append(text(max(end, LEFT + high * scale) + 5, middle + 3, f"{median:.4g}", "start"))
            y += BAR
        y += GAP
    return out, bottom + FOOT


def _step(longest: float) -> float:
    """1, 2 or 5 times a power of ten, so that the axis has at most ``TICKS`` steps."""
    power = 10.0 ** math.floor(math.log10(longest / TICKS))
    return next(factor * power for factor in (1, 2, 5, 10) if longest <= TICKS * factor * power)
