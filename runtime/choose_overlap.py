"""Which form hides the exchange of tokens best, by the cost model, before a step's graph is compiled.

The step is captured in each form, with a few layers of the model, and nothing is run or measured: so all ranks come to the
same, and the time that it takes does not grow with the model. The order of each graph is that of the pass; what the forms
come to is compared, forward and backward together. First the model as it is; where that leaves nothing exposed, or
messages are so small that latency is too much of them, no other form is looked at. A form is taken where it is predicted to
be faster, with at most 1.15 times the memory.
Dims: T tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from deepfuse.blocks.model import CausalLM
from deepfuse.ir.cost import tensor_bytes
from deepfuse.ir.link import Link, all_to_all_seconds
from deepfuse.ir.private import traced
from deepfuse.passes.overlap_all_to_all import Decided, overlap_all_to_all
from deepfuse.passes.overlap_plan import GAIN, LATENCY, MEMORY, Plan, milliseconds, plan
from deepfuse.passes.runner import Runner
from deepfuse.runtime.overlap_form import Form, in_form, of_layers

SPARSE = 2
"""Layers of experts in a capture; of other kinds of layers it has one each."""

Step = Callable[[CausalLM, Sequence[int], Form], tuple[Callable[..., Any], tuple[Any, ...]]]
"""The function of a step and its arguments: of a model that has these layers, and a form already."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a form comes to.

    Attributes:
        graphs: forward, and backward in training, each with its order.
        in_turn: seconds with nothing hidden.
        seconds: in the best order.
        exposed: of these, waits for messages.
        peak: bytes that live at once.
    """

    graphs: Sequence[tuple[fx.Graph, Plan]]
    in_turn: float
    seconds: float
    exposed: float
    peak: int


@dataclass(frozen=True, slots=True)
class Choice:
    """A form, and for the report the reason.

    Attributes:
        found: predictions, where there are any: of the model as it is, then of the forms that are each faster than those
            before, the chosen one last.
    """

    form: Form
    why: tuple[str, ...] = ()
    found: Mapping[Form, Predicted] = field(default_factory=dict)

    @property
    def decided(self) -> Decided:
        return Decided(str(self.form), self.why)


def choose(model: CausalLM, step: Step, forms: Iterable[Form], runner: Runner, *, tokens: int, ranks: int) -> Choice:
    """The form in which a step is predicted to be fastest.

    Args:
        forms: to choose from, beside that of the model as it is.
        runner: with the passes and their settings; its journal is left alone.
        tokens: T, of a step of this rank; of a graph that serves any number, what it is taken for.
        ranks: among which tokens travel.
    """
    link: Link | None = runner.settings.get("link")
    if link is None or overlap_all_to_all.name not in runner.pipeline.names:
        return Choice(Form())
    # the most that a dispatch may have: a capacity rounds up, FP8 and nodes send less
    config = model.config
    rows = tokens * config.num_experts_per_tok + (config.n_routed_experts or 0)
    message = all_to_all_seconds(link, 4.0 * rows * config.hidden_size, ranks)
    if link.latency > LATENCY * message:
        share = f"{milliseconds(link.latency)} of {milliseconds(message)} of a message"
        return Choice(Form(), (f"refused: {tokens} tokens, latency-bound: {share}",))
    numbers = _layers(model)
    few = of_layers(model, numbers)
    left_out = tensor_bytes(*model.parameters()) - tensor_bytes(*few.parameters())

    def predicted(form: Form) -> Predicted:
        graphs = traced(*step(in_form(few, form), numbers, form))
        return _predicted(graphs, runner, tokens, left_out)

    whole = best = predicted(Form())
    faster, told = {Form(): whole}, [_told(Form(), whole, whole)]
    for form in forms:
        if best.exposed <= GAIN * best.seconds:
            told.append("no other form: nothing is left to hide")
            break
        # more chunks are better only where some are
        if form.chunks > 2 and len(faster) == 1:
            continue
        found = predicted(form)
        told.append(_told(form, found, whole))
        if found.peak <= MEMORY * whole.peak and found.seconds <= (1 - GAIN) * best.seconds:
            faster[form] = best = found
    chosen, layers = list(faster)[-1], ", ".join(map(str, numbers))
    return Choice(chosen, (f"{chosen}, as predicted of layers {layers} and {tokens} tokens:", *told), faster)


def _layers(model: CausalLM) -> list[int]:
    """The first layer of each kind, and more of experts."""
    kinds: dict[str, list[int]] = {}
    for i in range(model.config.num_hidden_layers):
        kinds.setdefault(model.config.feed_forward(i), []).append(i)
    return sorted(i for kind, found in kinds.items() for i in found[: SPARSE if kind == "sparse" else 1])


def _predicted(graphs: Iterable[fx.GraphModule], runner: Runner, tokens: int, left_out: int) -> Predicted:
    """``left_out``: bytes of weights that live beside the graph's."""
    trial = Runner(runner.pipeline, runner.settings, strict=runner.strict)
    planned = []
    for gm in graphs:
        trial.run(gm.graph, "joint")
        found = plan(gm.graph, trial.settings["device"], trial.settings["link"], tokens)
        if found is not None:
            planned.append((gm.graph, found))
    return Predicted(
        planned,
        sum(p.before.seconds for _, p in planned),
        sum(p.after.seconds for _, p in planned),
        sum(sum(p.after.exposed.values()) for _, p in planned),
        left_out + max((p.after.peak for _, p in planned), default=0),
    )


def _told(form: Form, found: Predicted, whole: Predicted) -> str:
    refused = next((f", refused: {p.refused}" for _, p in found.graphs if p.refused), "")
    more = found.peak / max(whole.peak, 1)
    memory = f", refused: {more:.2f} times the memory" if more > MEMORY else ""
    return (
        f"{form}: predicted {milliseconds(whole.in_turn)} -> {milliseconds(found.seconds)}, exposed "
        f"{milliseconds(found.exposed)}{refused}{memory}"
    )
