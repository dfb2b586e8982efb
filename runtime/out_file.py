"""Whether a file may be written, for who measures or compiles for minutes first, and before a file takes the place of a device."""

import os
from pathlib import Path


def check_out_file(path: Path, option: str) -> None:
    """Refuse a file that could not be written, or that is something else: a device would be replaced by a file.

    Args:
        option: of a command, as in ``bench: want --json``.

    Raises:
        ValueError: it is no file, its folder does not exist, or one of them is not to be written.
    """
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise ValueError(f"{option} to be a file in a folder that exists, got {path}")
    if not os.access(path.parent, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"{option} to be a file that can be written, got {path}")
