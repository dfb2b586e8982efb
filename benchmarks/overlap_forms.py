"""One of two ranks of ``overlap.py``: a training step of whole decoder layers in each form of overlap, and in the one chosen.

    python overlap_forms.py SPECS     SPECS is JSON; rank 0 prints what was measured, as JSON, in its last line

The choice is that of ``Parallel(overlap="auto")``, made of this run's link and products. Both layers have experts, and a shared
one no wider than those: so attention is what two halves of a batch can run under each other's messages. Graphs run in the order
in which the passes left them, each call as torch makes it: Inductor would take minutes for so many of them.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from measured_rates import measured_device, measured_link
from overlap_ranks import NAME, WITHOUT, Step, notes, timed
from rank_group import in_group

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.config import Config
from deepfuse.blocks.expert_parallel import to_expert_parallel
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.presets import PRESETS
from deepfuse.ir.private import sizes_from_data, with_own_code
from deepfuse.passes.pipeline import default
from deepfuse.passes.runner import Runner
from deepfuse.runtime.choose_overlap import choose
from deepfuse.runtime.losses import next_token_loss
from deepfuse.runtime.overlap_form import Form, in_form

FORMS = (Form(), Form(chunks=2), Form(chunks=4), Form(halves=True))
"""What the choice is of; the third is measured where it is chosen."""
AUTO = "auto"


def model_config(spec: Mapping[str, Any]) -> Config:
    """Layers of experts; how many, and their sizes as the spec has them."""
    return replace(
        PRESETS["v3-tiny"](),
        vocab_size=256,
        hidden_size=spec["hidden"],
        num_hidden_layers=spec["layers"],
        mlp_layer_types=("sparse",) * spec["layers"],
        num_nextn_predict_layers=0,
        num_attention_heads=spec["heads"],
        num_key_value_heads=None,
        n_routed_experts=spec["experts"],
        num_experts_per_tok=spec["experts_per_token"],
        moe_intermediate_size=spec["intermediate"],
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
    )


def measure(spec: Mapping[str, Any], axis: Axis) -> dict[str, Any]:
    """Seconds of each form, the form that was chosen and why, and what the pass said of it."""
    torch.manual_seed(0)
    config = model_config(spec)
    model = CausalLM(config).train()
    to_expert_parallel(model, axis)
    B, L = spec["sequences"], spec["length"]
    torch.manual_seed(1 + axis.rank)
    ids = torch.randint(config.vocab_size, (B, L + 2))
    places = torch.arange(L).repeat(B), torch.arange(0, (B + 1) * L, L, dtype=torch.int32)
    device = measured_device(B * L, config.hidden_size, spec["intermediate"], timed)
    settings = {"providers": {}, "max_seq_len": L, "device": device, "link": measured_link(axis, timed)}

    def asked(model: CausalLM, layers: Sequence[int], form: Form) -> tuple[Any, tuple[Any, ...]]:
        return next_token_loss, (model, ids, *places, form.halves)

    def built(form: Form, pipeline: Any) -> tuple[Step, Runner]:
        # from a cache, passes would say nothing
        runner = Runner(pipeline, settings, strict=True, salt=str(time.time_ns()))
        fn = torch.compile(with_own_code(next_token_loss), fullgraph=True, dynamic=False, backend=runner.backend())
        return functools.partial(_step, fn, in_form(model, form), ids, *places, form.halves), runner

    with sizes_from_data():
        ours = Runner(default(), settings, strict=True)
        choice = choose(model, asked, FORMS[1:], ours, tokens=B * L, ranks=axis.size)
        made = {form: built(form, default()) for form in {*FORMS[:2], FORMS[3], choice.form}}
        plain, _ = built(Form(), default().without(NAME))
        chosen, runner = made[choice.form]
        steps = {WITHOUT: plain, AUTO: chosen, **{str(form): made[form][0] for form in FORMS if form in made}}
        times = timed(steps, spec["rounds"])
    return {"times": times, "chosen": str(choice.form), "why": list(choice.why), "notes": notes(runner)}


def _step(fn: Any, model: CausalLM, *args: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    fn(model, *args).backward()


if __name__ == "__main__":
    in_group(lambda specs, axis: [measure(spec, axis) for spec in specs])
