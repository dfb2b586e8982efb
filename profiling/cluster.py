"""A cluster as rows of numbers, and what its ranks' exchange of tokens takes.

Rows of GPUs and links are what vendors state; kernels reach less. Three factors say how much, all from published
microbenchmarks on H800, none from a whole model: products 0.67 of dense peak (FlashMLA: 660 of 989 TFLOP/s; DeepGEMM
reaches 0.5 to 0.78), memory 0.9 (FlashMLA: 3.0 of 3.35 TB/s), links 0.8 (DeepSeek-V3, arXiv:2412.19437, section 3.2.2: 160
of 200 GB/s of NVLink; arXiv:2505.09343: 40 of 50 GB/s of InfiniBand). Measured rows (:func:`calibrated`) are taken as they are.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from deepfuse.blocks.config import Config
from deepfuse.ir.cost import Cost
from deepfuse.ir.device import Device
from deepfuse.ir.link import Link, all_reduce_seconds

ARITHMETIC, MEMORY, LINK = 0.67, 0.9, 0.8
Exchange = Literal["direct", "node_limited"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Nodes of equal GPUs; rates are those that programs reach.

    Attributes:
        nvlink: between the GPUs of a node.
        network: between nodes, for each GPU.
    """

    device: Device
    gpus_per_node: int
    nvlink: Link
    network: Link

    def __post_init__(self) -> None:
        if self.gpus_per_node < 1:
            raise ValueError(f"cluster: want gpus_per_node >= 1, got {self.gpus_per_node}")

    def seconds(self, cost: Cost, dtype: torch.dtype) -> float:
        """Of one op: its bound, and its launch."""
        if dtype not in self.device.flops:
            raise ValueError(f"{self.device.name}: want a rate for {dtype}, got those of {list(self.device.flops)}")
        return self.device.launch_seconds + self.device.seconds(cost, dtype)

    def all_reduce(self, size: float, ranks: int) -> float:
        """Over ranks that fill nodes: within each node, over the network with what a GPU then has, and back."""
        near = min(ranks, self.gpus_per_node)
        far = math.ceil(ranks / near)
        return all_reduce_seconds(self.nvlink, size, near) + all_reduce_seconds(self.network, size / near, far)

    def exchange(
        self, config: Config, tokens: float, row_bytes: int, ranks: int, how: Exchange, gpus_per_rank: int = 1
    ) -> float:
        """Dispatch, or combine: each of the ``ranks`` has so many tokens for experts that are spread over all.

        ``direct``: a row for each expert of a token, to the rank that has it (low latency). ``node_limited``: one for each
        node, to the GPU of the sender's place, which forwards one to each rank there (DeepSeek-V3, section 3.2.2). NVLink
        and network work at the same time.
        """
        near = min(ranks, max(self.gpus_per_node // gpus_per_rank, 1))
        nodes = ranks / near
        if how == "direct":
            within = config.num_experts_per_tok * (near - 1) / ranks
            between = config.num_experts_per_tok * (ranks - near) / ranks
            latency = max(self.nvlink.latency * (near > 1), self.network.latency * (nodes > 1))
        else:
            within = places(config, ranks) * (near - 1) / near
            between = places(config, nodes) * (nodes - 1) / nodes
            latency = self.nvlink.latency * (near > 1) + self.network.latency * (nodes > 1)
        size = tokens * row_bytes
        return latency + max(within * size / self.nvlink.bandwidth, between * size / self.network.bandwidth)


def places(config: Config, parts: float) -> float:
    """How many of so many equal parts of the experts a token goes to on average; every choice is as likely as any.

    The groups that are kept are a draw of ``topk_group`` out of ``n_group``, the experts one of ``num_experts_per_tok``
    out of the kept groups'.
    """
    assert config.n_routed_experts is not None
    K, groups, kept = config.num_experts_per_tok, config.n_group, config.topk_group
    of_group = config.n_routed_experts / groups
    part = config.n_routed_experts / parts
    if part <= of_group:
        return parts * kept / groups * (1 - _none_of(part, kept * of_group, K))
    own = min(round(part / of_group), groups)
    here = range(max(0, kept - (groups - own)), min(own, kept) + 1)
    total = math.comb(groups, kept)
    draws = (math.comb(own, k) * math.comb(groups - own, kept - k) / total for k in here)
    hit = sum(p * (1 - _none_of(k * of_group, kept * of_group, K)) for p, k in zip(draws, here, strict=True))
    return parts * hit


def _none_of(part: float, all_: float, draws: int) -> float:
    """Chance that of so many draws without replacement none is of the part."""
    return math.prod(max(all_ - part - i, 0.0) / (all_ - i) for i in range(draws))


def sustained(device: Device) -> Device:
    """What kernels reach of a GPU's row; a nominal row of a CPU is one already."""
    if device.kind != "cuda":
        return device
    flops = {dtype: ARITHMETIC * rate for dtype, rate in device.flops.items()}
    return replace(device, flops=flops, memory_bandwidth=MEMORY * device.memory_bandwidth)


def sustained_link(link: Link) -> Link:
    return replace(link, bandwidth=LINK * link.bandwidth)


def calibrated(cluster: Cluster, path: Path) -> Cluster:
    """The cluster with what a file of microbenchmarks says of it.

    The file is JSON: ``{"device": {"flops": {"float32": FLOP/s, ...}, "memory_bandwidth": bytes/s, "launch_seconds": s},
    "nvlink": {"bandwidth": bytes/s, "latency": s}, "network": {...}}``; what it leaves out stays.

    Raises:
        ValueError: it is no such file.
    """
    known = {
        "device": {"flops", "memory_bandwidth", "launch_seconds", "memory_bytes"},
        "nvlink": {"bandwidth", "latency"},
        "network": {"bandwidth", "latency"},
    }
    try:
        data: dict[str, dict[str, Any]] = json.loads(path.read_text())
        wrong = [f"{part}.{key}" for part, rows in data.items() for key in rows if key not in known.get(part, ())]
        wrong += [part for part in data if part not in known]
        numbers = [
            n for rows in data.values() for v in rows.values() for n in (v.values() if isinstance(v, dict) else [v])
        ]
        wrong += [repr(n) for n in numbers if not (isinstance(n, int | float) and 0 < n < math.inf)]
        if wrong:
            raise ValueError(", ".join(wrong))
        device = dict(data.get("device", {}))
        if "flops" in device:
            rates = {getattr(torch, name): rate for name, rate in device["flops"].items()}
            device["flops"] = {**cluster.device.flops, **rates}
        return replace(
            cluster,
            device=replace(cluster.device, **device),
            nvlink=replace(cluster.nvlink, **data.get("nvlink", {})),
            network=replace(cluster.network, **data.get("network", {})),
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        want = "; ".join(f"{part}: {', '.join(sorted(keys))}" for part, keys in known.items())
        raise ValueError(f"calibration {path}: want JSON of positive numbers with {want}, got {error}") from None
