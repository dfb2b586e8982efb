"""An engine whose graphs and report are kept together: where one is missing or damaged, both are made again."""

import uuid
from typing import Any

from deepfuse.blocks.model import CausalLM
from deepfuse.passes.journal import Journal
from deepfuse.passes.runner import Runner
from deepfuse.runtime.compile_cache import BuildFolder
from deepfuse.runtime.engine import Engine, buckets
from deepfuse.runtime.latent_cache import LatentCache


def kept_engine(
    causal_lm: CausalLM, cache: LatentCache, runner: Runner, max_batch_size: int, folder: BuildFolder | None
) -> Engine:
    """The engine of a model, its graphs read from ``folder`` where they are there whole, else made and written there."""
    graphs = 1 + len(list(buckets(max_batch_size)))
    kept = None if folder is None else kept_journal(folder.read_report(), graphs)
    if folder is not None and kept is None:
        folder.discard()
    made = Engine(causal_lm, cache, runner, max_batch_size=max_batch_size, folder=folder)
    if folder is None:
        return made
    if made.from_cache and kept is not None:
        runner.journal.graphs[:] = kept.graphs
        return made
    if len(runner.journal.graphs) < graphs:
        # Inductor had a graph that we had lost: its passes did not run, so that the report would have a gap
        folder.discard()
        runner.journal.graphs.clear()
        runner.salt = uuid.uuid4().hex
        made = Engine(causal_lm, cache, runner, max_batch_size=max_batch_size, folder=folder)
    folder.write_report(runner.journal.to_json())
    return made


def kept_journal(report: Any, graphs: int) -> Journal | None:
    """The kept report of so many graphs; ``None`` where it is damaged."""
    try:
        journal = Journal.from_json(report)
    except (AttributeError, KeyError, TypeError):
        return None
    return journal if len(journal.graphs) == graphs else None
