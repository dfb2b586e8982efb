"""What every process must have alike, compared before the first collective; and errors that all of them raise alike."""

import builtins
import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import torch

from deepfuse.blocks.config import Config
from deepfuse.passes.pipeline import Pipeline
from deepfuse.runtime.blame import ranks
from deepfuse.runtime.heartbeat import alone
from deepfuse.runtime.told_once import told_once
from deepfuse.runtime.verdict import verdict

MOST = 8
"""Differences that an error tells of."""
ORDER = "order of passes"
"""Told where the passes are the same."""


def agree(facts: Mapping[str, str], timeout_s: float) -> None:
    """Compare what the processes have; all of them come here at once.

    Args:
        facts: what must be alike, by name; :func:`setup` has those of a build.
        timeout_s: seconds to wait for the others; that one has died is known sooner.

    Raises:
        ValueError: the same in every process: what differs, with the values and the ranks that have them.
        RuntimeError: the others did not come.
    """
    if alone():
        return
    text = verdict("setup", json.dumps(dict(facts)), _differences, timeout_s)
    if text:
        raise told_once(ValueError(text))


@contextlib.contextmanager
def raised_by_every_rank(timeout_s: float) -> Iterator[None]:
    """A block whose error, in whichever process, is raised by all of them and printed once a machine.

    Raises:
        Exception: of the type that the first process to fail had, where Python has it, else RuntimeError.
        RuntimeError: the others did not come to the end of the block.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, all raise it
        mine = error
    if alone():
        if mine is not None:
            raise mine
        return
    told = None if mine is None else [type(mine).__name__, str(mine)]
    failure = json.loads(verdict("outcome", json.dumps(told), _first_failure, timeout_s))
    if failure is None:
        return
    kind, text = failure
    if mine is not None and told == failure:
        raise told_once(mine)
    known = getattr(builtins, kind, RuntimeError)
    raise told_once((known if issubclass(known, Exception) else RuntimeError)(text)) from mine


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
    return "\n  ".join(["build: want the same setup in every process, got", *found[:MOST], *more])


def _first_failure(said: list[str]) -> str:
    """``null``, or type and text of the error to raise: that of all where it is the same, else with the ranks."""
    told = {rank: tuple(json.loads(text)) for rank, text in enumerate(said) if text != "null"}
    if not told:
        return "null"
    kind, text = next(iter(told.values()))
    if len(told) == len(said) and len(set(told.values())) == 1:
        return json.dumps([kind, text])
    by_text: dict[str, list[int]] = {}
    for rank, (_, each) in told.items():
        by_text.setdefault(each, []).append(rank)
    return json.dumps([kind, "; ".join(f"{ranks(having)}: {each}" for each, having in by_text.items())])
