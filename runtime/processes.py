"""The processes that build a model together, as each of them sees it."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.parallel import Parallel, to_parallel
from deepfuse.ir.private import process_group
from deepfuse.runtime.agreement import raised_by_every_rank
from deepfuse.runtime.axes import Axes, Settings, axes_of, by_node, expert_apart, tokens_axis
from deepfuse.runtime.heartbeat import start
from deepfuse.runtime.lockstep import Lockstep
from deepfuse.runtime.meeting import any_of
from deepfuse.runtime.process_group import beside_compute, check_mesh, limit_waits
from deepfuse.runtime.requirements import check_device

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
    def of(
        cls, mesh: DeviceMesh | None, parallel: Parallel | None, device: str | torch.device, timeout_s: float
    ) -> tuple["Processes", torch.device]:
        """From what ``build`` is given, and the device, which is the mesh's where the caller does not say. They beat from now on.

        Raises:
            TypeError, ValueError: the mesh is none that a model can be built over.
            RuntimeError: others did not come.
        """
        if mesh is None:
            return cls(), check_device(device)
        if device == "auto" and isinstance(mesh, DeviceMesh):
            kind = mesh.device_type
            device = f"cuda:{torch.cuda.current_device()}" if kind == "cuda" else kind
        wanted = check_device(device)
        check_mesh(mesh, wanted, timeout_s)
        start(timeout_s)
        return cls(mesh=mesh, axes=axes_of(mesh), parallel=parallel or Parallel(), timeout_s=timeout_s), wanted

    @property
    def cut(self) -> Callable[[CausalLM], None] | None:
        """Cuts a model down to this process's part; ``None`` where each has all of it."""
        if self.axes.tensor is None and self.axes.expert is None:
            return None
        axes = self.axes
        return lambda model: to_parallel(model, self.parallel, tensor=axes.tensor, expert=axes.expert, nodes=axes.nodes)

    def with_groups(self) -> "Processes":
        """The same, with groups of their own for tokens on their way; all must ask at the same time, in agreement.

        On CUDA one for axis ``expert``: NCCL has a stream for each group, and transfers of tokens wait for no others. In
        mode ``node_limited`` those of nodes.

        Raises:
            ValueError: nodes do not come out even.
        """
        axes, how = self.axes, self.parallel
        if self.mesh is None or axes.expert is None:
            return self
        settings: Settings = dict
        if "nccl" in dist.get_backend_config(process_group(axes.expert.group)):
            settings = functools.partial(beside_compute, how.max_ctas)
            axes = expert_apart(self.mesh, axes, settings)
        if how.mode == "node_limited":
            assert how.ranks_per_node is not None
            axes = by_node(self.mesh, axes, how.ranks_per_node, settings)
        for name in axes.groups:
            limit_waits(process_group(name), self.timeout_s)
        return replace(self, axes=axes)

    def lockstep(self, device: torch.device) -> Lockstep:
        return Lockstep(self.axes, device, equal=self.parallel.mode == "capacity")

    def any_of(self, said: bool = False) -> bool:
        """Wait for the others, however long they compile; whether one of them said so."""
        return any_of(said, self.axes, self.patience_s)

    def tokens_axis(self) -> Axis | None:
        """The processes that have tokens of their own; all must ask at the same time."""
        if self.mesh is None:
            return None
        axis = tokens_axis(self.mesh, self.axes)
        if axis is not None:
            limit_waits(process_group(axis.group), self.timeout_s)
        return axis

    def raising_together(self) -> contextlib.AbstractContextManager[None]:
        """A block whose error, in whichever process, all of them raise at its end."""
        return contextlib.nullcontext() if self.mesh is None else raised_by_every_rank(self.patience_s)

    @contextlib.contextmanager
    def patient(self, *others: Axis | None) -> Iterator[None]:
        """Inside, collectives wait as long as compiling may take: where graphs are made when they are first called.

        Args:
            others: axes beside those of the mesh.
        """
        if self.mesh is None:
            yield
            return
        groups = [dist.group.WORLD, *self.mesh.get_all_groups()]
        named = {*self.axes.groups, *(axis.group for axis in others if axis is not None)}
        groups += [process_group(name) for name in sorted(named)]
        for group in groups:
            limit_waits(group, self.patience_s)
        try:
            yield
        finally:
            for group in groups:
                limit_waits(group, self.timeout_s)
