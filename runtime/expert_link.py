"""What carries tokens between the processes of the expert axis, for the cost model."""

import os

import torch

from deepfuse.ir.device import Device
from deepfuse.ir.link import INFINIBAND_400, LOOPBACK, NVLINK_B200, NVLINK_H100, Link
from deepfuse.runtime.axes import expert_groups
from deepfuse.runtime.processes import Processes


def expert_link(processes: Processes, device: Device) -> Link | None:
    """The link that ``Parallel(link=...)`` names, else the usual one; ``None`` where nothing travels, or is to be hidden.

    Processes of one machine are taken to have NVLink, others InfiniBand at 400 Gbit/s; CPUs, the loopback. A machine has as many
    as torchrun says, or one for each GPU; all come to the same, as each looks at every axis of experts in the mesh.

    Args:
        device: the row of what computes.
    """
    axis, parallel = processes.axes.expert, processes.parallel
    if axis is None or parallel.overlap == "none":
        return None
    if parallel.link is not None:
        return parallel.link
    if device.kind == "cpu":
        return LOOPBACK
    assert processes.mesh is not None
    machines = expert_groups(processes.mesh) // int(
        os.environ.get("LOCAL_WORLD_SIZE") or torch.cuda.device_count() or 1
    )
    if not torch.equal(machines, machines[:, :1].expand_as(machines)):
        return INFINIBAND_400
    return NVLINK_B200 if device.name == "B200" else NVLINK_H100
