"""What a build did: graphs, passes and matches, providers, cost, and what did not go as asked."""

import re
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from deepfuse.passes.journal import Journal
from deepfuse.runtime.placed import Placed

_SITE = re.compile(r"\w+ at .+?: ")
"""What a rule says of a site: ``rms_norm at model.norm (norm.py:12): matched``."""


@dataclass(slots=True, kw_only=True)
class Report:
    """The report of one build; ``str`` of it is for people, :meth:`to_json` for programs."""

    model: str
    device: str
    dtype: str
    parameters: int
    active_parameters: int
    """Parameters that take part in one token's step."""
    weight_bytes: int
    mesh: str = ""
    """Axes and sizes, and which process of them this is; the report is its own."""
    part: str = ""
    """What it has of the model; ``weight_bytes`` counts that alone, ``parameters`` the whole."""
    placement: Placed | None = None
    """Of experts in slots, where they do not lie in order."""
    dropped: int = 0
    """Choices of experts that went beyond their capacity, out of ``choices`` of this process's tokens since the build."""
    choices: int = 0
    quantized: str = ""
    """Kind and number of the FP8 modules."""
    cache_dtype: str
    """``fp8``, or the dtype's name."""
    cache_bytes_per_token: int
    mha_bytes_per_token: int
    """What multi-head attention of the same shape would cache."""
    compiled: bool
    """By Inductor; otherwise the graphs run as the passes left them."""
    warm: bool = False
    """All graphs came from the compile cache."""
    graphs_from_cache: int = 0
    build_seconds: float = 0.0
    compile_seconds: float = 0.0
    journal: Journal = field(default_factory=Journal)
    graphs_at_build: int = 0
    warnings: list[str] = field(default_factory=list)
    prefill_tokens_per_second: float = 0.0
    """Of the last generation."""
    decode_tokens_per_second: float = 0.0

    @property
    def graph_breaks(self) -> int:
        """Always 0: capture is ``fullgraph``, and a break raises."""
        return 0

    @property
    def recompiles(self) -> int:
        """Graphs compiled after the build was done."""
        return len(self.journal.graphs) - self.graphs_at_build

    def matches(self) -> dict[str, int]:
        """Pass -> rewrites over all graphs."""
        counts: dict[str, int] = {}
        for graph in self.journal.graphs:
            for entry in graph.passes:
                counts[entry.name] = counts.get(entry.name, 0) + entry.rewrites
        return counts

    def collectives(self) -> dict[str, dict[str, int]]:
        """Graph -> collective -> how many of it a call starts."""
        counts: dict[str, dict[str, int]] = {}
        for graph in self.journal.graphs:
            started = [site.op for site in graph.sites if site.group]
            if started:
                counts[graph.name] = {op: started.count(op) for op in dict.fromkeys(started)}
        return counts

    def to_json(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "journal"}
        return {
            **data,
            "placement": None if self.placement is None else self.placement.to_json(),
            "graph_breaks": self.graph_breaks,
            "recompiles": self.recompiles,
            "collectives": self.collectives(),
            "graphs": [
                {"name": g.name, "passes": [{n: getattr(p, n) for n in p.__dataclass_fields__} for p in g.passes]}
                for g in self.journal.graphs
            ],
        }

    def __rich__(self) -> Group:
        return Group(self._summary(), self._passes(), *(Text(f"warning: {w}", style="yellow") for w in self.warnings))

    def __str__(self) -> str:
        console = Console(width=120, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def _summary(self) -> Table:
        table = Table(title=f"{self.model} on {self.device}, {self.dtype}", show_header=False, title_justify="left")
        saved = self.mha_bytes_per_token / max(self.cache_bytes_per_token, 1)
        rows = [
            (
                "parameters",
                f"{self.parameters:,} ({self.active_parameters:,} active), {self.weight_bytes / 1e6:,.1f} MB",
            ),
            *self._of_mesh(),
            *([("quantized", self.quantized)] if self.quantized else []),
            (
                "latent cache",
                f"{self.cache_bytes_per_token:,} bytes per token, {saved:.1f}x less than multi-head, {self.cache_dtype}",
            ),
            ("graphs", f"{self.graphs_at_build}, {self.graph_breaks} breaks, {self.recompiles} recompiles"),
            ("build", f"{self.build_seconds:.1f} s, of it compiling {self.compile_seconds:.1f} s{self._how()}"),
        ]
        if self.decode_tokens_per_second:
            prefill, decode = self.prefill_tokens_per_second, self.decode_tokens_per_second
            rows.append(("speed", f"prefill {prefill:,.0f} tokens/s, decode {decode:,.0f} tokens/s"))
        for name, value in rows:
            table.add_row(name, value)
        return table

    def _of_mesh(self) -> list[tuple[str, str]]:
        rows = [("mesh", self.mesh), ("of the model", self.part)]
        if self.placement is not None:
            rows.append(("placement", str(self.placement)))
        if self.choices:
            rows.append(("dropped", f"{self.dropped:,} of {self.choices:,} choices of experts"))
        for graph, counts in self.collectives().items():
            rows.append((f"collectives, {graph}", ", ".join(f"{n} {op}" for op, n in counts.items())))
        return [row for row in rows if row[1]] if self.mesh else []

    def _how(self) -> str:
        return (" (warm)" if self.warm else " (cold)") if self.compiled else " (uncompiled)"

    def _passes(self) -> Table:
        table = Table(title="passes", title_justify="left")
        for column in ("graph", "pass", "class", "rewrites", "notes"):
            table.add_column(column)
        for graph in self.journal.graphs:
            for entry in graph.passes:
                notes = condensed(entry.notes, entry.rewrites)
                if entry.failure:
                    notes.insert(0, f"failed and was undone: {entry.failure.splitlines()[0]}")
                table.add_row(graph.name, entry.name, entry.kind, str(entry.rewrites), "\n".join(notes))
        return table


def condensed(notes: list[str], rewrites: int) -> list[str]:
    """Lines that differ only in the site they speak of, put together with their number; of a rule's sites, the numbers."""
    if notes and all(map(_SITE.match, notes)):
        # one site of merged products may be several rewrites
        found = f"{rewrites} of" if rewrites <= len(notes) else f"{rewrites} rewrites at"
        return [f"{found} {len(notes)} sites"]
    counts: dict[str, int] = {}
    for note in notes:
        site, _, rest = note.partition(": ")
        text = rest if site.rpartition(".")[0] else note
        counts[text] = counts.get(text, 0) + 1
    return [text if n == 1 else f"{n} sites: {text}" for text, n in counts.items()]
