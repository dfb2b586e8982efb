"""A line chart with logarithmic axes as SVG text, equal for equal numbers: figures of the documentation."""

import math
from collections.abc import Mapping, Sequence

from deepfuse.profiling.svg import COLORS, drawing, line, text

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 34, 48
DASHES = ("", "6 3", "2 3", "8 3 2 3")
TICKS = 8
"""At most so many labels an axis."""

Points = Sequence[tuple[float, float]]


def line_chart(title: str, x_label: str, y_label: str, series: Mapping[str, Points], *, x_base: int = 2) -> str:
    """The chart.

    Args:
        title, x_label, y_label: its words.
        series: points ``(x, y)`` by name, x rising; both are positive, and points with y = 0 are left out.
        x_base: labels along x are powers of it; along y, of ten.

    Raises:
        ValueError: nothing to draw, or a negative number.
    """
    kept = {name: [(x, y) for x, y in points if y != 0] for name, points in series.items()}
    every = [point for points in kept.values() for point in points]
    if not every or min(min(point) for point in every) <= 0:
        raise ValueError(f"line_chart: want positive points, got {series}")
    x_ticks = _powers(min(x for x, _ in every), max(x for x, _ in every), x_base)
    y_ticks = _powers(min(y for _, y in every), max(y for _, y in every), 10)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + _share(x, x_ticks) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - _share(y, y_ticks) * (HEIGHT - TOP - BOTTOM),
        )

    out = [
        text(LEFT, 20, title, "start", 'font-weight="bold"'),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label),
        text(0, 0, y_label, "middle", f'transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"'),
    ]
    for tick in _labelled(x_ticks):
        x, bottom = place(tick, y_ticks[0])
        out += [line((x, TOP), (x, bottom)), text(x, bottom + 16, _number(tick, x_base))]
    for tick in _labelled(y_ticks):
        left, y = place(x_ticks[0], tick)
        out += [line((left, y), (WIDTH - RIGHT, y)), text(left - 6, y + 4, _number(tick, 10), "end")]
    for i, (name, points) in enumerate(kept.items()):
        style = f'stroke="{COLORS[i % len(COLORS)]}" stroke-width="2" stroke-dasharray="{DASHES[i % len(DASHES)]}"'
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        out.append(f'<polyline points="{path}" fill="none" {style}/>')
        x, y = WIDTH - RIGHT + 12, TOP + 10 + 20 * i
        out += [f'<path d="M{x} {y}h24" {style}/>', text(x + 30, y + 4, name, "start")]
    return drawing(WIDTH, HEIGHT, out)


def _powers(low: float, high: float, base: int) -> list[float]:
    """The powers of ``base`` from the last one below to the first one above."""
    first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
    return [float(base) ** i for i in range(first, max(last, first + 1) + 1)]


def _labelled(ticks: list[float]) -> list[float]:
    return ticks[:: -(-len(ticks) // TICKS)]


def _share(value: float, ticks: list[float]) -> float:
    return math.log(value / ticks[0]) / math.log(ticks[-1] / ticks[0])


def _number(tick: float, base: int) -> str:
    exponent = round(math.log(tick, base))
    return f"{tick:g}" if -3 <= exponent <= (16 if base == 2 else 3) and tick < 1e5 else f"{base}^{exponent}"
