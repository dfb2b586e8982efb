"""How much of an all-to-all runs under compute: without the pass, with Inductor's own overlap scheduling, and with ours?

Two processes with one thread each, and a mixture of experts (1024 tokens of 512 numbers, 2 of 4 experts each, a shared expert
32 times as wide as theirs) over a link whose rate makes dispatch and combine take two thirds of the shared expert's time.
Each alternative is one step, from a barrier to the end of the slower process; alternatives take turns.

    hidden = (one after the other - ours) / min(communication alone, independent compute alone)

It counts where one after the other takes what communication and compute take alone, within 10%. Besides, two whole layers
take a training step in each form of overlap, and in the one that the cost model chooses (overlap_forms.py). The link is a token
bucket between network namespaces (slow_link.py), for which it takes root; else it is the loopback, and the rows say so. Costs are
those of the cost model, calibrated by one product and two all-to-alls in the same run.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overlap_ranks import CHUNKED, COMMUNICATION, COMPUTE, INDEPENDENT, NAME, SEQUENTIAL, WITHOUT, median
from slow_link import RANKS, SlowLink, missing

from deepfuse.profiling.bench import Bench
from deepfuse.profiling.bench_suites import run_script
from deepfuse.profiling.timing import summary

LAYER = {
    "tokens": 1024,
    "hidden": 512,
    "experts": 4,
    "experts_per_token": 2,
    "intermediate": 256,
    "shared": 32,
    "backward": False,
    "parts": "all",
    "rounds": 12,
}
SHARE = 0.65
"""Of the shared expert's time, that the messages of a forward step take."""
SWEEP = {16: 100, 128: 60, 1024: 12, 4096: 10, 8192: 10}
"""Tokens, and rounds: short steps vary more."""
RATES = (20e6, 100e6, 400e6)
"""Bytes a second of the sweep: messages take twice as long as the shared expert, half as long, and a tenth."""
MODEL = {
    "layers": 2,
    "sequences": 2,
    "length": 512,
    "hidden": 512,
    "heads": 8,
    "experts": 4,
    "experts_per_token": 2,
    "intermediate": 1024,
}
"""Whole layers, of ``overlap_forms.py``."""
LENGTHS = {64: 24, 512: 8}
"""Tokens of a sequence there, and rounds."""
MODEL_RATES = (20e6, 66e6, 200e6)
TIMEOUT_S = 600


def suite(bench: Bench) -> None:
    """All rows; each part starts the two processes once."""
    why = missing()
    if why:
        bench.leave_out("slow link", f"{why}: the rows are of the loopback")
    rate = 0.0
    for backward in (False, True):
        part = "forward and backward" if backward else "forward"
        if bench.wants(part, seconds=240):
            rate = rate or (0.0 if why else _rate())
            (found,) = run_ranks([{**LAYER, "backward": backward}], rate)
            _layer_row(bench, part, found, rate)
    for rate in MODEL_RATES if not why else (0.0,):
        part = f"layers, {_words(rate)}"
        if bench.wants(part, seconds=240):
            specs = [{**MODEL, "length": length, "rounds": rounds} for length, rounds in LENGTHS.items()]
            for spec, found in zip(specs, run_ranks(specs, rate, "overlap_forms.py"), strict=True):
                times = {name: summary(seconds) for name, seconds in found["times"].items()}
                name = f"2 layers, {spec['sequences']} x {spec['length']} tokens, {_words(rate)}"
                why_chosen = "; ".join(found["why"])
                bench.row(name, times, chosen=found["chosen"], why=why_chosen, said="; ".join(found["notes"]))
    for rate in RATES if not why else (0.0,):
        part = f"sweep, {_words(rate)}"
        if bench.wants(part, seconds=240):
            specs = [{**LAYER, "tokens": tokens, "parts": "", "rounds": rounds} for tokens, rounds in SWEEP.items()]
            for spec, found in zip(specs, run_ranks(specs, rate), strict=True):
                times = {name: summary(found["times"][name]) for name in (WITHOUT, NAME)}
                bench.row(f"{spec['tokens']} tokens, {_words(rate)}", times, **_facts(found))


def _layer_row(bench: Bench, part: str, found: dict[str, Any], rate: float) -> None:
    times = {name: summary(seconds) for name, seconds in found["times"].items()}
    first = {SEQUENTIAL: times.pop(SEQUENTIAL), **times}
    medians = {name: median(seconds) for name, seconds in found["times"].items()}
    alone = medians[COMPUTE] + medians[COMMUNICATION]
    off = abs(medians[SEQUENTIAL] / alone - 1)
    void = "" if off <= 0.1 else f"void: one after the other is {off:.0%} off the sum of its parts"
    could = min(medians[COMMUNICATION], medians[INDEPENDENT])
    hidden, in_chunks = ((medians[SEQUENTIAL] - medians[name]) / could for name in (NAME, CHUNKED))
    peak = {name: f"{found['peak'][name] / found['peak'][SEQUENTIAL]:.2f}x" for name in (NAME, CHUNKED)}
    bench.row(
        f"{part}, {_words(rate)}",
        first,
        hidden=void or f"{hidden:.0%}",
        hidden_in_chunks=void or f"{in_chunks:.0%}",
        peak_memory=peak[NAME],
        peak_memory_in_chunks=peak[CHUNKED],
        said_in_chunks="; ".join(found["chunked"]),
        **_facts(found),
    )
    if found["left_out"]:
        bench.leave_out(f"Inductor's overlap scheduling, {part}", found["left_out"])


def _facts(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"equal": found["equal"], "said": "; ".join(found["notes"])}


def _words(rate: float) -> str:
    return f"{rate / 1e6:.0f} MB/s" if rate else "loopback"


def _rate() -> float:
    """Of the link, at which the messages take their share of the time of the shared expert."""
    (found,) = run_ranks([{**LAYER, "parts": "independent", "rounds": 5}], 1e9)
    seconds = SHARE * median(found["times"][INDEPENDENT])
    # half of the rows go to the other process, in float32; dispatch and combine, and both ways share the link
    rows = int(LAYER["tokens"]) * int(LAYER["experts_per_token"]) // 2
    return round(rows * int(LAYER["hidden"]) * 4 * 2 * RANKS / seconds, -6)


def run_ranks(
    specs: list[dict[str, Any]], rate: float, script: str = "overlap_ranks.py", **more: str
) -> list[dict[str, Any]]:
    """What the ranks' script measures, over a link of this rate; 0: over the loopback.

    Args:
        more: of the ranks' environment.

    Raises:
        RuntimeError: a process failed; with the end of what it said.
    """
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(SlowLink(rate)) if rate else None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = []
        for rank in range(RANKS):
            command = [sys.executable, str(Path(__file__).with_name(script)), json.dumps(specs)]
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "WORLD_SIZE": str(RANKS),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                **(link.environment(rank) if link else {}),
                **more,
            }
            command = [*(link.command(rank) if link else []), *command]
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, env=environment, **pipes))
        try:
            said = [process.communicate(timeout=TIMEOUT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    for process, (_, errors) in zip(processes, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"a rank of the benchmark failed: {errors[-2000:]}")
    found: list[dict[str, Any]] = json.loads(said[0][0].splitlines()[-1])
    return found


if __name__ == "__main__":
    run_script(__file__)
