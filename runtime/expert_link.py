"""What carries tokens between the processes of the expert axis, for the cost model."""

import torch

from deepfuse.ir.device import Device
from deepfuse.ir.link import INFINIBAND_400, LOOPBACK, NVLINK_B200, NVLINK_H100, Link
from deepfuse.runtime.processes import Processes


def expert_link(processes: Processes, device: Device) -> Link | None:
    """The link that ``Parallel(link=...)`` names, else the usual one; ``None`` where nothing travels, or is to be hidden.

    Processes of one machine are taken to have NVLink, others InfiniBand at 400 Gbit/s; CPUs, the loopback.

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
    if axis.size > torch.cuda.device_count():
        return INFINIBAND_400
    return NVLINK_B200 if device.name == "B200" else NVLINK_H100
