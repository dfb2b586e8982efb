"""What every process must have alike, compared before the first collective; and errors that all of them raise alike."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from deepfuse.blocks.config import Config
from deepfuse.ir.private import backends_error
from deepfuse.passes.pipeline import Pipeline
from deepfuse.runtime.blame import RankError, ranks
from deepfuse.runtime.heartbeat import alone, watched
from deepfuse.runtime.timeout import is_timeout
from deepfuse.runtime.told_once import everywhere, told_once
from deepfuse.runtime.verdict import failing, verdict

MOST = 8
"""Differences that an error tells of."""
ORDER = "order of passes"
"""Told where the passes are the same."""


def agree(facts: Mapping[str, str], timeout_s: float, *, what: str = "build: want the same setup") -> None:
    """Compare what the processes have; all of them come here at once.

    Args:
        facts: what must be alike, by name; :func:`setup` has those of a build.
        what: is wanted, for the error.
        timeout_s: seconds to wait for the others; that one has died is known sooner.

    Raises:
        ValueError: the same in every process: what differs, with the values and the ranks that have them.
        RankError: one did not come, or has died.
    """
    if alone():
        return
    text = verdict("setup", json.dumps(dict(facts)), _differences, timeout_s)
    if text:
        raise told_once(ValueError(f"{what} in every process, got{text}"))


@contextlib.contextmanager
def raised_by_every_rank(timeout_s: float, phase: str = "") -> Iterator[None]:
    """A block whose error, in whichever process, is raised by all of them and printed once a machine.

    They need not come to its end: those that meet inside are told there.

    Args:
        timeout_s: seconds to wait for the others.
        phase: what the block is, where it may last longer.

    Raises:
        Exception: of the type that the first process to fail had, or the nearest that Python has.
        RankError: one did not come to the end of the block, or has died.
    """
    try:
        with watched(phase, long=True) if phase else contextlib.nullcontext():
            yield
    except Exception as error:
        if alone():
            raise
        inner = backends_error(error)
        if everywhere(inner) or isinstance(inner, RankError):
            if inner is error:
                raise
            raise inner from error
        told = failing(error, timeout_s)
        if told is error:
            raise
        raise told from error
    if not alone():
        verdict("outcome", "", lambda said: "", timeout_s)


def raised_together(build: Callable[..., Any]) -> Callable[..., Any]:
    """``build``, given a mesh: whatever it refuses, in whichever process, all of them refuse."""

    @functools.wraps(build)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("mesh") is None and kwargs.get("parallel") is None:
            return build(*args, **kwargs)
        timeout_s = kwargs.get("timeout_s", 60.0)
        with raised_by_every_rank(timeout_s if is_timeout(timeout_s) else 60.0):
            return build(*args, **kwargs)

    return call


def setup(config: Config, folder: Path | None, pipeline: Pipeline, **settings: object) -> dict[str, str]:
    """Facts of a build for :func:`agree`: versions, configuration, checkpoint, passes, and settings as they print.

    Of a checkpoint's files: names, sizes, and a hash of samples of their contents, not more than 64 kB a file.
    """
    facts = {"torch": torch.__version__, "deepfuse": f"sources {_sources_hash()}"}
    facts |= {f"config.{field.name}": repr(getattr(config, field.name)) for field in fields(config)}
    facts["checkpoint"] = "none" if folder is None else "a folder"
    for path in [] if folder is None else sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.json")):
        facts[f"checkpoint {path.name}"] = f"{path.stat().st_size} bytes, {_sampled_hash(path)}"
    for p in pipeline.passes:
        facts[f"pass {p.name}"] = f"{p.stage}, source {p.source_hash()[:8]}"
    facts[ORDER] = " ".join(pipeline.names)
    return facts | {name: repr(value) for name, value in sorted(settings.items())}


def _sources_hash() -> str:
    """Of the library: a version says nothing of a checkout."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].glob("*/*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _sampled_hash(path: Path) -> str:
    """Of 16 blocks of 4 kB, the first and the last among them: names, dtypes and shapes lie first."""
    size, block, many = path.stat().st_size, 4096, 16
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for i in range(many):
            file.seek(max(size - block, 0) * i // (many - 1))
            digest.update(file.read(block))
    return f"sample {digest.hexdigest()[:8]}"


def _differences(said: list[str]) -> str:
    facts: list[dict[str, str]] = [json.loads(text) for text in said]
    found = []
    for name in dict.fromkeys(name for had in facts for name in had):
        by_value: dict[str, list[int]] = {}
        for rank, had in enumerate(facts):
            by_value.setdefault(had.get(name, "none"), []).append(rank)
        if len(by_value) > 1:
            values = "; ".join(f"{value:.200} in {ranks(having)}" for value, having in by_value.items())
            found.append(f"{name}: {values}")
    if any(difference.startswith("pass ") for difference in found):
        found = [difference for difference in found if not difference.startswith(ORDER)]
    if not found:
        return ""
    more = [f"and {len(found) - MOST} more"] if len(found) > MOST else []
    return "\n  ".join(["", *found[:MOST], *more])
