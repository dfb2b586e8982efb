"""What one process of several leaves of a profile, ``DIR/rank3``, and all of them read back and set to one clock."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deepfuse.profiling.clock_offset import Clock, Offset
from deepfuse.profiling.collectives import Groups
from deepfuse.profiling.run import Run
from deepfuse.profiling.timeline import Span, Step

FILE = "rank.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One of the processes that were profiled together.

    Attributes:
        session: the same for all of one profile, and for no others.
        rank: of the process among all.
        ranks: those that were profiled.
        host: machine it ran on.
        groups: process groups it is in, by name.
        clock: to that of the first of ``ranks``.
    """

    session: str
    rank: int
    ranks: tuple[int, ...]
    host: str
    groups: Groups
    clock: Clock

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> "Process":
        """What was written into ``folder``.

        Raises:
            ValueError: nothing was, or something else.
        """
        try:
            data = json.loads((folder / FILE).read_text())
            return cls(
                ranks=tuple(data.pop("ranks")),
                groups={name: tuple(ranks) for name, ranks in data.pop("groups").items()},
                clock=Clock(**{when: Offset(**offset) for when, offset in data.pop("clock").items()}),
                **data,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"ranks: want a directory that one process wrote, got {folder}: {error!r:.200}") from None


def rank_folder(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}"


def read_ranks(folder: str | Path) -> tuple[dict[int, Process], dict[int, Run]]:
    """The processes of a profile and their runs, in the time of the first.

    Raises:
        ValueError: runs are missing, are of several profiles, or have different steps.
    """
    found = {
        int(path.name.removeprefix("rank")): path
        for path in sorted(Path(folder).glob("rank*"))
        if re.fullmatch(r"rank\d+", path.name)
    }
    if not found:
        raise ValueError(f"ranks: want a directory with the runs rank0, rank1, ..., got none in {folder}")
    processes = {rank: Process.read(path) for rank, path in sorted(found.items())}
    first = next(iter(processes.values()))
    for rank, process in processes.items():
        if process.session != first.session or process.rank != rank:
            raise ValueError(
                f"ranks: want runs of one profile, got rank {first.rank} of session {first.session} and rank "
                f"{process.rank} of session {process.session} in {found[rank]}"
            )
    missing = sorted(set(first.ranks) - set(processes))
    if missing:
        raise ValueError(
            f"ranks: want the runs of ranks {_listed(first.ranks)}, got {_listed(processes)} in {folder}; "
            f"{_listed(missing)} missing"
        )
    runs = {rank: in_time_of(Run.read(found[rank]), process.clock) for rank, process in processes.items()}
    _check_steps(runs)
    return processes, runs


def _check_steps(runs: Mapping[int, Run]) -> None:
    first, *others = runs
    expected = [step.graph for step in runs[first].steps]
    for rank in others:
        found = [step.graph for step in runs[rank].steps]
        if found == expected:
            continue
        counts = Counter(expected), Counter(found)
        told = [", ".join(f"{n} x {graph}" for graph, n in count.items()) for count in counts]
        order = ""
        if counts[0] == counts[1]:
            order = (
                f", in another order from step {[a == b for a, b in zip(expected, found, strict=True)].index(False)} on"
            )
        raise ValueError(
            f"ranks: want the same steps in every process, got {told[0]} in rank {first} and {told[1]} in rank "
            f"{rank}{order}"
        )


def in_time_of(run: Run, clock: Clock) -> Run:
    """The same run by the clock of reference."""
    return replace(run, steps=[_shifted(step, clock) for step in run.steps])


def _shifted(step: Step, clock: Clock) -> Step:
    now = clock.reference
    return replace(
        step,
        began=now(step.began),
        ended=now(step.ended),
        code_began=now(step.code_began),
        code_ended=now(step.code_ended),
        spans=[Span(s.kernel, s.part, now(s.began), now(s.ended)) for s in step.spans],
    )


def _listed(ranks: Any) -> str:
    return ", ".join(map(str, sorted(ranks)))
