"""Whether prefills of many tokens get graphs of their own, in chunks and in halves, and from how many tokens on.

A prefill graph serves any number of tokens, and chunks make one of few tokens slower: so these go on with the graph of the
model as it is, and no second one is made where chunks gain nothing. Decided for ``max_seq_len`` tokens; then downwards, by
half as many, as far as the orders of both graphs are predicted to differ in favour of chunks. Processes take the graph by
the largest number of tokens that one of them has, which they agree on before a call anyway.

Two halves of the batch want two sequences of about as many tokens, on every process: a call that has them takes the graph
in halves, where that is predicted to be faster than the others; any other call takes one of these.
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
from deepfuse.runtime.steps import example_prefill, example_prefill_in_halves, prefill, prefill_in_halves

CHUNKS = (2, 4)
KEPT = "overlap"
"""Name of the decision among the files of a build."""


def large_prefill(
    model: CausalLM,
    caches: list[Tensor],
    runner: Runner,
    processes: Processes,
    kept: BuildFolder | None,
    max_batch_size: int,
) -> tuple[tuple[LargePrefill, ...], tuple[str, ...]]:
    """The forms for many tokens, halves first, and the reasons; as an earlier build had them, where they were kept."""
    found = _kept(kept.read_json(KEPT)) if kept is not None else None
    if found is not None:
        return found
    expert, parallel = processes.axes.expert, processes.parallel
    if expert is None or parallel.chunks > 1:
        return (), ()
    if parallel.overlap == "halves":
        if max_batch_size == 1:
            return (), ("refused: two-batch wants two sequences, and max_batch_size is 1",)
        return (LargePrefill(Form(halves=True), 2),), ()
    if parallel.overlap != "auto":
        return (), ()

    def step(few: CausalLM, layers: Sequence[int], form: Form) -> tuple[Any, tuple[Any, ...]]:
        device = caches[0].device
        fn, given = (prefill_in_halves, example_prefill_in_halves) if form.halves else (prefill, example_prefill)
        return fn, (few, [caches[i] for i in layers], *given(device))

    forms, tokens = [Form(chunks=n) for n in CHUNKS], runner.settings["max_seq_len"]
    # a capacity has them filled up to the largest half of any process, which a prediction does not know
    if max_batch_size > 1 and parallel.mode != "capacity":
        forms.append(Form(halves=True))
    with torch.inference_mode(False), torch.no_grad(), sizes_from_data():
        choice = choose(model, step, forms, runner, tokens=tokens, ranks=expert.size)
        faster = list(choice.found)[1:]
        # of more chunks and fewer, those that are faster; halves beside them
        large = [each for each in faster if each.halves] + [each for each in faster if not each.halves][-1:]
        taken = tuple(LargePrefill(form, _least(choice, form, runner, tokens)) for form in large)
    return taken, (*choice.why, *map(_from, taken))


def decided(large: Sequence[LargePrefill], why: tuple[str, ...]) -> dict[str, Decided]:
    """By names of graphs, for the report."""
    if not large:
        return {"prefill": Decided(str(Form()), why)} if why else {}
    first, *others = large
    found = {"prefill": Decided(str(Form())), first.graph: Decided(str(first.form), why)}
    return found | {each.graph: Decided(str(each.form)) for each in others}


def keep(folder: BuildFolder, large: Sequence[LargePrefill], why: tuple[str, ...]) -> None:
    """For the next build."""
    taken = [[each.form.chunks, each.form.halves, each.tokens] for each in large]
    folder.write_json(KEPT, {"large": taken, "why": why})


def _kept(data: Any) -> tuple[tuple[LargePrefill, ...], tuple[str, ...]] | None:
    """``None`` where nothing was kept, or it is damaged."""
    try:
        large = tuple(LargePrefill(Form(int(n), bool(halves)), int(tokens)) for n, halves, tokens in data["large"])
        return large, tuple(map(str, data["why"]))
    except (KeyError, TypeError, ValueError):
        return None


def _from(large: LargePrefill) -> str:
    if large.form.halves:
        return (
            f"{large.form} where each process has two halves of {-(-large.tokens // 2)} tokens or more; else as follows"
        )
    return f"{large.form} from {large.tokens} tokens on; fewer as the model is"


def _least(choice: Choice, form: Form, runner: Runner, tokens: int) -> int:
    """The least number of tokens, of halves of ``tokens``, for which the form is faster, and for all above it."""
    device, link = runner.settings["device"], runner.settings["link"]

    def seconds(of: Form, fewer: int) -> float | None:
        ((graph, planned),) = choice.found[of].graphs
        return seconds_at(graph, planned, device, link, fewer)

    simpler = list(choice.found)[: list(choice.found).index(form)]
    while tokens > 1:
        fewer = tokens // 2
        formed, others = seconds(form, fewer), [seconds(each, fewer) for each in simpler]
        known = [each for each in others if each is not None]
        # where messages are mostly latency, predictions say nothing
        if formed is None or others[0] is None or formed > (1 - GAIN) * min(known):
            break
        tokens = fewer
    return tokens
