"""How far is what `deepfuse simulate` predicts of a layer of experts from what two processes then take for it?

The layer is that of overlap.py, over its link; alternatives are one after the other, the shared expert beside the exchange, and
two chunks. Predictions are made of microbenchmarks alone (microbenchmarks.py) and of what the router decided; nothing is fitted to
a layer. Both are measured in the same rounds. Where the pass refuses a form of overlap, its time is that of the graph as it is,
and no prediction stands beside it.
"""

import functools
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from microbenchmarks import BESIDE, SHARE, rates
from overlap import LAYER, run_ranks
from overlap_ranks import CHUNKED, CHUNKS, NAME, SEQUENTIAL, layer_config, median
from slow_link import RANKS, missing

from deepfuse.ir.device import CPU
from deepfuse.ir.link import LOOPBACK, all_to_all_seconds
from deepfuse.profiling.bench import Bench
from deepfuse.profiling.bench_suites import run_script
from deepfuse.profiling.calibration import calibrated
from deepfuse.profiling.cluster import Cluster
from deepfuse.profiling.overlap_choice import NONE, SHARED, LayerSeconds, plans
from deepfuse.profiling.simulate import Setup, Simulation
from deepfuse.profiling.timing import summary

PLANS = {SEQUENTIAL: NONE, NAME: SHARED, CHUNKED: f"chunked x{CHUNKS}"}
"""Measured alternative -> what the simulation calls it."""
CAPTURED = 4096
"""Tokens of the graph whose costs are taken for all numbers of them."""
MEASURED: Mapping[str, dict[str, Any]] = {
    "prefill, 66 MB/s": {"backward": False, "rate": 66e6, "tokens": (16, 128, 1024, 4096, 8192), "rounds": 6},
    "train, 66 MB/s": {"backward": True, "rate": 66e6, "tokens": (16, 128, 1024, 4096), "rounds": 6},
    "prefill, 20 MB/s": {"backward": False, "rate": 20e6, "tokens": (16, 128, 1024, 4096), "rounds": 6},
    "train, 20 MB/s": {"backward": True, "rate": 20e6, "tokens": (128, 1024), "rounds": 6},
    "prefill, 200 MB/s": {"backward": False, "rate": 200e6, "tokens": (16, 128, 1024, 4096), "rounds": 6},
}
"""By part."""
MEMORY_STAYS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""What a process frees stays its own, as with a GPU's caching allocator: memory that comes anew page by page costs more than
what is computed in it, where and when follows from the allocator's thresholds."""


def suite(bench: Bench) -> None:
    """All rows; each part starts the two processes once."""
    why = missing()
    if why:
        bench.leave_out("slow link", f"{why}: the rows are of the loopback")
    for part, measured in MEASURED.items():
        if bench.wants(part, seconds=300):
            spec = {**LAYER, **measured, "rate": 0.0 if why else measured["rate"]}
            (found,) = measured_by_ranks([spec])
            _rows(bench, part, spec, found)


def measured_by_ranks(specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``prediction_ranks.py`` measures."""
    return run_ranks(specs, specs[0]["rate"], "prediction_ranks.py", **MEMORY_STAYS)


def calibration_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Rates, from medians of the microbenchmarks."""
    seconds = {name: median(values) for name, values in found["times"].items()}
    return rates(seconds, median(found[SHARE]), RANKS)


def _rows(bench: Bench, part: str, spec: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    times, calibration = found["times"], calibration_of(found)
    # a layer's begin with its tokens
    small = {name: summary(seconds) for name, seconds in times.items() if not name[0].isdigit()}
    for name, timing in small.items():
        # the last of them
        bench.row(f"{part}, {name}", {"measured": timing}, **({"rates": _words(calibration)} if name == BESIDE else {}))
    tokens = {n: found["imbalance"][str(n)] for n in spec["tokens"]}
    for n, by_name in predicted(spec["backward"], tokens, calibration).items():
        for name, seconds in by_name.items():
            measured = summary(times[f"{n} {name}"])
            facts = {"tokens": n, "kind": name}
            if f"{n} {name}" in found["refused"]:
                bench.row(f"{part}, {n} tokens, {name}", {"measured": measured}, difference="refused", **facts)
                continue
            figures = {"measured": measured, "predicted": 1e3 * seconds}
            difference = f"{seconds / measured.median - 1:+.1%}"
            bench.row(f"{part}, {n} tokens, {name}", figures, difference=difference, **facts)


def _words(calibration: Mapping[str, Any]) -> str:
    device, products, network, exchange = (calibration[part] for part in ("device", "products", "network", "exchange"))
    return (
        f"{device['flops']['float32'] / 1e9:.0f} GFLOP/s, {device['memory_bandwidth'] / 1e9:.1f} GB/s, {products['bandwidth'] / 1e9:.1f} "
        f"of products, {products['gradient_bandwidth'] / 1e9:.1f} of gradients, launch "
        f"{device['launch_seconds'] * 1e6:.0f} us; link {network['bandwidth'] / 1e6:.1f} MB/s, {network['latency'] * 1e6:.0f} us, "
        f"holds {exchange['share']:.1%} of a processor, {exchange['latency'] * 1e6:.0f} us later beside products"
    )


def predicted(
    backward: bool, tokens: Mapping[int, float], calibration: Mapping[str, Any]
) -> dict[int, dict[str, float]]:
    """Tokens -> alternative -> seconds.

    Args:
        tokens: with the rows of the busier rank over their mean.
        calibration: as :func:`microbenchmarks.rates` makes it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rates.json"
        path.write_text(json.dumps(calibration))
        # each rank is a node
        cluster = calibrated(Cluster(device=CPU, gpus_per_node=1, nvlink=LOOPBACK, network=LOOPBACK), path)
    simulation = _simulation()
    simulation.cluster = cluster
    found = {}
    for n, imbalance in tokens.items():
        setup = Setup(
            phase="train" if backward else "prefill",
            sequences=2,
            length=CAPTURED // 2,
            expert=RANKS,
            fp8=False,
            imbalance=imbalance,
            exchange="direct",
        )
        seconds = Counter[str]()
        for at_backward in setup.passes:
            at = functools.partial(_with_counts, simulation, setup, n, at_backward)
            seconds.update(plans(at, 1, busy=cluster.busy(decode=False), late=cluster.exchange_latency))
        found[n] = {name: seconds[plan] for name, plan in PLANS.items()}
    return found


@functools.cache
def _simulation() -> Simulation:
    """With its captures, of which one serves all rates and tokens."""
    return Simulation(layer_config(LAYER), Cluster(device=CPU, gpus_per_node=1, nvlink=LOOPBACK, network=LOOPBACK))


def _with_counts(simulation: Simulation, setup: Setup, tokens: int, backward: bool, fraction: float) -> LayerSeconds:
    """Rows of a dropless exchange come behind their counts, which have no gradient."""
    layer = simulation.experts(setup, fraction * tokens / CAPTURED, backward=backward)
    if backward:
        return layer
    counts = all_to_all_seconds(simulation.cluster.network, 8 * int(LAYER["experts"]), RANKS)
    return replace(layer, dispatch=layer.dispatch + counts)


if __name__ == "__main__":
    run_script(__file__)
