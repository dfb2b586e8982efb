"""Predictions for people: a table of setups, a table of one setup's parts, and a figure."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from deepfuse.profiling.bench_plot import bar_chart
from deepfuse.profiling.bench_results import Results, Row
from deepfuse.profiling.cluster import Cluster
from deepfuse.profiling.simulate import Prediction


def setups_table(predictions: Sequence[Prediction], cluster: Cluster) -> Table:
    """A row for each setup."""
    table = Table(title="predicted step", title_justify="left")
    for column in ("expert", "GPUs", "step ms", "exposed ms", "tokens/s a node", "GB a GPU"):
        table.add_column(column, justify="right")
    table.add_column("overlap")
    for p in predictions:
        held = f"{sum(p.memory.values()) / 1e9:,.1f}{'' if p.fits else f' of {cluster.device.memory_bytes / 1e9:,.0f}'}"
        numbers = (f"{1e3 * s:,.3f}" for s in (p.step_seconds, p.exposed_seconds))
        table.add_row(str(p.setup.expert), str(p.setup.gpus), *numbers, f"{p.tokens_per_second:,.0f}", held, p.overlap)
    return table


def parts_table(prediction: Prediction) -> Table:
    """Where the time of one setup goes, and what each overlap makes of it."""
    table = Table(title=f"expert {prediction.setup.expert}", title_justify="left")
    table.add_column("what")
    table.add_column("of")
    table.add_column("amount", justify="right")
    for kind, amounts, unit in (
        ("part", _milliseconds(prediction.parts), "ms"),
        ("step with overlap", _milliseconds(prediction.plans), "ms"),
        ("memory", {name: size / 1e9 for name, size in prediction.memory.items()}, "GB"),
    ):
        for name, amount in amounts.items():
            table.add_row(kind, name, f"{amount:,.3f} {unit}")
        table.add_section()
    return table


def figure(predictions: Sequence[Prediction], cluster: Cluster) -> str:
    """Bars of steps by overlap, of parts, and of memory, by setup; as SVG."""
    rows = []
    for part, unit, amounts in (
        ("step", "ms", lambda p: _milliseconds(p.plans)),
        ("exposed communication", "ms", lambda p: {p.overlap: 1e3 * p.exposed_seconds}),
        ("parts", "ms", lambda p: _milliseconds(p.parts)),
        ("memory", "GB", lambda p: {name: size / 1e9 for name, size in p.memory.items()}),
    ):
        for p in predictions:
            figures = {name: (amount, amount, amount) for name, amount in amounts(p).items()}
            name = f"expert {p.setup.expert}"
            rows.append(Row(name=name, part=part, unit=unit, figures=figures, date="", command=""))
    device = {"device": cluster.device.name, "node": cluster.nvlink.name, "network": cluster.network.name}
    return bar_chart(
        Results(suite="deepfuse simulate", command="", device=device, versions={"": "predicted"}, rows=tuple(rows))
    )


def _milliseconds(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: 1e3 * s for name, s in seconds.items()}
