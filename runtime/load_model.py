"""Weights in their place: read from a checkpoint, or random, and in FP8 where that is asked for."""

from collections.abc import Callable, Collection
from pathlib import Path

import torch

from deepfuse.blocks.config import Config
from deepfuse.blocks.fp8 import FP8Experts, FP8Linear, in_decoder_layers, to_fp8
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.moe import Router
from deepfuse.runtime.checkpoint import load_weights, present_mtp_layers, rebuild_buffers, stored_in_fp8
from deepfuse.runtime.config_json import weight_block_size
from deepfuse.runtime.weight_layout import groups, lay_side_by_side


def load_model(
    cfg: Config,
    folder: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    *,
    in_fp8: Collection[str],
    activations: bool,
    with_experts: bool | None = None,
    cut: Callable[[CausalLM], None] | None = None,
) -> CausalLM:
    """A model with its weights.

    Args:
        with_experts: whether a shared expert lies behind the routed ones; ``None``: every weight lies by itself.
        cut: leaves a model on the meta device the part of this process, which alone is then made; ``None``: all of it.
    """
    if folder is not None:
        present = present_mtp_layers(folder, cfg)
        with torch.device("meta"):
            causal_lm = CausalLM(cfg, mtp_layers=present)
            if cut is not None:
                cut(causal_lm)
            to_fp8(causal_lm, activations=activations, wanted=in_fp8.__contains__)
        together = () if with_experts is None else groups(causal_lm, with_experts=with_experts)
        load_weights(causal_lm, folder, device=device, dtype=dtype, together=together)
        return causal_lm
    # made in its dtype and place: in float32 first it would take twice the memory that was checked
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device if cut is None else torch.device("meta"):
            causal_lm = CausalLM(cfg)
    finally:
        torch.set_default_dtype(default)
    if cut is not None:
        cut(causal_lm)
        _make(causal_lm, device)
    causal_lm.initialize(seed)
    to_fp8(causal_lm, activations=activations, wanted=in_fp8.__contains__)
    if with_experts is not None:
        lay_side_by_side(causal_lm, with_experts=with_experts)
    return causal_lm


def _make(causal_lm: CausalLM, device: torch.device) -> None:
    """Give a model of the meta device memory, with buffers as a new model has them."""
    causal_lm.to_empty(device=device)
    for module in causal_lm.modules():
        if isinstance(module, Router) and module.e_score_correction_bias is not None:
            module.e_score_correction_bias.zero_()
    rebuild_buffers(causal_lm, device)


def modules_in_fp8(cfg: Config, folder: Path | None, quantize: str | None, notes: list[str]) -> set[str]:
    """Names of the modules that are to be FP8."""
    if quantize is None:
        return set()
    names, partly = (set(), set()) if folder is None else stored_in_fp8(folder, cfg)
    if quantize != "auto":
        with torch.device("meta"):
            return names | in_decoder_layers(CausalLM(cfg))
    if partly:
        block = weight_block_size(cfg)
        why = (
            "some of their weights are not in FP8"
            if block == (128, 128)
            else f"their blocks are {block}, not (128, 128)"
        )
        first = ", ".join(sorted(partly)[:3]) + (", ..." if len(partly) > 3 else "")
        notes.append(f"FP8 weights of {len(partly)} modules are dequantized: {why} ({first})")
    return names


def fp8_summary(causal_lm: CausalLM) -> str:
    """What a report says of a model's FP8 modules."""
    modules = [m for m in causal_lm.modules() if isinstance(m, FP8Linear | FP8Experts)]
    kinds = {"fp8" if m.activations else "fp8_weights" for m in modules}
    return f"{' and '.join(sorted(kinds))}: {len(modules)} modules" if modules else ""
