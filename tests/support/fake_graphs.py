"""Graphs of models too large for any test: captured with fake tensors, and rewritten as ``build`` would."""

from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from deepfuse.blocks.config import Config
from deepfuse.blocks.fp8 import to_fp8
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.presets import PRESETS
from deepfuse.ir.device import H200
from deepfuse.ir.private import with_own_code
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.passes.journal import GraphEntry
from deepfuse.passes.pipeline import Pipeline, default
from deepfuse.passes.runner import Runner
from deepfuse.runtime.steps import decode, prefill
from deepfuse.runtime.weight_layout import lay_side_by_side, layout_key

STEPS = {"prefill": (prefill, 2, 50), "decode": (decode, 2, 1)}
"""Graph -> its function, sequences, and tokens of each: in a prefill more than in any decode step."""
CACHED = 4096


def preset(name: str, layers: int | None = None) -> Config:
    """A preset without its multi-token-prediction module; cut to so many layers, of which the first is dense."""
    config = replace(PRESETS[name](), num_nextn_predict_layers=0)
    return config if layers is None else replace(config, num_hidden_layers=layers, first_k_dense_replace=1)


def rewritten(
    config: Config, graph: str, dtype: torch.dtype, *, fp8: bool = False, pipeline: Pipeline | None = None
) -> GraphEntry:
    """What the passes before ``lower`` do to a graph of a model without numbers, on a GPU's row of the cost model."""
    fn, sequences, tokens = STEPS[graph]
    with FakeTensorMode(), torch.no_grad():
        model = CausalLM(config).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        if fp8:
            to_fp8(model)
        lay_side_by_side(model, with_experts=True)
        settings = {"providers": {}, "device": H200, "max_seq_len": CACHED, "layout": layout_key(model)}
        runner = Runner((pipeline or default()).without("lower"), settings, strict=True)
        pages = sequences * CACHED // PAGE_SIZE
        shape = (pages + 1, PAGE_SIZE, config.cache_width)
        caches = [torch.empty(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]
        if graph == "decode":
            given = [_integers(4, sequences), _integers(sequences, pages // sequences)]
        else:
            given = [_integers(3, sequences * tokens), _integers(sequences + 1).int(), _integers(sequences)]
        torch.compile(with_own_code(fn), fullgraph=True, dynamic=False, backend=runner.backend())(model, caches, *given)
    (entry,) = runner.journal.graphs
    return entry


def _integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)
