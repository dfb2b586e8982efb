"""An engine whose graphs and report are kept together: where one is missing or damaged, both are made again."""

import uuid
from typing import Any

from deepfuse.blocks.model import CausalLM
from deepfuse.passes.journal import Journal
from deepfuse.passes.runner import Runner
from deepfuse.runtime.compile_cache import BuildFolder
from deepfuse.runtime.engine import Engine, graphs_of
from deepfuse.runtime.latent_cache import LatentCache
from deepfuse.runtime.overlap_form import LargePrefill
from deepfuse.runtime.processes import Processes


def kept_engine(
    causal_lm: CausalLM,
    cache: LatentCache,
    runner: Runner,
    max_batch_size: int,
    folder: BuildFolder | None,
    processes: Processes,
    large: tuple[LargePrefill, ...] = (),
) -> Engine:
    """The engine of a model, its graphs read from ``folder`` where they are there whole, else made and written there.

    Each of several processes has its own ``folder``, and may read its graphs while another makes its own; no graph runs
    before the collectives of all were compared.
    """
    graphs = graphs_of(max_batch_size, large)
    kept = None if folder is None else kept_journal(folder.read_report(), graphs)
    several = processes.axes.size > 1
    if folder is not None and kept is None:
        folder.discard()
    options: dict[str, Any] = {"max_batch_size": max_batch_size, "folder": folder, "large": large}
    options |= {"lockstep": processes.lockstep(cache.layers[0].device), "together": folder is not None and several}
    made = Engine(causal_lm, cache, runner, **options)
    if folder is None:
        return made
    if kept is not None and made.from_cache:
        runner.journal.graphs[:] = kept.graphs
    else:
        if len(runner.journal.graphs) < graphs:
            # Inductor had a graph that we had lost: its passes did not run, so that the report would have a gap
            folder.discard()
            runner.journal.graphs.clear()
            runner.salt = uuid.uuid4().hex
            made = Engine(causal_lm, cache, runner, **options)
        folder.write_report(runner.journal.to_json())
    if several:
        processes.compare_kept(runner.journal)
        made.try_out()
    return made


def kept_journal(report: Any, graphs: int) -> Journal | None:
    """The kept report of so many graphs; ``None`` where it is damaged."""
    try:
        journal = Journal.from_json(report)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return journal if len(journal.graphs) == graphs else None
