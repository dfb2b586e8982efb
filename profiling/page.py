"""A run as one page for a browser: roofline, ops by time lost, blocks in time, and what each pass did to the graphs.

The page has all it needs in itself: no network, no other files. Its form is in ``page.html``.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from deepfuse.passes.compare import changed_lines
from deepfuse.passes.journal import GraphEntry
from deepfuse.profiling.block_timeline import block_timeline
from deepfuse.profiling.roofline import Bounded, roofline
from deepfuse.profiling.roofline_plot import roofline_plot
from deepfuse.profiling.run import Run

TEMPLATE = Path(__file__).with_name("page.html")
MOST_ROWS = 400
"""Of a table of ops, and lines of a graph that changed: a model of 61 layers repeats itself."""


def write_page(run: Run, journal: Sequence[GraphEntry], path: Path) -> None:
    """Write the page.

    Args:
        run: with steps.
        journal: graphs of the build, of those that ran.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    entries = {entry.name: entry for entry in journal}
    by_op, by_place = (_by_graph(run, by) for by in ("op", "place"))
    graphs = []
    for graph in run.graphs:
        steps = sorted(run.steps_of(graph), key=lambda step: step.ended - step.began)
        median = steps[(len(steps) - 1) // 2]
        dtypes = dict.fromkeys(s.dtype for k in run.parts[graph] for p in k for s in p.own if s.flops and s.dtype)
        around = [row for row in run.rows() if row.graph == graph and row.name.startswith("(")]
        graphs.append(
            {
                "name": graph,
                "steps": len(steps),
                "ms": (median.ended - median.began) / 1e6,
                "plot": Markup(roofline_plot(by_op[graph], run.limits, list(dtypes))),
                "tables": {"op": by_op[graph][:MOST_ROWS], "place": by_place[graph][:MOST_ROWS]},
                "around": around,
                "timeline": Markup(block_timeline(median, run.parts[graph])),
                "passes": list(_changes(entries[graph])) if graph in entries else [],
            }
        )
    text = environment.from_string(TEMPLATE.read_text()).render(run=run, graphs=graphs)
    path.write_text(text)


def _by_graph(run: Run, by: Any) -> dict[str, list[Bounded]]:
    rows = roofline(run, by) if run.limits else []
    return {graph: [row for row in rows if row.graph == graph] for graph in run.graphs}


def _changes(entry: GraphEntry) -> Iterator[dict[str, Any]]:
    """Of each pass that changed a graph, the lines."""
    for done in entry.passes:
        before, after = (entry.snapshots.get(f"{when}:{done.name}") for when in ("before", "after"))
        if before is None or after is None or before == after:
            continue
        lines = [row for group in changed_lines(before, after) for row in (*group, None)][:-1]
        yield {
            "name": done.name,
            "kind": done.kind,
            "rewrites": done.rewrites,
            "ops": ", ".join(f"{op} {count:+d}" for op, count in sorted(done.op_changes.items())),
            "lines": list(islice(lines, MOST_ROWS)),
            "more": max(len(lines) - MOST_ROWS, 0),
        }
