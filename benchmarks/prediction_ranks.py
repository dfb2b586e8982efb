"""One of two ranks of ``predictions.py`` and ``calibrate.py``: microbenchmarks and layers of experts, in turn.

    python prediction_ranks.py SPECS     SPECS is JSON; rank 0 prints what was measured, as JSON, in its last line

A spec has the link's rate in bytes a second (0: as it is), and the tokens of the layers that are measured; the
microbenchmarks run in the same rounds.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from measured_rates import measured_device, measured_link
from microbenchmarks import BESIDE, SHARE, Beside, microbenchmarks
from overlap_ranks import (
    CHUNKED,
    CHUNKS,
    NAME,
    SEQUENTIAL,
    Sequential,
    Step,
    compiled,
    layer,
    layer_config,
    median,
    notes,
    timed,
)
from rank_group import in_group
from slow_link import SMALL_BURST, set_rate
from torch import Tensor

from deepfuse.blocks.axis import Axis
from deepfuse.ir.link import Link

SHORT_S, SHORT_ROUNDS = 0.06, 24
"""Shorter steps vary more: they have so many rounds besides."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Its alternatives, the rows of the busier rank over their mean, and which alternatives the pass refused."""

    steps: dict[str, Step]
    imbalance: float
    refused: list[str]


def measure(spec: Mapping[str, Any], axis: Axis) -> dict[str, Any]:
    """Seconds by what was timed, the share of a processor that a message holds, what was refused, and for each number of tokens its imbalance."""
    dist.barrier()
    if spec["rate"] and axis.rank == 0:
        set_rate(spec["rate"], SMALL_BURST)
    dist.barrier()
    link = measured_link(axis, timed)
    # all at first, so that nothing is compiled between measurements
    layers = {tokens: _layer(spec, tokens, axis, link) for tokens in spec["tokens"]}
    small = microbenchmarks(axis)
    steps = {f"{tokens} {name}": run for tokens, layer in layers.items() for name, run in layer.steps.items()}
    every = {**small, **steps}
    times = timed(every, spec["rounds"])
    # both ranks have the slower one's times, and so repeat the same
    short = {name: run for name, run in every.items() if median(times[name]) < SHORT_S}
    for name, seconds in timed(short, SHORT_ROUNDS).items():
        times[name] += seconds
    beside = small[BESIDE]
    assert isinstance(beside, Beside)
    # behind that of the warmup
    shares = torch.tensor(beside.shares[-spec["rounds"] :], dtype=torch.float64)
    dist.all_reduce(shares)
    return {
        "times": times,
        SHARE: (shares / axis.size).tolist(),
        "imbalance": {tokens: layer.imbalance for tokens, layer in layers.items()},
        "refused": [f"{tokens} {name}" for tokens, layer in layers.items() for name in layer.refused],
    }


def _layer(spec: Mapping[str, Any], tokens: int, axis: Axis, link: Link) -> Layer:
    config = layer_config(spec)
    torch.manual_seed(1 + axis.rank)
    x = torch.randn(tokens, config.hidden_size)
    width = spec["shared"] * spec["intermediate"]
    settings = {"device": measured_device(tokens, config.hidden_size, width, timed), "link": link}
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        whole, parts = layer(config, axis), layer(config, axis, CHUNKS)
        build = functools.partial(compiled, x=x, settings=settings, backward=spec["backward"])
        built = {
            SEQUENTIAL: build(whole, kind=Sequential),
            NAME: build(whole, ours=True),
            CHUNKED: build(parts, ours=True),
        }
        for run, _ in built.values():
            run()
    refused = [name for name, (_, runner) in built.items() if any(note.startswith("refused") for note in notes(runner))]
    imbalance = _imbalance(whole.gate(x)[1], config.n_routed_experts, axis)
    return Layer({name: run for name, (run, _) in built.items()}, imbalance, refused)


def _imbalance(experts: Tensor, num_experts: int | None, axis: Axis) -> float:
    assert num_experts is not None
    rows = torch.bincount(experts.flatten(), minlength=num_experts).view(axis.size, -1).sum(1).double()
    dist.all_reduce(rows)
    return float(rows.max() / rows.mean())


if __name__ == "__main__":
    in_group(lambda specs, axis: [measure(spec, axis) for spec in specs])
