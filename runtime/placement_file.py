"""Loads of experts, and placements chosen from them, as JSON.

loads       {"tokens_per_expert": [[...], ...]}                                        a list for each layer
placement   {"ranks": 4, "expert_of_slot": [[...], ...], "loads": [[...], ...]}        likewise
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepfuse.blocks.placement import Placement, check_loads
from deepfuse.runtime.checkpoint_files import replace_file

LOADS = "tokens_per_expert"


def save_loads(loads: Tensor, path: str | os.PathLike[str]) -> None:
    """Write loads ``[L, E]``, whole or not at all."""
    _write(Path(path), {LOADS: loads.tolist()})


def load_loads(path: str | os.PathLike[str]) -> Tensor:
    """Loads ``[L, E]`` of a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has something else.
    """
    loads = _tensor(path, LOADS, _object(path, {LOADS}, "Model.expert_loads(path)")[LOADS])
    check_loads(loads)
    return loads


def save_placement(placement: Placement, path: str | os.PathLike[str]) -> None:
    """Write a placement for ``Parallel(placement=path)``, whole or not at all."""
    rows = {"expert_of_slot": placement.expert_of_slot.tolist(), "loads": placement.loads.tolist()}
    _write(Path(path), {"ranks": placement.ranks, **rows})


def load_placement(path: str | os.PathLike[str]) -> Placement:
    """The placement of a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has something else, or a placement that is none.
    """
    found = _object(path, {"ranks", "expert_of_slot", "loads"}, "save_placement(place_experts(...), path)")
    slots, loads = (_tensor(path, name, found[name]) for name in ("expert_of_slot", "loads"))
    return Placement(slots, found["ranks"], loads.double())


def _write(path: Path, value: dict[str, Any]) -> None:
    rows = [f"{json.dumps(name)}: {_lines(entry)}" for name, entry in value.items()]
    replace_file(path, ("{\n" + ",\n".join(rows) + "\n}\n").encode())


def _lines(entry: Any) -> str:
    """A layer a line."""
    if not isinstance(entry, list):
        return json.dumps(entry)
    return "[\n" + ",\n".join(json.dumps(row) for row in entry) + "\n]"


def _object(path: str | os.PathLike[str], names: set[str], writer: str) -> dict[str, Any]:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"placement: want a file, got {str(path)!r}, which does not exist; {writer} writes it"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"placement: want JSON in {str(path)!r}, got {error}; {writer} writes it") from None
    if not isinstance(value, dict) or set(value) != names:
        got = sorted(value) if isinstance(value, dict) else f"a {type(value).__name__}"
        raise ValueError(
            f"placement: want an object of {sorted(names)} in {str(path)!r}, got {got!s:.200}; {writer} writes it"
        )
    return value


def _tensor(path: str | os.PathLike[str], name: str, rows: Any) -> Tensor:
    try:
        return torch.tensor(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"placement: want {name} in {str(path)!r} as equally long lists of numbers, one for each layer, got {error}"
        ) from None
