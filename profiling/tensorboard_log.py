"""A run in TensorBoard's own tabs, for which no plugin is needed: scalars and text.

    <graph>/ms                       of each step, and where it has collectives, exposed communication in %
    <graph>, us/<block>              of each step, and <graph>, bytes/<block> as predicted: what its ops read and write
    <graph>, matches/<pass>          rewrites of each pass
    build/...                        recompiles, graph_breaks, graphs_from_cache

The text has the rows by op, time against the device's limits, and the matches.
"""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepfuse.profiling.exposure import exposed_ns
from deepfuse.profiling.roofline import roofline
from deepfuse.profiling.run import Run
from deepfuse.profiling.size_expression import evaluated
from deepfuse.profiling.timeline import Step, block_of

MOST = 30
"""Rows of a table of text."""
EXTRA = 'pip install "deepfuse[profiling]"'


def check_installed(*packages: str) -> None:
    """Whether TensorBoard is here, and perhaps its plugin.

    Raises:
        RuntimeError: it is not; with the extra that brings it.
    """
    missing = [name for name in packages if not installed(name)]
    if missing:
        raise RuntimeError(f"profile: want the packages {' and '.join(packages)}, got no {missing[0]}: {EXTRA}")


def installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def write_log(run: Run, folder: Path) -> None:
    """Write TensorBoard's event file into ``folder``. The package tensorboard must be here."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for tag, value, step in scalars(run):
            writer.add_scalar(tag, value, step)
        for tag, text in texts(run).items():
            writer.add_text(tag, text)


def scalars(run: Run) -> Iterable[tuple[str, float, int]]:
    """Tag, value, and number of the step in its graph."""
    for graph in run.graphs:
        communicates = any(part.communicates for kernel in run.parts[graph] for part in kernel)
        for number, step in enumerate(run.steps_of(graph)):
            took = step.ended - step.began
            yield f"{graph}/ms", took / 1e6, number
            if communicates:
                yield f"{graph}/exposed communication, %", 100 * exposed_ns(run, step) / max(took, 1), number
            for block, size in _bytes_of_blocks(run, step).items():
                yield f"{graph}, bytes/{block}", size, number
            for block, ns in run.times_of(step, "block").items():
                yield f"{graph}, us/{block}", ns / 1e3, number
    for graph, matches in run.build.get("matches", {}).items():
        for name, rewrites in matches.items():
            yield f"{graph}, matches/{name}", rewrites, 0
    for name, value in run.build.items():
        if isinstance(value, int):
            yield f"build/{name}", value, 0


def texts(run: Run) -> dict[str, str]:
    """Tag -> Markdown."""
    rows = [(row.graph, row.name, f"{row.us:,.1f}", f"{row.share:.1%}") for row in run.rows()]
    texts = {"time by op": _markdown(("graph", "op", "us a step", "share"), rows)}
    if run.limits:
        lost = [
            (row.graph, row.name, f"{row.us:,.1f}", f"{row.bound_us:,.1f}", f"{row.lost_us:,.1f}", row.limit)
            for row in roofline(run, "place")
            if row.lost_us is not None
        ]
        head = ("graph", "place", "us a step", "bound us", "lost us", "limit")
        texts["time lost against the device's limits"] = _markdown(head, lost)
    matches = run.build.get("matches", {})
    names = dict.fromkeys(name for of_graph in matches.values() for name in of_graph)
    table = [(name, *(str(of_graph.get(name, 0)) for of_graph in matches.values())) for name in names]
    if table:
        texts["rewrites by pass"] = _markdown(("pass", *matches), table)
    return texts


def _bytes_of_blocks(run: Run, step: Step) -> dict[str, float]:
    """What the ops of each block read and write in a step, of those that have a cost."""
    sites = {site.number: site for kernel in run.parts[step.graph] for part in kernel for site in part.own}
    sizes: dict[str, float] = {}
    for site in sites.values():
        size = evaluated(site.bytes, step.sizes)
        if size is not None:
            block = block_of(site.module)
            sizes[block] = sizes.get(block, 0.0) + size
    return sizes


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines: list[Sequence[Any]] = [head, ["---"] * len(head), *rows[:MOST]]
    if len(rows) > MOST:
        lines.append((f"({len(rows) - MOST} more)", *[""] * (len(head) - 1)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
