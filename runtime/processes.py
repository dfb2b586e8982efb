"""The processes that build a model together, as each of them sees it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.distributed.device_mesh import DeviceMesh

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.parallel import Parallel, to_parallel
from deepfuse.runtime.axes import Axes, axes_of, tokens_axis
from deepfuse.runtime.lockstep import Lockstep
from deepfuse.runtime.meeting import any_of

PATIENCE_S = 3600.0
"""Seconds for what takes longer on one process than on another: compiling, and files. One that dies is found sooner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """One process, or those of a mesh."""

    mesh: DeviceMesh | None = None
    axes: Axes = field(default_factory=Axes)
    parallel: Parallel = field(default_factory=Parallel)
    timeout_s: float = 60.0
    patience_s: float = PATIENCE_S

    @classmethod
    def of(cls, mesh: DeviceMesh | None, parallel: Parallel | None, timeout_s: float) -> "Processes":
        """From what ``build`` is given; a mesh must have been checked."""
        if mesh is None:
            return cls()
        return cls(mesh=mesh, axes=axes_of(mesh), parallel=parallel or Parallel(), timeout_s=timeout_s)

    def device(self, asked: str | torch.device) -> str | torch.device:
        """Where the model goes if the caller does not say: where the mesh is."""
        if self.mesh is None or asked != "auto":
            return asked
        kind = self.mesh.device_type
        return f"cuda:{torch.cuda.current_device()}" if kind == "cuda" else kind

    @property
    def cut(self) -> Callable[[CausalLM], None] | None:
        """Cuts a model down to this process's part; ``None`` where each has all of it."""
        if self.axes.tensor is None and self.axes.expert is None:
            return None
        return lambda model: to_parallel(model, self.parallel, tensor=self.axes.tensor, expert=self.axes.expert)

    def lockstep(self, device: torch.device) -> Lockstep:
        return Lockstep(self.axes, device)

    def any_of(self, said: bool = False) -> bool:
        """Wait for the others, however long they compile; whether one of them said so."""
        return any_of(said, self.axes, self.patience_s)

    def tokens_axis(self) -> Axis | None:
        """The processes that have tokens of their own; all must ask at the same time."""
        return None if self.mesh is None else tokens_axis(self.mesh, self.axes, self.timeout_s)
