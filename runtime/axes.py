"""The axes of a mesh as one process sees them.

Source: torch.distributed.device_mesh; process groups as functional collectives name them.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from deepfuse.blocks.axis import AXES, Axis
from deepfuse.blocks.config import Config
from deepfuse.blocks.placement import Placement

Settings = Callable[[], Mapping[str, Any]]
"""Makes what ``new_group`` is told of a group beside its ranks; anew for each, which writes into them. Equal ones make the same."""
P = ParamSpec("P")
R = TypeVar("R")


def made_once(make: Callable[P, R]) -> Callable[P, R]:
    """``make``, whose process groups serve every later call with equal arguments, as long as torch.distributed is the same one.

    A process group holds connections and, of NCCL, memory of the device; and graphs call it by its name, so that a model that is
    built again finds its graphs in the cache.
    """

    @functools.cache
    def made(world: object, *args: Any, **kwargs: Any) -> R:
        return make(*args, **kwargs)

    @functools.wraps(make)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return made(dist.group.WORLD, *args, **kwargs)  # type: ignore[arg-type]

    return call


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """The axes of a mesh by name; ``None`` for those that it does not have, or of one process."""

    data: Axis | None = None
    tensor: Axis | None = None
    expert: Axis | None = None
    nodes: tuple[Axis, Axis] | None = None
    """Of ``expert``, the processes of this one's place in each node, and those of its node; where tokens travel by node."""
    rank: int = 0
    """Of this process among all."""
    size: int = 1
    """Processes in all."""

    def __str__(self) -> str:
        named = [f"{name} {size}" for name, size in self.sizes.items()]
        if self.nodes is not None:
            named[-1] += f" on {self.nodes[0].size} nodes"
        return f"{' x '.join(named) or 'one process'}, this is rank {self.rank} of {self.size}"

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes there are."""
        return {axis.name: axis.size for axis in (self.data, self.tensor, self.expert) if axis is not None}

    @property
    def groups(self) -> dict[str, str]:
        """Process group -> axis, of the axes there are, and of their nodes."""
        axes = (self.data, self.tensor, self.expert, *(self.nodes or ()))
        return {axis.group: axis.name for axis in axes if axis is not None}

    def part_of(self, config: Config, placement: Placement | None = None) -> str:
        """What this process has of a model, in words."""
        parts = []
        if placement is not None:
            each = placement.slots // placement.ranks
            parts.append(f"{each} of {placement.slots} slots for {placement.experts} experts in each layer")
        elif self.expert is not None and config.n_routed_experts is not None:
            own = self.expert.share(config.n_routed_experts, "n_routed_experts")
            parts.append(f"experts {own.start}-{own.stop - 1} of {config.n_routed_experts}")
        if self.tensor is not None:
            for field, word in (("num_attention_heads", "heads"), ("vocab_size", "vocabulary")):
                own = self.tensor.share(getattr(config, field), field)
                parts.append(f"{word} {own.start}-{own.stop - 1} of {getattr(config, field)}")
        return ", ".join(parts) or "all"

    @property
    def token_processes(self) -> int:
        """How many sets of processes have tokens of their own: those of ``data`` and ``expert``."""
        return _size(self.data) * _size(self.expert)

    @property
    def token_rank(self) -> int:
        """Which of them this process is in."""
        return _rank(self.data) * _size(self.expert) + _rank(self.expert)


def axes_of(mesh: DeviceMesh) -> Axes:
    """The axes of a mesh whose names were checked."""
    assert mesh.mesh_dim_names is not None
    found: dict[str, Any] = {}
    for dim, name in enumerate(mesh.mesh_dim_names):
        if mesh.size(dim) > 1:
            found[name] = Axis(name, mesh.get_group(name).group_name, mesh.size(dim), mesh.get_local_rank(name))
    return Axes(**found, rank=dist.get_rank(), size=mesh.size())


def expert_groups(mesh: DeviceMesh) -> torch.Tensor:
    """Ranks ``[axes of experts, processes of each]``."""
    names = mesh.mesh_dim_names
    assert names is not None
    return mesh.mesh.movedim(names.index("expert"), -1).reshape(-1, mesh.size(names.index("expert")))


@made_once
def tokens_axis(mesh: DeviceMesh, axes: Axes) -> Axis | None:
    """The processes with tokens of their own as one axis, in the order of their ranks.

    Where a mesh has both axes this makes process groups, which all processes must do at the same time.
    """
    if axes.data is None or axes.expert is None:
        axis = axes.data or axes.expert
        # gradients do not travel in the group that tokens have for themselves
        return None if axis is None else replace(axis, group=mesh.get_group(axis.name).group_name)
    names = mesh.mesh_dim_names
    assert names is not None
    ranks = mesh.mesh.permute(*(names.index(name) for name in AXES if name in names))
    # tensor, data and expert
    ranks = ranks.movedim(1, 0) if "tensor" in names else ranks.unsqueeze(0)
    return _own_group("data x expert", axes.rank, ranks.flatten(1))


@made_once
def expert_apart(mesh: DeviceMesh, axes: Axes, settings: Settings = dict) -> Axes:
    """The same axes, with a process group of its own for ``expert`` beside that of the mesh.

    This makes process groups, which all processes must do at the same time; ``settings``: of each.
    """
    if axes.expert is None:
        return axes
    return replace(axes, expert=_own_group("expert", axes.rank, expert_groups(mesh), settings))


@made_once
def by_node(mesh: DeviceMesh, axes: Axes, ranks_per_node: int, settings: Settings = dict) -> Axes:
    """The same axes, with ``nodes``: of so many processes of ``expert`` each, in order.

    This makes process groups, which all processes must do at the same time; ``settings``: of each.

    Raises:
        ValueError: nodes do not come out even.
    """
    if axes.expert is None:
        return axes
    if axes.expert.size % ranks_per_node:
        raise ValueError(
            f"parallel: want ranks_per_node that divides the {axes.expert.size} processes of axis 'expert', got "
            f"{ranks_per_node}"
        )
    # [axes of experts, nodes, processes of a node]
    ranks = expert_groups(mesh).unflatten(1, (-1, ranks_per_node))
    across = _own_group("nodes of expert", axes.rank, ranks.movedim(1, -1).flatten(0, 1), settings)
    within = _own_group("expert in a node", axes.rank, ranks.flatten(0, 1), settings)
    return replace(axes, nodes=(across, within))


def _own_group(name: str, rank: int, groups: torch.Tensor, settings: Settings = dict) -> Axis:
    """Make a process group of each row of ranks; the one with ``rank``."""
    mine = None
    for row in groups.tolist():
        # a group numbers its processes by their ranks, however they are listed
        together = sorted(row)
        group = dist.new_group(together, **settings())
        if rank in together:
            assert isinstance(group, dist.ProcessGroup)
            mine = Axis(name, group.group_name, len(together), together.index(rank))
    assert mine is not None
    return mine


def holders(mesh: torch.Tensor, names: tuple[str, ...]) -> dict[tuple[int, int], int]:
    """``(place on tensor, place on expert)`` -> the rank that has these parts, of those that have the same the first."""
    sizes = {name: mesh.shape[names.index(name)] if name in names else 1 for name in AXES}
    found = {}
    for t, e in product(range(sizes["tensor"]), range(sizes["expert"])):
        at = {"data": 0, "tensor": t, "expert": e}
        found[t, e] = int(mesh[tuple(at[name] for name in names)])
    return found


def _size(axis: Axis | None) -> int:
    return 1 if axis is None else axis.size


def _rank(axis: Axis | None) -> int:
    return 0 if axis is None else axis.rank
