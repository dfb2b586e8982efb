"""The command ``deepfuse profile``."""

import json
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from deepfuse.runtime.build_options import BuildOptions

if TYPE_CHECKING:
    from deepfuse.profiling.run import Run


@dataclass(kw_only=True)
class Profile:
    """Show where the time of a generation, or of training, goes, by block, layer and op, and how much of it the device
    asks for; compare two runs; merge those of several processes; show one in TensorBoard."""

    model: Positional[str]
    """Checkpoint directory or preset; or one of the words diff, merge and open."""
    runs: Positional[tuple[str, ...]] = ()
    """Of diff: two directories that --out made; of merge: one, with the runs of several processes; of open: one, or the one
    above several."""
    prompt: str | None = None
    """Text to continue; read from standard input where it is not given."""
    steps: int = 32
    """Decode steps to record; of training, steps."""
    train: bool = False
    """Profile training: forward, backward and optimizer, on random tokens, or on those of --text."""
    text: Path | None = None
    """Of --train: a file of text, at least a window long, in UTF-8."""
    batch_size: int = 4
    """Of --train: sequences a step."""
    seq_len: int = 128
    """Of --train: tokens a sequence."""
    out: str | None = None
    """Directory to make, for the run: tables, traces for Perfetto and TensorBoard, a page for the browser."""
    open: bool = False
    """Start TensorBoard on it, and print where."""
    shapes: bool = False
    """Of operands, in TensorBoard's trace."""
    memory: bool = False
    """Each allocation, in TensorBoard's trace."""
    stacks: bool = False
    """Of Python, in TensorBoard's trace."""
    by: Literal["op", "block", "place"] = "op"
    """Rows of the table: by op, by block, or by module and op."""
    nvtx: bool = False
    """NVTX ranges by block and op, as under nsys profile; without --out nothing else is recorded."""
    json: bool = False
    options: BuildOptions = field(default_factory=BuildOptions)

    def run(self) -> None:
        verbs = {"diff": (self._diff, ("by", "json")), "merge": (self._merge, ("json",)), "open": (self._open, ())}
        if self.model in verbs:
            verb, taken = verbs[self.model]
            self._refuse_all_but("model", "runs", *taken)
            verb()
            return
        if self.runs:
            raise ValueError(f"profile: want one model, got {self.model} and {', '.join(self.runs)}")
        self._profile()

    def _refuse_all_but(self, *names: str) -> None:
        given = self._given(*(f.name for f in fields(self) if f.name not in names))
        if given:
            raise ValueError(f"profile {self.model}: want directories without options of a profile, got {given}")

    def _given(self, *names: str) -> str:
        """Those of the options that are not as they are by default, with commas between."""
        plain = Profile(model=self.model)
        given = [name for name in names if getattr(self, name) != getattr(plain, name)]
        return ", ".join(f"--{name.replace('_', '-')}" for name in given)

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

    def _open(self) -> None:
        from deepfuse.profiling.tensorboard_server import serve

        if len(self.runs) != 1:
            raise ValueError(f"profile open: want one run directory, got {len(self.runs)}")
        serve(Path(self.runs[0]))

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
        from deepfuse.profiling.nvtx import open_domain
        from deepfuse.profiling.profile import check_out, profile
        from deepfuse.profiling.roofline import roofline, roofline_table
        from deepfuse.profiling.tensorboard_server import check_tensorboard, serve

        # before a minute of compiling
        if self.steps < 1:
            raise ValueError(f"profile: want --steps >= 1, got {self.steps}")
        details = {name: getattr(self, name) for name in ("shapes", "memory", "stacks")}
        if self.out is not None:
            check_out(Path(self.out))
        elif self.open or any(details.values()):
            written = "; deepfuse profile open DIR shows a run that was written" if self.open else ""
            raise ValueError(f"profile: want --out DIR with --open, --shapes, --memory and --stacks, got none{written}")
        if self.open:
            check_tensorboard()
        if self.nvtx:
            open_domain()
        if not self.options.compile and not (self.nvtx and self.out is None):
            raise ValueError("profile: want a compiled model, or --nvtx without --out, got --no-compile")
        if self.train:
            if any(details.values()) or self.prompt is not None:
                raise ValueError("profile: want no --shapes, --memory, --stacks or --prompt with --train, got some")
            if self.nvtx and self.out is not None:
                raise ValueError("profile: want --train with --out or with --nvtx, got both")
            run = self._profiled_training()
        else:
            given = self._given("text", "batch_size", "seq_len")
            if given:
                raise ValueError(f"profile: want --train with --text, --batch-size and --seq-len, got {given} alone")
            prompt = sys.stdin.read() if self.prompt is None else self.prompt
            model = self.options.build(self.model)
            with profile(model, self.out, nvtx=self.nvtx, tensorboard=True if self.open else None, **details) as run:
                # the first token comes from prefill
                model.generate(prompt, max_new_tokens=self.steps + 1, temperature=0.0, stop_token_ids=())
        if self.nvtx and self.out is None:
            done = {"steps": self.steps, "recorded": 0}
            print(json.dumps(done) if self.json else f"{self.steps} steps with NVTX ranges; to record them, add --out")
            return
        finest: Literal["op", "place"] = "place" if self.by == "place" else "op"
        if self.json:
            rows = [{**asdict(row), "lost_us": row.lost_us} for row in roofline(run, finest)]
            print(json.dumps({**run.json(), "roofline": rows}))
        else:
            from rich.console import Console

            Console().print(run.table(self.by), roofline_table(run, finest))
        if self.open and self.out is not None:
            serve(Path(self.out))

    def _profiled_training(self) -> "Run":
        from deepfuse.profiling.profile import profile
        from deepfuse.profiling.training_tokens import training_tokens
        from deepfuse.runtime.training import Training

        warmup = 2
        training = Training(steps=self.steps + 1 + warmup, batch_size=self.batch_size, seq_len=self.seq_len)
        tokens = training_tokens(self.model, self.text, at_least=self.seq_len + 3)
        trainer = self.options.build(self.model, training=training)
        how: dict[str, Any] = {"nvtx": self.nvtx, "tensorboard": True if self.open else None}
        with profile(trainer, self.out, warmup=warmup, **how) as run:
            for _ in range(training.steps):
                trainer.train_step(tokens)
        return run
