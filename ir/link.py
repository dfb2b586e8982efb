"""Links between ranks as rows of numbers, and what collectives over one link take.

A message takes ``latency + bytes / bandwidth`` (Hockney 1994). All-to-alls send to all peers at once; the others go around
a ring (Thakur et al. 2005, sections 4.1 and 4.5), so that all of them are bandwidth-optimal, and small ones pay for their
steps. Bandwidths are the vendors', one way, as devices have them: H100 and HGX B200 datasheets (2024, where both ways are
summed), adapters at their line rate. NVLink of H800 and all latencies (64 bytes, end to end, through one leaf switch):
Zhao et al., Insights into DeepSeek-V3 (arXiv:2505.09343), section 4.3 and table 5. That of loopback is nominal.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What connects a rank with its peers.

    Attributes:
        bandwidth: bytes a second and rank, one way.
        latency: seconds until the first byte of a message is there.
        share: of a device, that a message on its way takes from what is computed beside it: of a CPU, which copies it itself.

    Raises:
        ValueError: a bandwidth that is not positive, a latency that is negative, or a share that leaves nothing.
    """

    name: str
    bandwidth: float
    latency: float
    share: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.bandwidth < math.inf and 0 <= self.latency < math.inf):
            raise ValueError(
                f"link {self.name}: want a bandwidth > 0 in bytes/s and a latency >= 0 in s, both finite, got "
                f"{self.bandwidth} and {self.latency}"
            )
        if not 0 <= self.share < 1:
            raise ValueError(f"link {self.name}: want a share of the device >= 0 and below 1, got {self.share}")

    def seconds(self, size: float) -> float:
        """Of one message of ``size`` bytes."""
        return self.latency + size / self.bandwidth


NVLINK_H100 = Link(name="NVLink H100", bandwidth=450e9, latency=3.33e-6)
NVLINK_H800 = Link(name="NVLink H800", bandwidth=200e9, latency=3.33e-6)
NVLINK_B200 = Link(name="NVLink B200", bandwidth=900e9, latency=3.33e-6)
INFINIBAND_400 = Link(name="InfiniBand 400", bandwidth=50e9, latency=2.8e-6)
INFINIBAND_800 = Link(name="InfiniBand 800", bandwidth=100e9, latency=2.8e-6)
ROCE_200 = Link(name="RoCE 200", bandwidth=25e9, latency=3.6e-6)
ROCE_400 = Link(name="RoCE 400", bandwidth=50e9, latency=3.6e-6)
LOOPBACK = Link(name="loopback", bandwidth=2e9, latency=50e-6)
LINKS: Mapping[str, Link] = {
    link.name: link
    for link in (
        NVLINK_H100,
        NVLINK_H800,
        NVLINK_B200,
        INFINIBAND_400,
        INFINIBAND_800,
        ROCE_200,
        ROCE_400,
        LOOPBACK,
    )
}


def all_to_all_seconds(link: Link, size: float, ranks: int) -> float:
    """Each rank has ``size`` bytes, an equal share for every rank; its own does not travel."""
    return _travels(link, size, ranks, messages=1)


def all_to_allv_seconds(link: Link, sizes: Sequence[Sequence[float]]) -> float:
    """``sizes[i][j]`` bytes go from rank i to rank j; the rank with the most to send or to receive decides.

    Raises:
        ValueError: ``sizes`` is no square.
    """
    ranks = range(len(sizes))
    if any(len(row) != len(sizes) for row in sizes):
        raise ValueError(f"all-to-all: want sizes[i][j] of {len(sizes)} ranks, got rows of {[len(r) for r in sizes]}")
    sent = [sum(sizes[i][j] for j in ranks if j != i) for i in ranks]
    received = [sum(sizes[i][j] for i in ranks if i != j) for j in ranks]
    busiest = max([0.0, *sent, *received])
    return link.seconds(busiest) if len(sizes) > 1 else 0.0


def all_gather_seconds(link: Link, size: float, ranks: int) -> float:
    """``size``: bytes that every rank has in the end, an equal share of them from each."""
    return _travels(link, size, ranks, messages=ranks - 1)


def reduce_scatter_seconds(link: Link, size: float, ranks: int) -> float:
    """``size``: bytes that every rank brings, and of whose sum it keeps an equal share."""
    return _travels(link, size, ranks, messages=ranks - 1)


def all_reduce_seconds(link: Link, size: float, ranks: int) -> float:
    """``size``: bytes that every rank brings; the sum is scattered, and gathered."""
    return reduce_scatter_seconds(link, size, ranks) + all_gather_seconds(link, size, ranks)


def _travels(link: Link, size: float, ranks: int, messages: int) -> float:
    """All but a rank's own share, in messages one after the other."""
    if ranks < 1 or size < 0:
        raise ValueError(f"collective: want ranks >= 1 and bytes >= 0, got {ranks} and {size}")
    return 0.0 if ranks == 1 else messages * link.latency + size * (ranks - 1) / ranks / link.bandwidth
