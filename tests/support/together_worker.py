"""One of the two processes of tests/runtime/test_together.py, started by torchrun: what one refuses, both refuse.

Each case is tried, its error printed as if nobody had caught it, and the next one goes on in the same process group.
"""

import contextlib
import functools
import io
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

import deepfuse as df
from deepfuse.ir.link import NVLINK_H100
from deepfuse.passes.pipeline import default
from deepfuse.passes.record import graph_pass
from deepfuse.passes.splice import call
from deepfuse.runtime import build as build_module
from deepfuse.runtime import generation
from deepfuse.runtime.expert_link import expert_link
from deepfuse.runtime.process_group import device_mesh
from tiny_model import CONFIG, write_checkpoint

TIMEOUT_S = 120.0
LAYER = replace(CONFIG, num_hidden_layers=1, first_k_dense_replace=0)
TRAINING = df.Training(steps=2, batch_size=2, seq_len=8, dtype=torch.float32)
CORPUS = np.arange(60, dtype=np.uint16)
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0.0, "stop_token_ids": []}
PROMPTS = [[5, 9, 20], [44], [3, 1]]
c10d = torch.ops._c10d_functional


def one_more(graph: fx.Graph, *, backward: bool) -> int:
    """On the last process alone, a collective before the first one."""
    is_backward = any("tangents" in node.name for node in graph.find_nodes(op="placeholder"))
    if torch.distributed.get_rank() == 0 or is_backward != backward:
        return 0
    first = next((n for n in graph.nodes if getattr(n.target, "namespace", "") == "_c10d_functional"), None)
    if first is None:
        return 0
    with graph.inserting_before(first):
        more = call(graph, first, c10d.all_reduce.default, first.args[0], "sum", first.args[-1])
        done = call(graph, first, c10d.wait_tensor.default, more)
    first.update_arg(0, done)
    return 1


@graph_pass(stage="communicate", kind="exact")
def one_more_forward(graph: fx.Graph) -> int:
    """A collective that one process alone has."""
    return one_more(graph, backward=False)


@graph_pass(stage="communicate", kind="exact")
def one_more_backward(graph: fx.Graph) -> int:
    """The same in the backward graph."""
    return one_more(graph, backward=True)


def build(**settings: Any) -> Any:
    settings = {"mesh": {"expert": 2}, "device": "cpu", "compile": False, "timeout_s": TIMEOUT_S, "seed": 1} | settings
    if "training" not in settings:
        settings = {"max_batch_size": 1, "max_seq_len": 32} | settings
    return df.build(settings.pop("source", LAYER), **settings)


def parallel(factor: float) -> df.Parallel:
    return df.Parallel(mode="capacity", capacity_factor=factor)


def step(*passes: Any) -> float:
    return build(training=TRAINING, passes=list(passes)).train_step(CORPUS)


def interrupted(model: Any, rank: int, *, within: bool) -> Any:
    """Ctrl-C in the last process: in the middle of its second decode, or after it."""
    decodes = 0

    def wrap(name: str, graph: Any) -> Any:
        def called(*args: Any) -> Any:
            nonlocal decodes
            decodes += name != "prefill"
            if within and rank == 1 and decodes == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return graph(*args)

        return called

    def chosen(*args: Any) -> list[int]:
        if not within and rank == 1 and decodes == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return choose(*args)

    choose, generation._choose = generation._choose, chosen
    try:
        with model.engine.wrapped(wrap):
            return model.generate(PROMPTS, **GREEDY)
    finally:
        generation._choose = choose


def read(model: Any, pieces: int) -> list[Any]:
    stream = model.generate(PROMPTS[:1], stream=True, **GREEDY)
    found = [piece for piece, _ in zip(stream, range(pieces), strict=False)]
    stream.close()
    return found


def of_text(model: Any, **options: Any) -> Any:
    return model.generate("the quick", max_new_tokens=4, temperature=0.0, **options)


def cases(rank: int, checkpoint: Path) -> Any:
    """Names and what is tried, of one process."""
    last = rank == 1
    yield "world size", lambda: build(mesh={"tensor": 2, "expert": 2})
    yield "experts", lambda: build(source=replace(LAYER, n_routed_experts=7, n_group=1, topk_group=1))
    yield "capacity", lambda: build(parallel=parallel(0))
    yield "axis", lambda: build(mesh={"pipeline": 2})
    yield "nccl", lambda: device_mesh({"expert": 2}, torch.device("cpu"), TIMEOUT_S, backend="nccl")
    yield "capacity of one", lambda: build(parallel=parallel(-1.0 if last else 1.25))
    yield "provider of one", lambda: build(providers={"rms_norm": "nobody"} if last else {})
    yield "training", lambda: build(training=replace(TRAINING, steps=0))
    yield "training of one", lambda: build(training=replace(TRAINING, seq_len=8 - 8 * last))
    yield "passes of one", lambda: build(passes=default().without(*["absorb_mla"][: int(last)]))
    yield "no mesh", lambda: build(mesh=None, parallel=df.Parallel())
    yield "parallel", lambda: build(parallel="capacity")
    yield "sizes", lambda: build(mesh={"expert": 0})
    if last:  # another number of GPUs, as it sees it
        build_module.expert_link = lambda processes, device: NVLINK_H100
    yield "link", build
    yield "link of a trainer", lambda: build(training=TRAINING)
    build_module.expert_link = expert_link

    yield "order", lambda: build(passes=[one_more_forward])
    yield "order of a trainer's backward", lambda: step(one_more_backward)
    few = default().without(*(name for name in default().names if name not in ("lower", "overlap_all_to_all")))
    yield "verified", lambda: build(verify=True, passes=few).generate(PROMPTS, **GREEDY)

    model = build(mesh={"data": 1, "expert": 2})
    good = functools.partial(model.generate, PROMPTS, **GREEDY)
    yield "axis of one", good
    yield "prompt", lambda: model.generate([[9999]] if last else PROMPTS, **GREEDY)
    yield "after a prompt", good
    yield "options", lambda: model.generate(PROMPTS, **{**GREEDY, "temperature": -1.0 if last else 0.0})
    yield "scored text", lambda: model.score([[]] if last else PROMPTS)
    yield "called", lambda: model(torch.tensor([[9999 if last else 1]]))
    yield "prompt of a stream", lambda: list(model.generate([[9999]] if last else PROMPTS, stream=True, **GREEDY))
    yield "interrupted between calls", lambda: interrupted(model, rank, within=False)
    yield "interrupted in a call", lambda: interrupted(model, rank, within=True)
    yield "after an interrupt", good

    over_tensor = build(source=checkpoint, mesh={"tensor": 2})
    yield "stop strings", lambda: of_text(over_tensor, stop=["x" if last else "y"])
    yield "a stream that one ends", lambda: read(over_tensor, 1 if last else 2)
    yield "a stream that both end", lambda: read(over_tensor, 2)
    yield "prompt over tensor", lambda: over_tensor.generate([[9999]] if last else PROMPTS, **GREEDY)
    yield "interrupted over tensor", lambda: interrupted(over_tensor, rank, within=True)
    yield "after all", lambda: of_text(over_tensor)
    yield "last", lambda: build(parallel=parallel(0))


def tried(case: Any) -> dict[str, Any]:
    began, printed = time.monotonic(), io.StringIO()
    said: dict[str, Any] = {"kind": "", "text": "", "result": None}
    try:
        said["result"] = case()
    except BaseException as error:  # noqa: BLE001 - also Ctrl-C
        said |= {"kind": type(error).__name__, "text": str(error)}
        with contextlib.redirect_stderr(printed):
            sys.excepthook(type(error), error, error.__traceback__)
    return said | {"seconds": time.monotonic() - began, "printed": printed.getvalue()}


def main(folder: Path) -> None:
    rank, said = int(os.environ["RANK"]), {}
    write_checkpoint(folder / f"checkpoint{rank}", config=LAYER)
    for name, case in cases(rank, folder / f"checkpoint{rank}"):
        if name == "last":
            case()
        said[name] = tried(case)
        (folder / f"said{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
