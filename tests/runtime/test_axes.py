"""Which processes belong together, as each of them sees it; a fake process group answers for the others."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepfuse.ir.private import process_group
from deepfuse.runtime.axes import Axes, axes_of, by_node, expert_apart, tokens_axis
from deepfuse.runtime.process_group import device_mesh

SIZES = {"data": 2, "tensor": 2, "expert": 4}


def as_rank(rank, names):
    """Axes of one of 16 processes, with nodes of two; those with tokens of their own; the experts' again."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=16)
    try:
        mesh = init_device_mesh("cpu", tuple(SIZES[name] for name in names), mesh_dim_names=names)
        axes = by_node(mesh, axes_of(mesh), 2)
        found = (*axes.nodes, tokens_axis(mesh, axes), expert_apart(mesh, axes).expert)
        return axes, [(axis, dist.get_process_group_ranks(process_group(axis.group))) for axis in found]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("names", [("data", "tensor", "expert"), ("expert", "tensor", "data")])
def test_every_process_is_in_the_groups_that_its_place_in_the_mesh_says(names):
    strides = {name: 1 for name in names}
    for left, right in ((1, 2), (0, 1)):
        strides[names[left]] = strides[names[right]] * SIZES[names[right]]
    for rank in range(16):
        axes, groups = as_rank(rank, names)
        at = {name: rank // strides[name] % SIZES[name] for name in names}
        assert axes.expert.rank == at["expert"]

        def ranks(at=at, **moved):
            return sum({**at, **moved}[name] * strides[name] for name in names)

        node, place = divmod(at["expert"], 2)
        across = [ranks(expert=2 * n + place) for n in range(2)]
        within = [ranks(expert=2 * node + p) for p in range(2)]
        together = sorted(ranks(data=d, expert=e) for d in range(2) for e in range(4))
        experts = sorted(ranks(expert=e) for e in range(4))
        for (axis, found), want in zip(groups, (across, within, together, experts), strict=True):
            assert found == want and (axis.size, axis.rank) == (len(want), want.index(rank)), axis.name
        assert [axis.rank for axis, _ in groups[:2]] == [node, place]
        assert len(axes.groups) == 5 and "expert 4 on 2 nodes" in str(axes)


def test_groups_are_made_once_for_as_long_as_processes_know_each_other():
    def mesh_and_groups():
        mesh = device_mesh({"data": 2, "expert": 4}, torch.device("cpu"), 5)
        axes = axes_of(mesh)
        return mesh, (axes, by_node(mesh, axes, 2), tokens_axis(mesh, axes))

    worlds = []
    for rank in (0, 5):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
        try:
            (mesh, groups), (again, same) = mesh_and_groups(), mesh_and_groups()
            assert mesh is again and groups == same
            assert by_node(mesh, groups[0], 4) != groups[1]
            worlds.append(groups)
        finally:
            dist.destroy_process_group()
    assert [axes.rank for axes, *_ in worlds] == [0, 5]


def test_nodes_that_do_not_come_out_even_are_refused():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("expert",))
        with pytest.raises(
            ValueError, match="want ranks_per_node that divides the 4 processes of axis 'expert', got 3"
        ):
            by_node(mesh, axes_of(mesh), 3)
        alone = replace(axes_of(mesh), expert=None)
        assert by_node(mesh, alone, 3) == alone and Axes().groups == {}
    finally:
        dist.destroy_process_group()
