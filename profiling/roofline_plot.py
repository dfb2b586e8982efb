"""The roofline as a picture: ops by arithmetic intensity and by what they reached, under the device's limits. SVG text."""

import math
from collections.abc import Callable, Mapping, Sequence
from xml.sax.saxutils import escape

from deepfuse.profiling.roofline import Bounded

WIDTH, HEIGHT = 860, 430
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 46
CHARACTER = 7.4
"""Pixels of a letter at most, about: fonts differ."""

Box = tuple[float, float, float, float]
Place = Callable[[float, float], tuple[float, float]]
"""From numbers to pixels."""


def roofline_plot(rows: Sequence[Bounded], limits: Mapping[str, float], dtypes: Sequence[str]) -> str:
    """The picture; empty where no row has both FLOPs and bytes.

    Args:
        rows: of one graph.
        limits: of the device, as a run keeps them.
        dtypes: whose peaks are drawn.
    """
    points = [
        (row, row.flops / row.bytes, row.flops / row.us * 1e6) for row in rows if row.flops and row.bytes and row.us
    ]
    if not points:
        return ""
    peaks = {dtype: limits[dtype] for dtype in dtypes if dtype in limits}
    ridges = [peak / limits["bytes"] for peak in peaks.values()]
    x_low, x_high = _decades([x for _, x, _ in points] + ridges)
    y_low, y_high = _decades([y for *_, y in points] + list(peaks.values()) + [x_low * limits["bytes"]])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_low_log) / (math.log10(x_high) - x_low_log)
        up = (math.log10(y) - y_low_log) / (math.log10(y_high) - y_low_log)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    x_low_log, y_low_log = math.log10(x_low), math.log10(y_low)
    out = [f'<svg class="plot" role="img" viewBox="0 0 {WIDTH} {HEIGHT}"><title>roofline</title>']
    out += _axes(at, (x_low, x_high), (y_low, y_high))
    taken: list[Box] = []
    for dtype, peak in peaks.items():
        ridge = min(max(peak / limits["bytes"], x_low), x_high)
        start = max(x_low, y_low / limits["bytes"])
        corners = [at(start, start * limits["bytes"]), at(ridge, ridge * limits["bytes"]), at(x_high, peak)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        out.append(f'<polyline class="roof" points="{path}"/>')
        label = f"{dtype}: {_si(peak)}FLOP/s"
        x, y = corners[2][0] - CHARACTER * len(label), corners[2][1] - 6
        taken.append((x, y - 12, x + CHARACTER * len(label), y + 4))
        out.append(f'<text class="limit" x="{x:.1f}" y="{y:.1f}">{escape(label)}</text>')
    out.append(_slope_label(at, limits["bytes"], x_low, ridges))
    largest = max(row.us for row, *_ in points)
    places = [(row, *at(x, y), 4 + 8 * math.sqrt(row.us / largest)) for row, x, y in points]
    taken += [(x - r, y - r, x + r, y + r) for _, x, y, r in places]
    # the longest first, as they have the first choice of a place for their name
    for row, x, y, r in sorted(places, key=lambda place: -place[0].us):
        tip = f"{row.name}: {row.us:,.1f} us, {_si(row.flops or 0)}FLOP, {_si(row.bytes or 0)}B, bound by {row.limit}"
        kind = "memory" if row.limit == "memory" else "arithmetic"
        out.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"><title>{escape(tip)}</title></circle>'
        )
        out += _label(row.name, x, y, r, taken)
    return "\n".join([*out, "</svg>"])


def _axes(at: Place, xs: tuple[float, float], ys: tuple[float, float]) -> list[str]:
    out = []
    for exponent in range(round(math.log10(xs[0])), round(math.log10(xs[1])) + 1):
        x, y = at(10.0**exponent, ys[0])
        out.append(f'<path class="grid" d="M{x:.1f} {TOP}V{y:.1f}"/>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{_si(10.0**exponent)}</text>')
    for exponent in range(round(math.log10(ys[0])), round(math.log10(ys[1])) + 1):
        x, y = at(xs[0], 10.0**exponent)
        out.append(f'<path class="grid" d="M{x:.1f} {y:.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text class="tick" x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{_si(10.0**exponent)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">FLOP a byte</text>')
    turned = f'transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"'
    out.append(f'<text class="axis" text-anchor="middle" {turned}>FLOP/s</text>')
    return out


def _slope_label(at: Place, bandwidth: float, x_low: float, ridges: Sequence[float]) -> str:
    """Along the line of the memory, in its middle."""
    x = math.sqrt(x_low * max(ridges, default=x_low * 100))
    (x1, y1), (x2, y2) = at(x, x * bandwidth), at(10 * x, 10 * x * bandwidth)
    angle = math.degrees(math.atan2(y2 - y1, x2 - x1))
    where = f'transform="translate({x1:.1f} {y1 - 8:.1f}) rotate({angle:.1f})"'
    return f'<text class="limit" text-anchor="middle" {where}>memory: {_si(bandwidth)}B/s</text>'


def _label(name: str, x: float, y: float, r: float, taken: list[Box]) -> list[str]:
    """The name beside its point, on the first side where nothing is; nowhere if all are taken, as the point has a tip."""
    width = CHARACTER * len(name)
    for left, base in (
        (x + r + 4, y + 4),
        (x - r - 4 - width, y + 4),
        (x - width / 2, y - r - 5),
        (x - width / 2, y + r + 14),
    ):
        box = (left, base - 11, left + width, base + 3)
        inside = box[0] > LEFT and box[2] < WIDTH - RIGHT and box[1] > TOP and box[3] < HEIGHT - BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return [f'<text class="name" x="{left:.1f}" y="{base:.1f}">{escape(name)}</text>']
    return []


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Powers of ten around them, with room to the sides."""
    low, high = math.log10(min(values)) - 0.1, math.log10(max(values)) + 0.1
    return 10.0 ** math.floor(low), 10.0 ** math.ceil(high)


def _si(number: float) -> str:
    for exponent, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k"), (0, ""), (-3, "m")):
        if abs(number) >= 10.0**exponent * (1 - 1e-9):
            return f"{number / 10.0**exponent:.3g} {letter}".rstrip() + (" " if not letter else "")
    return f"{number:.0e} "
