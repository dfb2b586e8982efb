"""The command ``deepfuse profile``."""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from deepfuse.runtime.build_options import BuildOptions


@dataclass(kw_only=True)
class Profile:
    """Show where the time of a generation goes, by block, layer and op, and how much of it the device asks for;
    compare two runs; merge those of several processes."""

    model: Positional[str]
    """Checkpoint directory or preset; or one of the words diff and merge."""
    runs: Positional[tuple[str, ...]] = ()
    """Of diff: two directories that --out made; of merge: one, with the runs of several processes."""
    prompt: str | None = None
    """Text to continue; read from standard input where it is not given."""
    steps: int = 32
    """Decode steps to record."""
    out: str | None = None
    """Directory to make, for run.json and trace.json.gz (Perfetto)."""
    by: Literal["op", "block", "place"] = "op"
    """Rows of the table: by op, by block, or by module and op."""
    json: bool = False
    options: BuildOptions = field(default_factory=BuildOptions)

    def run(self) -> None:
        if self.model == "diff":
            self._diff()
            return
        if self.model == "merge":
            self._merge()
            return
        if self.runs:
            raise ValueError(f"profile: want one model, got {self.model} and {', '.join(self.runs)}")
        self._profile()

    def _diff(self) -> None:
        from deepfuse.profiling.diff import compare, difference_table
        from deepfuse.profiling.run import Run

        if len(self.runs) != 2:
            raise ValueError(f"profile diff: want two run directories, got {len(self.runs)}")
        before, after = map(Run.read, self.runs)
        rows = compare(before, after, self.by)
        if self.json:
            print(json.dumps([{**asdict(row), "us": row.us} for row in rows]))
        else:
            from rich.console import Console

            Console().print(difference_table(rows))

    def _merge(self) -> None:
        from deepfuse.profiling.rank_session import merge

        if len(self.runs) != 1:
            raise ValueError(f"profile merge: want one directory, with rank0, rank1, ... in it, got {len(self.runs)}")
        ranks = merge(self.runs[0])
        if self.json:
            print(json.dumps(ranks.json()))
        else:
            from rich.console import Console

            Console().print(*ranks.tables())

    def _profile(self) -> None:
        from deepfuse.profiling.profile import check_out, profile
        from deepfuse.profiling.roofline import roofline, roofline_table

        # before a minute of compiling
        if self.steps < 1:
            raise ValueError(f"profile: want --steps >= 1, got {self.steps}")
        if self.out is not None:
            check_out(Path(self.out))
        prompt = sys.stdin.read() if self.prompt is None else self.prompt
        model = self.options.build(self.model)
        with profile(model, self.out) as run:
            # the first token comes from prefill
            model.generate(prompt, max_new_tokens=self.steps + 1, temperature=0.0, stop_token_ids=())
        finest: Literal["op", "place"] = "place" if self.by == "place" else "op"
        if self.json:
            rows = [{**asdict(row), "lost_us": row.lost_us} for row in roofline(run, finest)]
            print(json.dumps({**run.json(), "roofline": rows}))
        else:
            from rich.console import Console

            Console().print(run.table(self.by), roofline_table(run, finest))
