"""Passes alone, in pairs and all together, on the graphs of a small FP8 model; run uncompiled, on real inputs."""

import functools
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher

from deepfuse.blocks.fp8 import to_fp8
from deepfuse.ir.device import H200, device_row
from deepfuse.ir.private import uncompiled_backend
from deepfuse.ir.verify import verify, verify_types
from deepfuse.passes.check_values import Rewritten, copied
from deepfuse.passes.journal import noting
from deepfuse.passes.pipeline import DEFAULT
from deepfuse.passes.record import Pass
from deepfuse.runtime.engine import Engine
from deepfuse.runtime.generation import Sampling, Speed, generate_tokens
from deepfuse.runtime.latent_cache import LatentCache
from deepfuse.runtime.losses import next_token_loss
from deepfuse.runtime.trainer import Trainer
from deepfuse.runtime.training import Training
from tiny_checkpoint import model_of
from tiny_model import CONFIG, random_weights

# of functions with a gradient of their own, by torch 2.11's Dynamo
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
SETTINGS: dict[str, Any] = {"providers": {}, "device": device_row(torch.device("cpu")), "max_seq_len": 64}
GRAPHS = ["prefill", "decode", "forward", "backward"]


class Recorder:
    """In the place of a runner: keeps each graph as it comes, and the inputs of its last call."""

    def __init__(self) -> None:
        self.graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(self) -> Any:
        return uncompiled_backend(lambda hook, gm: None, self._kept)

    def _kept(self, gm: fx.GraphModule) -> Any:
        entry: tuple[fx.GraphModule, list[Any]] = (copied(gm.graph), [])
        self.graphs.append(entry)

        def run(*inputs: Any) -> Any:
            entry[1][:] = [i.detach().clone() if isinstance(i, Tensor) else i for i in inputs]
            return gm(*inputs)

        return run


@functools.cache
def recorded() -> dict[str, tuple[fx.GraphModule, list[Any]]]:
    serving, training = Recorder(), Recorder()
    model = random_weights(CONFIG)
    to_fp8(model)
    cache = LatentCache(CONFIG, dtype=torch.float32, device=torch.device("cpu"), max_batch_size=1, max_seq_len=64)
    engine = Engine(model, cache, serving, max_batch_size=1, folder=None)  # type: ignore[arg-type]
    sampling = Sampling(max_new_tokens=3, temperature=0.0, top_k=0, top_p=1.0, seed=0, stop_token_ids=())
    for _ in generate_tokens(engine, [[5, 9, 2, 40, 7]], sampling, Speed()):
        pass
    settings = Training(steps=1, batch_size=2, seq_len=16, dtype=torch.float32)
    trained = model_of(replace(CONFIG, num_nextn_predict_layers=0))
    trainer = Trainer(trained.train(), settings, compile=False, fp8=True)
    trainer.next_token_loss = torch.compile(next_token_loss, backend=training.backend(), dynamic=False)
    trainer.train_step(np.arange(200, dtype=np.uint16) % 300)
    return dict(zip(GRAPHS, [*serving.graphs, *training.graphs], strict=True))


def problem_of(graph: str, passes: tuple[Pass, ...], **settings: Any) -> tuple[int, str | None]:
    """How often the passes rewrote, with these settings in the place of some, and what they broke."""
    before, inputs = recorded()[graph]
    after, rewrites = copied(before.graph), 0
    # as while a graph is compiled: shapes of symbolic sizes come from Python
    with noting([]), enable_python_dispatcher():
        for p in passes:
            rewrites += p(after.graph, **{**SETTINGS, **settings})
            after.graph.eliminate_dead_code()
            verify(after.graph)
            verify_types(after.graph)
    after.recompile()
    kind = "exact" if all(p.kind == "exact" for p in passes) else "reassociating"
    return rewrites, Rewritten("+".join(p.name for p in passes), kind, rewrites, before, after).problem(inputs)


@functools.cache
def active(graph: str) -> tuple[Pass, ...]:
    """Those that find something to do there by themselves, but ``lower``."""
    return tuple(p for p in DEFAULT if p.name != "lower" and problem_of(graph, (p,))[0])


@pytest.mark.parametrize("p", DEFAULT, ids=lambda p: p.name)
@pytest.mark.parametrize("graph", GRAPHS)
def test_alone(graph: str, p: Pass) -> None:
    assert problem_of(graph, (p,))[1] is None


@pytest.mark.parametrize("graph", GRAPHS)
def test_in_pairs(graph: str) -> None:
    pairs = list(itertools.combinations(active(graph), 2))
    assert len(pairs) >= 3
    for pair in pairs:
        rewrites, problem = problem_of(graph, pair)
        assert problem is None, [p.name for p in pair]
        # each finds its sites whatever went before, or its sites were taken
        assert rewrites > 0


@pytest.mark.parametrize("graph", GRAPHS)
def test_all_together(graph: str) -> None:
    rewrites, problem = problem_of(graph, DEFAULT)
    assert problem is None
    assert rewrites >= sum(problem_of(graph, (p,))[0] for p in active(graph) if p.name.startswith("fuse_quantized"))


@pytest.mark.parametrize("graph", GRAPHS)
def test_all_together_as_on_a_gpu(graph: str) -> None:
    assert problem_of(graph, DEFAULT, device=H200)[1] is None


def test_absorbed_attention_as_on_a_gpu() -> None:
    pair = tuple(p for p in DEFAULT if p.name in ("absorb_mla", "fuse_decode_attention"))
    # absorbed, and then its query and its values
    assert problem_of("decode", pair, device=H200) == (3 * CONFIG.num_hidden_layers, None)
