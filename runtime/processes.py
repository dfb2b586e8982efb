"""The processes that build a model together, as each of them sees it."""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.collectives import sum_over
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.parallel import Parallel, to_parallel
from deepfuse.blocks.placement import Placement
from deepfuse.ir.private import process_group
from deepfuse.passes.collective_order import Call, collective_orders, order_of
from deepfuse.passes.journal import Journal
from deepfuse.runtime.agreement import agree, raised_by_every_rank
from deepfuse.runtime.axes import Axes, Settings, axes_of, by_node, expert_apart, tokens_axis
from deepfuse.runtime.heartbeat import start
from deepfuse.runtime.lockstep import Lockstep
from deepfuse.runtime.placement_file import load_placement
from deepfuse.runtime.process_group import BesideCompute, check_mesh, device_mesh, limit_waits
from deepfuse.runtime.requirements import check_device
from deepfuse.runtime.timeout import check_timeout


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """One process, or those of a mesh."""

    mesh: DeviceMesh | None = None
    axes: Axes = field(default_factory=Axes)
    parallel: Parallel = field(default_factory=Parallel)
    timeout_s: float = 60.0

    @classmethod
    def of(
        cls,
        mesh: DeviceMesh | Mapping[str, int] | None,
        parallel: Parallel | None,
        device: str | torch.device,
        timeout_s: float,
    ) -> tuple["Processes", torch.device]:
        """From what ``build`` is given, and the device, which is the mesh's where the caller does not say. They beat from now on.

        Raises:
            TypeError, ValueError: the mesh is none that a model can be built over.
            RuntimeError: others did not come.
        """
        if mesh is None:
            if parallel is not None:
                raise ValueError(
                    "build: want a mesh of several processes with parallel, got none; pass mesh={'expert': 2} or a DeviceMesh"
                )
            return cls(), check_device(device)
        check_timeout(timeout_s)
        if isinstance(mesh, Mapping):
            mesh = device_mesh(mesh, check_device(device), timeout_s)
        # all or none begin to beat
        with raised_by_every_rank(timeout_s):
            if not isinstance(parallel, Parallel | None):
                raise TypeError(f"build: want parallel as a Parallel, got {parallel!r:.80}")
            parallel = parallel or Parallel()
            parallel.check()
            if isinstance(parallel.placement, str | os.PathLike):
                parallel = replace(parallel, placement=load_placement(parallel.placement))
            if device == "auto" and isinstance(mesh, DeviceMesh):
                kind = mesh.device_type
                device = f"cuda:{torch.cuda.current_device()}" if kind == "cuda" else kind
            wanted = check_device(device)
            check_mesh(mesh, wanted, timeout_s)
        start(timeout_s)
        axes = axes_of(mesh)
        if parallel.placement is not None and axes.expert is None:
            raise ValueError(
                "build: want an axis 'expert' of several processes with Parallel(placement=...), got the mesh "
                f"{axes.sizes or 'of one process'}"
            )
        return cls(mesh=mesh, axes=axes, parallel=parallel, timeout_s=timeout_s), wanted

    @property
    def placement(self) -> Placement | None:
        """Of experts, where they do not lie in order."""
        placement = self.parallel.placement
        assert isinstance(placement, Placement | None)
        return placement

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
            settings = BesideCompute(how.max_ctas)
            axes = expert_apart(self.mesh, axes, settings)
        if how.mode == "node_limited":
            assert how.ranks_per_node is not None
            axes = by_node(self.mesh, axes, how.ranks_per_node, settings)
        for name in axes.groups:
            limit_waits(process_group(name), self.timeout_s)
        return replace(self, axes=axes)

    def lockstep(self, device: torch.device) -> Lockstep:
        return Lockstep(self.axes, device, equal=self.parallel.mode == "capacity")

    @property
    def compare(self) -> Callable[[str, list[Call]], None] | None:
        """Compares a graph's collectives with those of the others, before any runs it; ``None`` without others."""
        if self.axes.size == 1:
            return None
        return lambda name, calls: self._compare({f"collectives of {name}": order_of(calls, self.axes.groups)})

    def compare_kept(self, journal: Journal) -> None:
        """The same, for all graphs of a journal."""
        self._compare(collective_orders(journal, self.axes.groups))

    def _compare(self, orders: dict[str, str]) -> None:
        agree(orders, self.timeout_s, what="graphs: want collectives in the same order")

    def tokens_axis(self) -> Axis | None:
        """The processes that have tokens of their own; all must ask at the same time."""
        if self.mesh is None:
            return None
        axis = tokens_axis(self.mesh, self.axes)
        if axis is not None:
            limit_waits(process_group(axis.group), self.timeout_s)
        return axis

    def sum_over_tokens(self, counts: Tensor) -> Tensor:
        """The sum over the processes that have tokens of their own; all must ask at the same time."""
        return sum_over(sum_over(counts, self.axes.data), self.axes.expert)

    def raising_together(self, phase: str) -> contextlib.AbstractContextManager[None]:
        """A block that may last, and whose error, in whichever process, all of them raise.

        Args:
            phase: what it is.
        """
        return contextlib.nullcontext() if self.mesh is None else raised_by_every_rank(self.timeout_s, phase)
