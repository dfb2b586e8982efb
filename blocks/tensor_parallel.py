"""Each weight matrix in parts over processes that all have the same tokens.

    embedding, head                       by vocabulary; logits are gathered
    q_b_proj (or q_proj), kv_b_proj       rows, o_proj columns: by heads
    gate_proj, up_proj                    rows, down_proj columns: by inner width, of experts as well
    q_a_proj, kv_a_proj, norms, router    whole on every process, and so is the latent cache

A sum over processes ends attention, and another the feed-forward block; in the backward pass, others stand where what
all processes have goes into what each computes (``same_over``), so that every gradient is the whole one.
Source: Shoeybi et al. 2019 (arXiv:1909.08053), section 3; DeepSeek-V3 (arXiv:2412.19437), section 3.4.
"""

from collections.abc import Iterator

import torch
from torch import nn

from deepfuse.blocks.attention import MHA, MLA
from deepfuse.blocks.axis import Axis
from deepfuse.blocks.cut import Cut, taken
from deepfuse.blocks.embedding import VocabularyParallelEmbedding
from deepfuse.blocks.fp8 import FP8Experts, FP8Linear
from deepfuse.blocks.mlp import MLP
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.moe import Experts, MoE


@torch.no_grad()
def to_tensor_parallel(model: CausalLM, axis: Axis) -> None:
    """Cut a model down to the part of one process of ``axis``, in place; names of parameters stay.

    Args:
        model: not quantized yet; on any device. On the meta device nothing is computed.

    Raises:
        ValueError: heads, vocabulary or an inner width cannot be dealt out evenly, or the model is of another kind.
    """
    _check(model, axis)
    for name, cut in _cuts(model, axis):
        parent, _, last = name.rpartition(".")
        whole = model.get_parameter(name)
        part = taken(whole, [cut]).clone(memory_format=torch.contiguous_format)
        setattr(model.get_submodule(parent), last, nn.Parameter(part, requires_grad=whole.requires_grad))
        model.cuts[name] = (*model.cuts.get(name, ()), cut)
    decoder, model.tensor = model.model, axis
    decoder.embed_tokens = VocabularyParallelEmbedding(decoder.embed_tokens.weight, axis)  # type: ignore[assignment,arg-type]
    shared = {id(m.shared_experts) for m in model.modules() if isinstance(m, MoE)}
    for module in model.modules():
        if isinstance(module, MLA):
            module.tensor, module.num_heads, module.o_proj.summed = axis, module.num_heads // axis.size, axis
        elif isinstance(module, MoE):
            module.tensor = axis
        elif isinstance(module, MLP) and id(module) not in shared:
            module.tensor, module.down_proj.summed = axis, axis


def _check(model: CausalLM, axis: Axis) -> None:
    c = model.config
    modules = list(model.modules())
    if any(isinstance(m, FP8Linear | FP8Experts) for m in modules):
        raise ValueError("mesh: want a model to be cut before its weights are FP8, got one with FP8 weights")
    if any(isinstance(m, MHA) for m in modules):
        raise ValueError(f"mesh: want attention 'mla' to be dealt out over axis {axis.name!r}, got {c.attention!r}")
    fields = ["num_attention_heads", "vocab_size"]
    kinds = {c.feed_forward(layer) for layer in range(len(model.model.layers))}
    fields += ["intermediate_size"] if "dense" in kinds else []
    fields += ["moe_intermediate_size"] if "sparse" in kinds else []
    for field in fields:
        axis.share(getattr(c, field), field)


def _cuts(model: CausalLM, axis: Axis) -> Iterator[tuple[str, Cut]]:
    rows, columns = Cut(axis, 0), Cut(axis, 1)
    yield "model.embed_tokens.weight", rows
    for name, module in list(model.named_modules()):
        if isinstance(module, MLA):
            yield f"{name}.{'q_b_proj' if hasattr(module, 'q_b_proj') else 'q_proj'}.weight", rows
            yield f"{name}.kv_b_proj.weight", rows
            yield f"{name}.o_proj.weight", columns
        elif isinstance(module, MLP):
            yield f"{name}.gate_proj.weight", rows
            yield f"{name}.up_proj.weight", rows
            yield f"{name}.down_proj.weight", columns
        elif isinstance(module, Experts):
            yield f"{name}.gate_up_proj", Cut(axis, 1, 2)
            yield f"{name}.down_proj", Cut(axis, 2)
    if model.lm_head is not None:
        yield "lm_head.weight", rows
