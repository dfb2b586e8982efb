"""Profile the processes of a group together: each writes its run, and the first merges them.

with df.profile_ranks(model, "runs/a") as run:          in every process, started by torchrun
    model(x)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepfuse.profiling.profile import profile
from deepfuse.profiling.rank_session import RankSession
from deepfuse.profiling.recorder import together
from deepfuse.profiling.run import Run


@contextmanager
def profile_ranks(model: Any, out: str | Path, *, group: Any = None, **options: Any) -> Iterator[Run]:
    """:func:`profile` in every process of a group, which must all come here, and do the same steps.

    Args:
        model: as of :func:`profile`.
        out: directory to make. Each process writes into ``rank0``, ``rank1``, ...; the first writes ``ranks.json`` and
            ``trace.json.gz``, all processes in one.
        group: process group of torch.distributed; ``None`` for all processes.
        options: further ones of :func:`profile`.

    Yields:
        The :class:`Run` of this process, in its own time. :class:`deepfuse.profiling.ranks.Ranks` reads all of them.

    Raises:
        TypeError, ValueError: torch.distributed is not set up, or ``group`` is none of this process's; the processes
            did different steps, or no collectives in them; and as :func:`profile`.
        FileExistsError, OSError: ``out`` is there already, or cannot be made; in every process.
    """
    session = RankSession(group, out)
    token = together.set(True)
    try:
        with profile(model, session.folder, **options) as run:
            yield run
        session.finish(run)
    except BaseException:
        session.leave(failed=True)
        raise
    finally:
        together.reset(token)
    session.leave(failed=False)
