"""No graph of several processes runs before its collectives were compared, be it compiled just now or kept."""

from pathlib import Path
from typing import Any

import pytest
import torch

from deepfuse.passes.journal import GraphEntry, Journal, graph_name
from deepfuse.passes.pipeline import default
from deepfuse.passes.runner import Runner
from deepfuse.runtime import engine
from deepfuse.runtime.axes import Axes
from deepfuse.runtime.compile_cache import BuildFolder
from deepfuse.runtime.kept_engine import kept_engine
from deepfuse.runtime.latent_cache import LatentCache
from deepfuse.runtime.lockstep import Lockstep
from tiny_model import ONE_LAYER, random_weights

CPU = torch.device("cpu")


class Told:
    """Processes of which this is one; what they hear, in order."""

    axes = Axes(size=2)

    def __init__(self) -> None:
        self.heard: list[str] = []

    def lockstep(self, device: torch.device) -> Lockstep:
        return Lockstep(Axes(), device)

    def compare_kept(self, journal: Journal) -> None:
        self.heard.append(f"compared {' '.join(graph.name for graph in journal.graphs)}")


def test_graphs_run_when_they_were_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPFUSE_CACHE_DIR", str(tmp_path))

    def graph(name: str) -> Any:
        return lambda *args: told.heard.append(f"ran {name}")

    def capture(fn: Any, args: Any, options: Any) -> Any:
        name = graph_name()
        told.heard.append(f"compiled {name}")
        runner.journal.graphs.append(GraphEntry(name, collectives=[("all_reduce", "0", "mlp float32")]))
        return graph(name), name.encode()

    monkeypatch.setattr(engine, "capture", capture)
    monkeypatch.setattr(engine, "load_captured", lambda data: graph(data.decode()))
    model = random_weights(ONE_LAYER)
    cache = LatentCache(ONE_LAYER, dtype=torch.float32, device=CPU, max_batch_size=1, max_seq_len=32)
    names = ["prefill", "decode_1"]
    tried_out = [f"compared {' '.join(names)}", *(f"ran {name}" for name in names)]
    for expected in ([*(f"compiled {name}" for name in names), *tried_out], tried_out):
        told, runner = Told(), Runner(default(), {})
        made = kept_engine(model, cache, runner, 1, BuildFolder("key"), told)  # type: ignore[arg-type]
        assert told.heard == expected
        assert [graph.name for graph in runner.journal.graphs] == names
        assert made.from_cache == (expected == tried_out)
