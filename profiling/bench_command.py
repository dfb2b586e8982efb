"""``deepfuse bench``: run a suite of benchmarks, list them, or draw what one found."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(kw_only=True)
class Bench:
    """Run a suite of benchmarks, of a checkout; without one, list them with the questions they answer. Draw what one
    found."""

    suite: Positional[str | None] = None
    """Name of a suite; or the word plot."""
    results: Positional[Path | None] = None
    """Of plot: a file that --json wrote."""
    out: Path | None = None
    """Of plot: the figure to write, an .svg."""
    json: Path | None = None
    """File to write the rows to, each as it is measured."""
    against: Path | None = None
    """Results of the same suite and device, that the rows are compared with."""
    budget: float | None = None
    """Seconds: what does not fit is left out, and listed."""
    only: str | None = None
    """Run the parts whose name contains this text; rows of others stay in the file as they are."""

    def run(self) -> None:
        from rich.console import Console
        from rich.table import Table

        from deepfuse.profiling.bench_suites import run_suite, suites

        if self.suite in (None, "plot"):
            given = [name for name in ("json", "against", "budget", "only") if getattr(self, name) is not None]
            if given:
                named = ", ".join(f"--{name}" for name in given)
                raise ValueError(f"bench: want a suite with {named}, got {self.suite or 'none'}")
        if self.suite == "plot":
            self._plot()
            return
        if self.results is not None or self.out is not None:
            raise ValueError(f"bench: want a file and --out behind the word plot only, got them with {self.suite}")
        if self.suite is not None:
            run_suite(self.suite, json=self.json, against=self.against, budget=self.budget, only=self.only)
            return
        table = Table("suite", "question")
        for suite in suites().values():
            table.add_row(suite.name, suite.question)
        Console().print(table)

    def _plot(self) -> None:
        from deepfuse.profiling.bench_plot import bar_chart
        from deepfuse.profiling.bench_results import Results

        if self.results is None or self.out is None:
            raise ValueError("bench plot: want a file that --json wrote, and --out FIGURE.svg, got one of them at most")
        if self.out.suffix != ".svg":
            raise ValueError(f"bench plot: want --out to end in .svg, got {self.out}")
        self.out.write_text(bar_chart(Results.read(self.results)))
