"""``deepfuse bench``: run a suite of benchmarks, list them, or draw what one found."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(kw_only=True)
class Bench:
    """Run a suite of benchmarks; without one, list them with the questions they answer. Wants a checkout."""

    suite: Positional[str | None] = None
    """Name of a suite."""
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

        if self.suite is not None:
            run_suite(self.suite, json=self.json, against=self.against, budget=self.budget, only=self.only)
            return
        table = Table("suite", "question")
        for suite in suites().values():
            table.add_row(suite.name, suite.question)
        Console().print(table)
