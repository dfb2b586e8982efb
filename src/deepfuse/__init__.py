"""deepfuse: the DeepSeek-V3 architecture as a compiled graph you can see into.

    import deepfuse as df
    model = df.build("v3-tiny")
    print(model.generate("Once upon a time"))

Names are loaded when they are first used: importing the package costs next to nothing over importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deepfuse._entry_point import register

if TYPE_CHECKING:
    from deepfuse.blocks.config import Config, RopeScaling
    from deepfuse.blocks.model import CausalLM
    from deepfuse.blocks.parallel import Parallel
    from deepfuse.blocks.presets import PRESETS
    from deepfuse.ir.op import OPS
    from deepfuse.passes.fusion import fusion
    from deepfuse.passes.record import graph_pass
    from deepfuse.profiling.profile import profile
    from deepfuse.profiling.profile_ranks import profile_ranks
    from deepfuse.profiling.run import Run
    from deepfuse.runtime.backend import backend_journal
    from deepfuse.runtime.build import build
    from deepfuse.runtime.model import Model
    from deepfuse.runtime.report import Report
    from deepfuse.runtime.trainer import Trainer, Training

__version__ = "0.1.0"

register()  # torch.compile(model, backend="deepfuse")

_HOMES = {
    "backend_journal": "deepfuse.runtime.backend",
    "build": "deepfuse.runtime.build",
    "CausalLM": "deepfuse.blocks.model",
    "Config": "deepfuse.blocks.config",
    "fusion": "deepfuse.passes.fusion",
    "graph_pass": "deepfuse.passes.record",
    "Model": "deepfuse.runtime.model",
    "OPS": "deepfuse.ir.op",
    "Parallel": "deepfuse.blocks.parallel",
    "PRESETS": "deepfuse.blocks.presets",
    "profile": "deepfuse.profiling.profile",
    "profile_ranks": "deepfuse.profiling.profile_ranks",
    "Report": "deepfuse.runtime.report",
    "RopeScaling": "deepfuse.blocks.config",
    "Run": "deepfuse.profiling.run",
    "Trainer": "deepfuse.runtime.trainer",
    "Training": "deepfuse.runtime.trainer",
}

__all__ = [
    "OPS",
    "PRESETS",
    "CausalLM",
    "Config",
    "Model",
    "Parallel",
    "Report",
    "RopeScaling",
    "Run",
    "Trainer",
    "Training",
    "backend_journal",
    "build",
    "fusion",
    "graph_pass",
    "passes",
    "profile",
    "profile_ranks",
]


def __getattr__(name: str) -> Any:
    if name == "passes":
        return import_module("deepfuse.passes")
    if name not in _HOMES:
        raise AttributeError(f"module 'deepfuse' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
