"""Whether prefills of many tokens get a graph of their own, in chunks, and from how many tokens on.

A prefill graph serves any number of tokens, and chunks make one of few tokens slower: so these go on with the graph of the
model as it is, and no second one is made where chunks gain nothing. Decided for ``max_seq_len`` tokens; then downwards, by
halves, as far as the orders of both graphs are predicted to differ in favour of chunks. Processes take the graph by
the largest number of tokens that one of them has, which they agree on before a call anyway.

Two halves of the batch are no choice here: they want two sequences of some length, on every process.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepfuse.blocks.model import CausalLM
from deepfuse.ir.private import sizes_from_data
from deepfuse.passes.overlap_all_to_all import Decided
from deepfuse.passes.overlap_plan import GAIN, seconds_at
from deepfuse.passes.runner import Runner
from deepfuse.runtime.choose_overlap import Choice, choose
from deepfuse.runtime.compile_cache import BuildFolder
from deepfuse.runtime.overlap_form import Form, LargePrefill
from deepfuse.runtime.processes import Processes
from deepfuse.runtime.steps import example_prefill, prefill

CHUNKS = (2, 4)
KEPT = "overlap"
"""Name of the decision among the files of a build."""


def large_prefill(
    model: CausalLM, caches: list[Tensor], runner: Runner, processes: Processes, kept: BuildFolder | None
) -> tuple[LargePrefill | None, tuple[str, ...]]:
    """The form for many tokens, if there is one, and the reasons; as an earlier build had it, where it was kept."""
    found = _kept(kept.read_json(KEPT)) if kept is not None else None
    if found is not None:
        return found
    expert, parallel = processes.axes.expert, processes.parallel
    if expert is None or parallel.overlap != "auto" or parallel.chunks > 1:
        return None, ()

    def step(few: CausalLM, layers: Sequence[int], form: Form) -> tuple[Any, tuple[Any, ...]]:
        return prefill, (few, [caches[i] for i in layers], *example_prefill(caches[0].device))

    forms, tokens = [Form(chunks=n) for n in CHUNKS], runner.settings["max_seq_len"]
    with torch.inference_mode(False), torch.no_grad(), sizes_from_data():
        choice = choose(model, step, forms, runner, tokens=tokens, ranks=expert.size)
        if choice.form == Form():
            return None, choice.why
        large = LargePrefill(choice.form, _least(choice, runner, tokens))
    return large, (*choice.why, f"{choice.form} from {large.tokens} tokens on; fewer as the model is")


def decided(large: LargePrefill | None, why: tuple[str, ...]) -> dict[str, Decided]:
    """By names of graphs, for the report."""
    if large is None:
        return {"prefill": Decided(str(Form()), why)} if why else {}
    return {"prefill": Decided(str(Form())), "prefill_large": Decided(str(large.form), why)}


def keep(folder: BuildFolder, large: LargePrefill | None, why: tuple[str, ...]) -> None:
    """For the next build."""
    taken = None if large is None else [large.form.chunks, large.tokens]
    folder.write_json(KEPT, {"large": taken, "why": why})


def _kept(data: Any) -> tuple[LargePrefill | None, tuple[str, ...]] | None:
    """``None`` where nothing was kept, or it is damaged."""
    try:
        taken = data["large"]
        large = None if taken is None else LargePrefill(Form(chunks=int(taken[0])), int(taken[1]))
        return large, tuple(map(str, data["why"]))
    except (KeyError, TypeError, ValueError, IndexError):
        return None


def _least(choice: Choice, runner: Runner, tokens: int) -> int:
    """The least number of tokens, of halves of ``tokens``, for which the form is faster, and for all above it."""
    assert choice.whole is not None and choice.chosen is not None
    device, link = runner.settings["device"], runner.settings["link"]
    ((whole, as_it_is),), ((graph, planned),) = choice.whole.graphs, choice.chosen.graphs
    while tokens > 1:
        fewer = tokens // 2
        formed = seconds_at(graph, planned, device, link, fewer)
        plain = seconds_at(whole, as_it_is, device, link, fewer)
        if formed is None or plain is None or formed > (1 - GAIN) * plain:
            break
        tokens = fewer
    return tokens
