"""The link that the cost model is told of."""

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepfuse.blocks.parallel import Parallel
from deepfuse.ir.device import CPU, H100
from deepfuse.ir.link import INFINIBAND_400, LOOPBACK, NVLINK_H100, ROCE_200
from deepfuse.runtime.axes import axes_of
from deepfuse.runtime.expert_link import expert_link
from deepfuse.runtime.processes import Processes


@pytest.fixture(scope="module", autouse=True)
def world():
    """Sixteen processes, of which there is one."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    yield
    dist.destroy_process_group()


def processes(sizes=(("expert", 16),), **settings):
    names, each = zip(*sizes, strict=True)
    mesh = init_device_mesh("cpu", each, mesh_dim_names=names)
    return Processes(mesh=mesh, axes=axes_of(mesh), parallel=Parallel(**settings))


@pytest.mark.parametrize(
    ("sizes", "each", "link"),
    [
        ({"expert": 16}, 8, INFINIBAND_400),
        ({"expert": 16}, 16, NVLINK_H100),
        ({"data": 2, "expert": 8}, 8, NVLINK_H100),
        # ranks 0, 2, ... 14
        ({"expert": 8, "tensor": 2}, 8, INFINIBAND_400),
        ({"tensor": 2, "expert": 8}, 8, NVLINK_H100),
        # 0 to 3 are on one machine, 4 to 7 on two: the second decides for all
        ({"data": 4, "expert": 4}, 6, INFINIBAND_400),
    ],
)
def test_experts_of_one_machine_have_nvlink(sizes, each, link, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(each))
    assert expert_link(processes(tuple(sizes.items())), H100) is link


def test_the_link_is_the_named_one_or_the_usual():
    assert expert_link(Processes(), CPU) is None
    assert expert_link(processes(), CPU) is LOOPBACK
    assert expert_link(processes(link=ROCE_200), H100) is ROCE_200
    assert expert_link(processes(link=ROCE_200, overlap="none"), H100) is None, "nothing is to be hidden"


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match=r"want overlap out of \['auto', 'none', 'shared', 'halves'\], got 'all'"):
        Parallel(overlap="all").check()
    with pytest.raises(ValueError, match="want overlap 'auto' with chunks = 2, got 'halves'"):
        Parallel(chunks=2, overlap="halves").check()
