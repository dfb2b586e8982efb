"""Pieces of figures as SVG text, equal for equal numbers: no library draws them, and a diff shows what moved."""

from collections.abc import Iterable
from xml.sax.saxutils import escape

COLORS = ("#1f5fa8", "#c2521b", "#2f7d3b", "#7a3e9d", "#5f5f5f", "#a8841f")
FONT = 'font-family="sans-serif" font-size="12"'
GRID = "#dddddd"

Point = tuple[float, float]


def drawing(width: int, height: int, elements: Iterable[str]) -> str:
    """Elements on white."""
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {FONT}>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    return "\n".join([*head, *elements, "</svg>"]) + "\n"


def line(start: Point, end: Point, color: str = GRID) -> str:
    (x, y), (u, v) = start, end
    return f'<path d="M{x:.1f} {y:.1f}L{u:.1f} {v:.1f}" stroke="{color}"/>'


def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    """Words at a place: their middle, or with ``anchor`` start or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(words)}</text>'.replace(" >", ">")
