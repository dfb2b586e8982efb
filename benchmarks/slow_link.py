"""Two ranks in network namespaces of their own, and one link of a chosen rate between them: needs root, ``ip`` and ``tc``.

    rank 0 --> in --tbf--> out --> rank 1        what rank 0 sends
    rank 1 --> in --tbf--> out --> rank 0        what rank 1 sends, through the same bucket

Both directions share the rate, and little of a message fits into a rank's socket: else the queue before the bucket would
hold all of it, what goes the other way would wait behind that with its acknowledgements, and an all-to-all would be there on
one rank in half the time that it takes on the other, by chance.
"""

import os
import shutil
import subprocess
from typing import Self

RANKS = 2
MTU = "16000"
BURST, SMALL_BURST = "128kb", "32kb"
"""What the bucket holds, and lets pass at once. A small one makes times grow with bytes from the first on, and has its timer
take more of the processors."""
IN, OUT = "deepfuse-in", "deepfuse-out"


def missing() -> str:
    """Why there can be no such link here; empty where there can."""
    if os.geteuid() != 0:
        return "needs root"
    tools = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"needs {' and '.join(tools)} of iproute2" if tools else ""


class SlowLink:
    """Namespaces and the link, while it is entered.

    Args:
        rate: bytes a second, of both directions together.
    """

    def __init__(self, rate: float):
        self.rate = rate

    def __enter__(self) -> Self:
        self._remove()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *args: object) -> None:
        self._remove()

    def command(self, rank: int) -> list[str]:
        """What stands before a rank's command."""
        return ["ip", "netns", "exec", _namespace(rank)]

    def environment(self, rank: int) -> dict[str, str]:
        """What a rank's Gloo needs to know."""
        return {"GLOO_SOCKET_IFNAME": f"from{rank}", "MASTER_ADDR": _address(0)}

    def _make(self) -> None:
        for namespace in (IN, OUT, *map(_namespace, range(RANKS))):
            _run("ip", "netns", "add", namespace)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
            # answers come another way than questions go
            _write(namespace, "conf/all/rp_filter", "0")
            _write(namespace, "conf/default/rp_filter", "0")
            _write(namespace, "tcp_wmem", "4096 262144 262144")
            _write(namespace, "tcp_slow_start_after_idle", "0")
        for namespace in (IN, OUT):
            _write(namespace, "conf/all/forwarding", "1")
        _pair(IN, "shared", "10.79.0.1", OUT, "shared", "10.79.0.2")
        _run("ip", "-n", IN, "route", "add", "10.78.0.0/24", "via", "10.79.0.2")
        for rank in range(RANKS):
            own, to, back = _namespace(rank), f"10.79.{rank + 1}", f"10.79.{rank + 11}"
            _pair(own, f"to{rank}", f"{to}.1", IN, f"to{rank}", f"{to}.2")
            _pair(own, f"from{rank}", f"{back}.1", OUT, f"from{rank}", f"{back}.2")
            _run("ip", "-n", own, "addr", "del", f"{back}.1/30", "dev", f"from{rank}")
            # the first address of an interface is the one that Gloo takes
            _run("ip", "-n", own, "addr", "add", f"{_address(rank)}/32", "dev", f"from{rank}")
            _run("ip", "-n", own, "addr", "add", f"{back}.1/30", "dev", f"from{rank}")
            _run("ip", "-n", own, "route", "add", "10.78.0.0/24", "via", f"{to}.2", "src", _address(rank))
            _run("ip", "-n", OUT, "route", "add", _address(rank), "via", f"{back}.1")
        _run("tc", "-n", IN, "qdisc", "add", *_bucket(self.rate))

    def _remove(self) -> None:
        for namespace in (IN, OUT, *map(_namespace, range(RANKS))):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def set_rate(rate: float, burst: str = BURST) -> None:
    """Give the link that is there another rate, in bytes a second; also from within a namespace of a rank."""
    _run("tc", "-n", IN, "qdisc", "change", *_bucket(rate, burst))


def _bucket(rate: float, burst: str = BURST) -> tuple[str, ...]:
    size = ("rate", f"{int(8 * rate)}bit", "burst", burst, "latency", "400ms")
    return ("dev", "shared", "root", "tbf", *size)


def _namespace(rank: int) -> str:
    return f"deepfuse-{rank}"


def _address(rank: int) -> str:
    return f"10.78.0.{rank + 1}"


def _pair(a: str, name: str, address: str, b: str, other: str, far: str) -> None:
    """A cable between two namespaces, with an address at each end."""
    # few large packets: what they cost the processor is no part of what is measured
    far_end = ("peer", "name", other, "mtu", MTU, "netns", b)
    _run("ip", "-n", a, "link", "add", name, "mtu", MTU, "type", "veth", *far_end)
    for namespace, end, at in ((a, name, address), (b, other, far)):
        _run("ip", "-n", namespace, "addr", "add", f"{at}/30", "dev", end)
        _run("ip", "-n", namespace, "link", "set", end, "up")
        _write(namespace, f"conf/{end}/rp_filter", "0")


def _write(namespace: str, key: str, value: str) -> None:
    _run("ip", "netns", "exec", namespace, "sh", "-c", f"echo {value} > /proc/sys/net/ipv4/{key}")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"slow link: want `{' '.join(command)}` to work, got: {done.stderr.strip()}")
