"""Processes that profile together: one directory, clocks set before and after, and the runs merged by the first.

Their own traffic goes over a group of its own, over Gloo: it takes times from the CPU whatever the model's backend is, and
is not mixed up with what the model sends.
"""

import contextlib
import os
import socket
import uuid
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from deepfuse.ir.private import process_group
from deepfuse.profiling.clock_offset import Clock, exchange
from deepfuse.profiling.rank_run import Process, rank_folder
from deepfuse.profiling.rank_trace import write_rank_trace
from deepfuse.profiling.ranks import Ranks
from deepfuse.profiling.run import Run

PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others at either end of a block: kernels with clocks are compiled in it."""


class RankSession:
    """One profile of the processes of a group, seen from one of them."""

    def __init__(self, group: Any, out: str | Path):
        """All processes of the group come here at once.

        Raises:
            TypeError, ValueError: ``group`` is none that this process is in, or torch.distributed is not set up.
            RuntimeError: others did not come, in ``PATIENCE``.
            FileExistsError, OSError: ``out`` is there already, or the first process cannot make it; from all of them.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "profile: want processes that torch.distributed knows, got none; start them with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        group = dist.group.WORLD if group is None else group
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"profile: want group as a process group that this process is in, got {type(group).__name__}"
            )
        self.out, self.rank = Path(out), dist.get_rank()
        self.ranks = tuple(dist.get_process_group_ranks(group))
        self.first, self.made = self.rank == self.ranks[0], False
        with self._awaited("beginning"):
            # groups of all processes are counted; names made of the ranks of some come again in torch 2.11, where a
            # second profile of a part of the processes meets what the first left in the store
            part = len(self.ranks) < dist.get_world_size()
            self.group: Any = dist.new_group(
                list(self.ranks), backend="gloo", timeout=PATIENCE, use_local_synchronization=part
            )
        try:
            self.session = self._begin()
            self.folder = rank_folder(self.out, self.rank)
            with self._awaited("beginning"):
                self.before = exchange(self.group)
        except BaseException:
            self.leave(failed=True)
            raise

    @contextlib.contextmanager
    def _awaited(self, where: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            ranks = ", ".join(map(str, self.ranks))
            raise RuntimeError(
                f"profile: want every process of {ranks} at the {where} of its block, got {error}"
            ) from error

    def _begin(self) -> str:
        """The session's name; the directory is made by the first process, and what it meets there is everybody's error."""
        told: list[Any] = [uuid.uuid4().hex, None]
        if self.first:
            try:
                self.out.mkdir(parents=True)
                self.made = True
            except OSError as error:
                told[1] = error.errno
        dist.broadcast_object_list(told, src=self.ranks[0], group=self.group)
        session, problem = told
        if problem is not None:
            # as OSError makes of the number
            raise type(OSError(problem, ""))(
                f"profile: want a run directory that is not there yet and can be made, got {self.out}: "
                f"{os.strerror(problem)}"
            )
        return session

    def finish(self, run: Run) -> None:
        """Set the clocks again, and merge the runs, of which this process has written its own.

        Raises:
            RuntimeError: another process failed in its block, or did not come to its end.
            ValueError: the runs cannot be merged; from the first process.
        """
        with self._awaited("end"):
            after = exchange(self.group)
        names = {s.group for kernels in run.parts.values() for k in kernels for part in k for s in part.own if s.group}
        Process(
            session=self.session,
            rank=self.rank,
            ranks=self.ranks,
            host=socket.gethostname(),
            groups={name: tuple(dist.get_process_group_ranks(process_group(name))) for name in sorted(names)},
            clock=Clock(self.before, after),
        ).write(self.folder)
        dist.barrier(self.group)
        if self.first:
            merge_where_all_are_there(self.out, self.ranks)

    def leave(self, *, failed: bool) -> None:
        """The others then see a closed connection, and do not wait; what is empty of the directory goes."""
        dist.destroy_process_group(self.group)
        if failed and self.made:
            with contextlib.suppress(OSError):  # others may have left theirs in it
                self.out.rmdir()


def merge(folder: str | Path) -> Ranks:
    """Read the runs in ``folder`` and write ``ranks.json`` and ``trace.json.gz`` beside them.

    Raises:
        ValueError: as :meth:`Ranks.read`.
    """
    ranks = Ranks.read(folder)
    ranks.write(Path(folder) / "ranks.json")
    write_rank_trace(ranks, Path(folder) / "trace.json.gz")
    return ranks


def merge_where_all_are_there(folder: Path, ranks: tuple[int, ...]) -> None:
    """Machines need not share a disk."""
    missing = [rank for rank in ranks if not rank_folder(folder, rank).exists()]
    if not missing:
        merge(folder)
        return
    listed = ", ".join(str(rank_folder(folder, rank)) for rank in missing)
    warnings.warn(
        f"profile: the processes share no disk: copy {listed} here, then run: deepfuse profile merge {folder}",
        stacklevel=2,
    )
