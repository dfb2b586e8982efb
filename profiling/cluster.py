"""A cluster as rows of numbers, and what its ranks' exchange of tokens takes.

Rows of GPUs and links are what vendors state; kernels reach less. Factors say how much, all from published
microbenchmarks on H800 and H100, none from a whole model: products 0.67 of dense peak (FlashMLA: 660 of 989 TFLOP/s), memory
0.9 (FlashMLA: 3.0 of 3.35 TB/s), links 0.8 (DeepSeek-V3, arXiv:2412.19437, section 3.2.2: 160 of 200 GB/s of NVLink;
arXiv:2505.09343: 40 of 50 GB/s of InfiniBand), attention as in ``ATTENTION``. Arithmetic and memory time of an op add up, but
for attention, which streams its cache beside its products (:func:`Cluster.seconds`). Measured rows
(:func:`deepfuse.profiling.calibration.calibrated`) are taken as they are.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

import torch

from deepfuse.blocks.config import Config
from deepfuse.ir.cost import Cost
from deepfuse.ir.device import Device
from deepfuse.ir.link import Link, all_reduce_seconds

ARITHMETIC, MEMORY, LINK = 0.67, 0.9, 0.8
ATTENTION = {"mla_attention": 0.58, "mla_attention_backward": 0.45}
"""Shares of dense peak where they are not ``ARITHMETIC``, causal over 4096 tokens on an H100: heads of 192 and 128 with
FlashAttention-4, 572 TFLOP/s (mlc-ai/pith-train, pull request 3); the gradient of heads of 128 with FlashAttention-3, 2.06
TFLOP in 4.64 ms (meta-pytorch/tritonbench, pull request 1267)."""
STREAMING = "mla_"
"""What the names of such ops begin with that read memory while they compute: their loops are long."""
PRODUCTS = re.compile("linear|mm|matmul")
"""In the names of ops that are matrix products."""
BUSY_SMS = 20 / 132
"""Share of a GPU that an exchange holds while it runs beside computation (DeepSeek-V3, section 3.2.2); in decode the network
adapters do it alone (DeepEP's low-latency kernels)."""
Exchange = Literal["direct", "node_limited"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Nodes of equal GPUs; rates are those that programs reach.

    Attributes:
        nvlink: between the GPUs of a node.
        network: between nodes, for each GPU.
        product_bandwidth: bytes a second that operands and results of products move at; ``None``: as all other bytes. On a CPU
            products of few rows read their weights slower than a loop would.
        gradient_bandwidth: likewise, in the products of a backward pass, whose weights the forward pass may have left in caches;
            ``None``: ``product_bandwidth``.
        exchange_share: of a device, that an exchange takes from what runs beside it; ``None``: ``BUSY_SMS`` of a GPU outside
            of decode, else nothing.
        exchange_latency: seconds that a message takes longer where something is computed beside it: on a CPU whose threads
            all compute, those that send and receive wait for their turn.
    """

    device: Device
    gpus_per_node: int
    nvlink: Link
    network: Link
    product_bandwidth: float | None = None
    gradient_bandwidth: float | None = None
    exchange_share: float | None = None
    exchange_latency: float = 0.0

    def __post_init__(self) -> None:
        if self.gpus_per_node < 1:
            raise ValueError(f"cluster: want gpus_per_node >= 1, got {self.gpus_per_node}")

    def seconds(
        self, op: str, cost: Cost, dtype: torch.dtype, launches: float = 1.0, *, backward: bool = False
    ) -> float:
        """Of one op, of a backward pass or another: its arithmetic and its bytes, and its launches.

        The two add up: a product's kernel has little to compute while it loads its first and stores its last tiles. Of the
        28 FP8 products of DeepGEMM's first README (H800), the sum is 8% above the published times on average, and the larger of
        the two 22% below. Attention takes the larger of both, as FlashMLA publishes it.
        """
        if dtype not in self.device.flops:
            raise ValueError(f"{self.device.name}: want a rate for {dtype}, got those of {list(self.device.flops)}")
        share = ATTENTION.get(op, ARITHMETIC) / ARITHMETIC if self.device.kind == "cuda" else 1.0
        arithmetic = cost.flops / (share * self.device.flops[dtype])
        bandwidth = self.device.memory_bandwidth
        if PRODUCTS.search(op):
            bandwidth = (backward and self.gradient_bandwidth) or self.product_bandwidth or bandwidth
        memory = cost.bytes / bandwidth
        busy = max(arithmetic, memory) if op.startswith(STREAMING) else arithmetic + memory
        return launches * self.device.launch_seconds + busy

    def busy(self, *, decode: bool) -> float:
        """Share of a device that an exchange takes from what runs beside it."""
        if self.exchange_share is not None:
            return self.exchange_share
        return BUSY_SMS if self.device.kind == "cuda" and not decode else 0.0

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
