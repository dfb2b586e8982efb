"""Measured rates in the place of a cluster's: the JSON that ``deepfuse simulate --calibration`` takes.

    {"device": {"flops": {"float32": FLOP/s, ...}, "memory_bandwidth": bytes/s, "launch_seconds": s, "memory_bytes": bytes},
     "products": {"bandwidth": bytes/s that operands and results of products move at,
                  "gradient_bandwidth": likewise in a backward pass},
     "nvlink": {"bandwidth": bytes/s, "latency": s},
     "network": {"bandwidth": bytes/s, "latency": s},
     "exchange": {"share": of a device that an exchange takes from what runs beside it, "latency": s that a message then takes more}}

What it leaves out stays. ``benchmarks/calibrate.py`` measures one of two processes over a link.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deepfuse.profiling.cluster import Cluster

LINK = ("bandwidth", "latency")
KEYS = {
    "device": ("flops", "memory_bandwidth", "launch_seconds", "memory_bytes"),
    "products": ("bandwidth", "gradient_bandwidth"),
    "nvlink": LINK,
    "network": LINK,
    "exchange": ("share", "latency"),
}
RANGES = {"latency": ">= 0", "launch_seconds": ">= 0", "share": "of 0 to below 1"}
"""Of what need not be above 0."""


def calibrated(cluster: Cluster, path: Path) -> Cluster:
    """The cluster with what a file of microbenchmarks says of it, taken as it is.

    Raises:
        ValueError: no file, no JSON, an entry that nobody reads, or one that is no such number.
    """
    parts = {part: _entries(path, part, rows) for part, rows in _read(path).items()}
    device, products, exchange = (parts.get(name, {}) for name in ("device", "products", "exchange"))
    if "flops" in device:
        device["flops"] = {**cluster.device.flops, **device["flops"]}
    return replace(
        cluster,
        device=replace(cluster.device, **device),
        nvlink=replace(cluster.nvlink, **parts.get("nvlink", {})),
        network=replace(cluster.network, **parts.get("network", {})),
        product_bandwidth=products.get("bandwidth", cluster.product_bandwidth),
        gradient_bandwidth=products.get("gradient_bandwidth", cluster.gradient_bandwidth),
        exchange_share=exchange.get("share", cluster.exchange_share),
        exchange_latency=exchange.get("latency", cluster.exchange_latency),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise _error(path, "a file of measured rates", error.strerror or str(error)) from None
    except (ValueError, RecursionError) as error:
        raise _error(path, "JSON of measured rates", str(error)) from None
    if not isinstance(data, dict):
        raise _error(path, f"JSON with {', '.join(KEYS)}", type(data).__name__)
    return data


def _entries(path: Path, part: str, rows: Any) -> dict[str, Any]:
    if part not in KEYS:
        raise _error(path, f"parts out of {', '.join(KEYS)}", repr(part))
    if not isinstance(rows, dict):
        raise _error(path, f"{part} with {', '.join(KEYS[part])}", repr(rows))
    for key in rows:
        if key not in KEYS[part]:
            raise _error(path, f"entries of {part} out of {', '.join(KEYS[part])}", repr(key))
    found: dict[str, Any] = {
        key: _number(path, f"{part}.{key}", value) for key, value in rows.items() if key != "flops"
    }
    if "flops" in rows:
        found["flops"] = _flops(path, rows["flops"])
    return found


def _flops(path: Path, rates: Any) -> dict[torch.dtype, float]:
    if not isinstance(rates, dict):
        raise _error(path, "device.flops with a rate for each dtype", repr(rates))
    found = {}
    for name, rate in rates.items():
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise _error(path, "device.flops of torch's dtypes, as float32", repr(name))
        found[dtype] = _number(path, f"device.flops.{name}", rate)
    return found


def _number(path: Path, name: str, value: Any) -> float:
    kind = RANGES.get(name.rpartition(".")[2], "> 0")
    # true is a number in Python
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
        not number
        or not (0 < value or (value == 0 and kind != "> 0"))
        or not value < (1 if "below 1" in kind else math.inf)
    ):
        raise _error(path, f"a finite {name} {kind}", repr(value))
    return float(value)


def _error(path: Path, want: str, got: str) -> ValueError:
    return ValueError(f"calibration {path}: want {want}, got {got}")
