"""One of the processes of tests/blocks/test_tensor_parallel.py: how far its part of a model is from one process's."""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.cut import taken, whole_shape
from deepfuse.blocks.fp8 import to_fp8
from deepfuse.blocks.fp8_training import train_in_fp8
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.tensor_parallel import to_tensor_parallel
from deepfuse.ir.device import device_row
from deepfuse.ops import import_ops
from deepfuse.passes.pipeline import default
from deepfuse.passes.runner import Runner
from deepfuse.runtime.losses import mtp_loss, next_token_loss
from tiny_checkpoint import CONFIGS, TINY, logits, model_of

MODELS = ("v3", "v3-tied-yarn", "v3-bias-no-shared", "v2")
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
}
"""Heads and inner widths of which each of two processes has whole blocks of 128."""


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    axis = Axis("tensor", dist.group.WORLD.group_name, dist.get_world_size(), dist.get_rank())
    torch.manual_seed(0)  # the same weights on every process
    said: dict[str, Any] = {name: _errors(model_of(CONFIGS[name]), axis) for name in MODELS}
    said["through the passes"] = _errors(model_of(TINY), axis, _rewritten())
    wide = replace(TINY, **WIDE)
    said["trained in FP8"] = _errors(model_of(wide), axis, prepare=train_in_fp8)
    said["in FP8"] = _fp8_error(model_of(wide), axis)
    said["drawn"] = _drawn(axis)
    (folder / f"said{axis.rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def _errors(
    whole: CausalLM,
    axis: Axis,
    compiled: Callable[[Any], Any] = lambda fn: fn,
    prepare: Callable[[CausalLM], object] = lambda model: None,
) -> dict[str, float]:
    """Of logits, losses and each gradient, as a part of the largest number there."""
    part = copy.deepcopy(whole)
    to_tensor_parallel(part, axis)
    prepare(whole)
    prepare(part)
    errors = {"logits": _error(logits(part), logits(whole))}
    tokens = torch.arange(2 * 9).view(2, 9) * 5 % whole.config.vocab_size
    positions, q_start = torch.arange(7).repeat(2), torch.tensor([0, 7, 14], dtype=torch.int32)
    has_mtp = len(whole.model.layers) > whole.config.num_hidden_layers
    for loss_of in (next_token_loss, mtp_loss)[: 1 + has_mtp]:
        want = loss_of(whole, tokens, positions, q_start)
        got = compiled(loss_of)(part, tokens, positions, q_start)
        want.backward()
        got.backward()
        errors[loss_of.__name__] = _error(got, want)
    theirs = dict(whole.named_parameters())
    for name, parameter in part.named_parameters():
        cuts = part.cuts.get(name, ())
        assert whole_shape(parameter.shape, cuts) == theirs[name].shape, name
        gradient = theirs[name].grad
        if gradient is None:
            assert parameter.grad is None, name
        else:
            errors[name] = _error(parameter.grad, taken(gradient, cuts))
    return errors


def _rewritten() -> Callable[[Any], Any]:
    import_ops()
    settings = {"providers": {}, "device": device_row(torch.device("cpu")), "max_seq_len": 64}
    backend = Runner(default(), settings, strict=True).backend()
    return lambda fn: torch.compile(fn, fullgraph=True, dynamic=False, backend=backend)


def _fp8_error(whole: CausalLM, axis: Axis) -> float:
    part = copy.deepcopy(whole)
    to_tensor_parallel(part, axis)
    to_fp8(part)
    to_fp8(whole)
    return _error(logits(part), logits(whole))


def _drawn(axis: Axis) -> bool:
    whole, part = CausalLM(TINY), CausalLM(TINY)
    to_tensor_parallel(part, axis)
    whole.initialize(3)
    part.initialize(3)
    theirs = dict(whole.named_parameters())
    return all(torch.equal(p, taken(theirs[n], part.cuts.get(n, ()))) for n, p in part.named_parameters())


def _error(got: Tensor | None, want: Tensor) -> float:
    assert got is not None
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
