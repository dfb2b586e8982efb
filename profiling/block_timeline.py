"""One step as a picture: when which block of the model ran, a row for each kind of block. SVG text."""

import math
import re
from collections.abc import Sequence
from xml.sax.saxutils import escape

from deepfuse.profiling.timeline import Part, Step
from deepfuse.profiling.trace import ROWS, kernel_events

WIDTH, LEFT, RIGHT = 860, 190, 34
TOP, ROW, BOTTOM = 22, 24, 34
COLORS = 8
"""Of kinds, in the page's style."""
_LAYER = re.compile(r"^layers\.(\d+)\.?")


def block_timeline(step: Step, parts: list[list[Part]]) -> str:
    """The picture. What is left blank is Inductor's wrapper, and the guards around it."""
    blocks = [event for event in kernel_events(parts, step, step.began) if event["cat"] == ROWS[2]]
    kinds = list(dict.fromkeys(_kind(event["name"]) for event in blocks))
    total = max(step.ended - step.began, 1) / 1e3
    scale = (WIDTH - LEFT - RIGHT) / total
    bottom = TOP + ROW * len(kinds)
    height = bottom + BOTTOM
    out = [f'<svg class="plot" role="img" viewBox="0 0 {WIDTH} {height}"><title>blocks in time</title>']
    for tick in _ticks(total):
        x = LEFT + tick * scale
        out.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_number(tick)}</text>')
    out.append(f'<text class="axis" x="{LEFT - 8}" y="{bottom + 16}" text-anchor="end">microseconds</text>')
    for i, kind in enumerate(kinds):
        y = TOP + ROW * i + 16
        out.append(f'<text class="tick" x="{LEFT - 8}" y="{y}" text-anchor="end">{escape(_cut(kind))}</text>')
    for event in blocks:
        row = kinds.index(_kind(event["name"]))
        x, width = LEFT + event["ts"] * scale, max(event["dur"] * scale, 0.6)
        tip = f"{event['name']}: {event['dur']:,.1f} us from {event['ts']:,.1f} us on"
        out.append(
            f'<rect class="c{row % COLORS}" x="{x:.2f}" y="{TOP + ROW * row + 3}" width="{width:.2f}" height="{ROW - 6}">'
            f"<title>{escape(tip)}</title></rect>"
        )
    return "\n".join([*out, *_layers(blocks, scale), "</svg>"])


def _layers(blocks: Sequence[dict], scale: float) -> list[str]:
    """Where each layer begins, along the top; those that would stand too close are left out."""
    began: dict[str, float] = {}
    for event in blocks:
        found = _LAYER.match(event["name"])
        if found:
            began.setdefault(found[1], event["ts"])
    out, free = [], 0.0
    for layer, ts in began.items():
        x, text = LEFT + ts * scale, f"layer {layer}"
        if x >= free:
            out.append(f'<text class="tick" x="{x:.1f}" y="{TOP - 8}">{text}</text>')
            free = x + 6.4 * (len(text) + 1)
    return out


def _kind(name: str) -> str:
    """``self_attn`` of ``layers.3.self_attn``; of a kernel that spans blocks, all of them without their layers."""
    return " + ".join(dict.fromkeys(_LAYER.sub("", block) or "layer" for block in name.split(" + ")))


def _number(tick: float) -> str:
    return f"{tick:,.0f}" if tick == round(tick) else f"{tick:.3g}"


def _cut(text: str, most: int = 28) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _ticks(total: float) -> list[float]:
    """Round numbers from 0 on, four to nine of them."""
    rough = total / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough)
    return [i * step for i in range(int(total / step) + 1)]
