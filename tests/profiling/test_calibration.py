"""Measured rates take the place of a cluster's; what is no such file is refused, with the entry that is wrong."""

import json
import re
from pathlib import Path

import pytest
import torch

from deepfuse.ir.device import H800
from deepfuse.ir.link import INFINIBAND_400, NVLINK_H800
from deepfuse.profiling.calibration import calibrated
from deepfuse.profiling.cluster import Cluster

CLUSTER = Cluster(device=H800, gpus_per_node=8, nvlink=NVLINK_H800, network=INFINIBAND_400)


def test_measured_rates_are_taken_as_they_are(tmp_path: Path) -> None:
    rates = {
        "device": {"flops": {"float32": 3e10}, "launch_seconds": 0},
        "network": {"bandwidth": 1e8, "latency": 1e-4},
        "products": {"bandwidth": 7e9, "gradient_bandwidth": 9e9},
        "exchange": {"share": 0.05, "latency": 3e-3},
    }
    (tmp_path / "rates.json").write_text(json.dumps(rates))
    found = calibrated(CLUSTER, tmp_path / "rates.json")
    assert found.device.flops[torch.float32] == 3e10 and found.device.launch_seconds == 0
    assert found.device.flops[torch.bfloat16] == H800.flops[torch.bfloat16]
    assert (found.network.bandwidth, found.network.latency) == (1e8, 1e-4)
    assert found.nvlink == NVLINK_H800 and (found.exchange_share, found.exchange_latency) == (0.05, 3e-3)
    assert (found.product_bandwidth, found.gradient_bandwidth) == (7e9, 9e9)


def test_a_file_that_says_nothing_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text("{}")
    assert calibrated(CLUSTER, tmp_path / "rates.json") == CLUSTER


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "want JSON of measured rates, got Expecting property name"),
        ("\udcff", "want JSON of measured rates, got 'utf-8' codec can't decode"),
        ("[" * 100_000, "want JSON of measured rates, got "),
        ("[1]", "want JSON with device, products, nvlink, network, exchange, got list"),
        ('{"gpu": {}}', "want parts out of device, products, nvlink, network, exchange, got 'gpu'"),
        ('{"device": 3}', "want device with flops, memory_bandwidth, launch_seconds, memory_bytes, got 3"),
        ('{"network": {"speed": 1}}', "want entries of network out of bandwidth, latency, got 'speed'"),
        ('{"network": {"bandwidth": 0}}', "want a finite network.bandwidth > 0, got 0"),
        ('{"network": {"bandwidth": -1}}', "want a finite network.bandwidth > 0, got -1"),
        ('{"network": {"bandwidth": NaN}}', "want a finite network.bandwidth > 0, got nan"),
        ('{"nvlink": {"bandwidth": Infinity}}', "want a finite nvlink.bandwidth > 0, got inf"),
        ('{"nvlink": {"latency": -1e-6}}', "want a finite nvlink.latency >= 0, got -1e-06"),
        ('{"exchange": {"share": 1}}', "want a finite exchange.share of 0 to below 1, got 1"),
        ('{"device": {"memory_bandwidth": "fast"}}', "want a finite device.memory_bandwidth > 0, got 'fast'"),
        ('{"device": {"memory_bandwidth": true}}', "want a finite device.memory_bandwidth > 0, got True"),
        ('{"device": {"memory_bandwidth": {}}}', "want a finite device.memory_bandwidth > 0, got {}"),
        ('{"device": {"flops": 1e12}}', "want device.flops with a rate for each dtype, got 1000000000000.0"),
        ('{"device": {"flops": {"float31": 1}}}', "want device.flops of torch's dtypes, as float32, got 'float31'"),
        ('{"device": {"flops": {"nn": 1}}}', "want device.flops of torch's dtypes, as float32, got 'nn'"),
        ('{"device": {"flops": {"float32": 0}}}', "want a finite device.flops.float32 > 0, got 0"),
    ],
)
def test_a_file_of_something_else_is_refused(text: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=f"^calibration .*rates.json: {re.escape(error)}"):
        calibrated(CLUSTER, path)


def test_a_file_that_is_not_there_or_no_file_is_refused(tmp_path: Path) -> None:
    for path, got in ((tmp_path / "nowhere.json", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=f"^calibration {path}: want a file of measured rates, got {got}$"):
            calibrated(CLUSTER, path)
