"""``torch.compile(model, backend="deepfuse")``: the passes alone, on somebody else's model.

Dynamo finds backends by entry points, which a plain checkout does not have. So ``import deepfuse`` adds a finder that
shows one to ``importlib.metadata``: nothing of Dynamo is imported for it. The report is ``deepfuse.backend_journal()``.
"""

from typing import Any

import torch
from torch import Tensor, fx

from deepfuse.ir.device import device_row
from deepfuse.ir.private import compile_inner
from deepfuse.passes.journal import Journal, naming
from deepfuse.passes.pipeline import pipeline_of
from deepfuse.passes.runner import Runner
from deepfuse.runtime.compile_cache import cache_root

_JOURNAL = Journal()


def backend_journal() -> Journal:
    """What the passes did to the graphs that ``torch.compile(backend="deepfuse")`` compiled in this process.

    ``print(df.backend_journal())``, ``.explain("recognize_norm")``, ``.graph("after:recognize_norm")``. A graph from
    Inductor's cache, for which the passes did not run again, is not in it.
    """
    return _JOURNAL


def backend(gm: fx.GraphModule, example_inputs: list[Any], **kwargs: Any) -> Any:
    """Compile a graph of Dynamo's: our passes, then Inductor.

    Args:
        kwargs: ``options`` of ``torch.compile``: ``passes``, ``strict``, ``verify`` (values only where not compiled),
            ``compile`` (``False`` runs the rewritten graph as it is) as for ``build``; the rest are Inductor's.
    """
    options = dict(kwargs.get("options") or {})
    compiled = options.pop("compile", True)
    ours = {name: options.pop(name) for name in ("strict", "verify") if name in options}
    device = next((x.device for x in example_inputs if isinstance(x, Tensor)), torch.device("cpu"))
    settings = {"providers": options.pop("providers", {}), "device": device_row(device), "max_seq_len": 4096}
    pipeline = pipeline_of(options.pop("passes", None))
    runner = Runner(pipeline, settings, journal=_JOURNAL, dumps=cache_root() / "failures", **ours)
    with naming(f"graph_{len(_JOURNAL.graphs)}"):
        if not compiled:
            return runner.backend()(gm, example_inputs)
        return compile_inner(gm, example_inputs, {**runner.options(), **options})
