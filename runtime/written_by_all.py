"""A folder that every process writes its part of, there whole or not at all.

Parts go into a folder with a temporary name. It gets its own when all have written: one rename, so that whoever is
killed, and whenever, a folder of that name is whole. For a checkpoint in parts: one folder a step; the newest is the
one to go on from, and older ones may go once it is there.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from deepfuse.runtime.agreement import raised_by_every_rank
from deepfuse.runtime.checkpoint_files import temporary_name


@contextmanager
def written_by_all(folder: Path, timeout_s: float) -> Iterator[Path]:
    """All processes come here at once; each writes files of its own into the folder that is yielded.

    Args:
        folder: to make, on a disk that all share. What an earlier try left of it goes.
        timeout_s: seconds to wait for a process that does not beat.

    Raises:
        FileExistsError: ``folder`` is there already.
        FileNotFoundError: it is on a disk that not all processes share.
        Exception: as the block of any process; from all of them, and then there is no ``folder``.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    temporary = temporary_name(folder)
    with raised_by_every_rank(timeout_s):
        if first:
            if folder.exists():
                raise FileExistsError(f"checkpoint: want a folder that is not there yet, got {folder}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    with raised_by_every_rank(timeout_s):
        if not temporary.is_dir():
            raise FileNotFoundError(f"checkpoint: want a disk that all processes share, got {folder.parent}")
        yield temporary
    with raised_by_every_rank(timeout_s):
        if first:
            temporary.rename(folder)
