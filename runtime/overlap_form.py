"""The forms of a model in which its exchanges of tokens can be hidden, and a model in one of them.

    shared    as it is: an exchange runs under the shared expert, and whatever else waits for no message
    chunks    the tokens of a layer in parts (blocks/chunked.py)
    halves    the sequences of a batch in two (blocks/two_batch.py), which is the caller's to ask a model for

A model in another form shares all weights and buffers with the one that it is made of.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from deepfuse.blocks.chunked import Chunked
from deepfuse.blocks.exchange import Local
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.moe import MoE


@dataclass(frozen=True, slots=True)
class Form:
    """One of them."""

    chunks: int = 1
    halves: bool = False

    def __str__(self) -> str:
        return "two-batch" if self.halves else f"chunked x{self.chunks}" if self.chunks > 1 else "shared expert"


@dataclass(frozen=True, slots=True)
class LargePrefill:
    """A prefill graph of its own for many tokens."""

    form: Form
    tokens: int
    """From how many on it is taken: of the process with the most, in halves of that with the least."""

    @property
    def graph(self) -> str:
        """Its name."""
        return "prefill_halves" if self.form.halves else "prefill_large"


def in_form(model: CausalLM, form: Form) -> CausalLM:
    """The model itself, or one whose exchanges are in chunks."""
    if form.chunks == 1:
        return model
    made = _sharing(model)
    for module in made.modules():
        if isinstance(module, MoE) and not isinstance(module.exchange, Local):
            module.exchange = Chunked(module.exchange, form.chunks)
    return made


def of_layers(model: CausalLM, numbers: Sequence[int]) -> CausalLM:
    """A model of these layers alone, and of the modules behind the layers."""
    made, L = _sharing(model), model.config.num_hidden_layers
    kinds = tuple(model.config.feed_forward(i) for i in numbers)
    made.config = replace(model.config, num_hidden_layers=len(numbers), mlp_layer_types=kinds)
    made.model.layers = nn.ModuleList([made.model.layers[i] for i in (*numbers, *range(L, len(model.model.layers)))])
    return made


def _sharing(model: CausalLM) -> CausalLM:
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)  # type: ignore[arg-type]
