"""One of the two processes of tests/runtime/test_compiled_mesh.py: compiles over a mesh, and says what comes of it.

Each process has a cache of its own, as on a machine of its own.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import deepfuse as df
from deepfuse.runtime.placement import place_experts
from mesh_worker import LOADS, TRAINED, TRAINING, errors_of, train

PROMPTS = [[5, 9, 200, 31, 7], [44, 2]]
"""One of each process."""
ROOM = {"max_batch_size": 1, "max_seq_len": 64}
TWO_LAYERS = replace(TRAINED, num_nextn_predict_layers=0)
"""One of them with experts."""
IN_HALVES = replace(TRAINING, mtp_steps=0)
"""One graph and its backward pass; of each process two sequences."""


def main(folder: Path, checkpoint: str, reference: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("expert",))

    def keeping(name: str) -> None:
        # without a space, which Inductor's command for the compiler cannot have
        os.environ["DEEPFUSE_CACHE_DIR"] = str(folder / f"cache-{name}-{rank}")

    keeping("first")
    nodes = df.Parallel(mode="node_limited", ranks_per_node=1)
    placed = df.Parallel(placement=place_experts(LOADS, 2, redundant=2))
    said = {"nodes": _built(mesh, checkpoint, nodes), "cold": _built(mesh, checkpoint, placed)}
    if rank == 1:
        keeping("second")
    said["warm beside cold"] = _built(mesh, checkpoint, placed)
    said["warm"] = _built(mesh, checkpoint, placed)
    # a trainer keeps its code with Inductor's own
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"inductor-{rank}")
    said["halves"] = _trained(mesh, reference)
    (folder / f"said{rank}.json").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


def _built(mesh: DeviceMesh, checkpoint: str, parallel: df.Parallel) -> dict[str, Any]:
    model = df.build(checkpoint, device="cpu", mesh=mesh, parallel=parallel, **ROOM)
    own = [PROMPTS[torch.distributed.get_rank()]]
    return {
        "scores": model.score(own)[0].tolist(),
        "greedy": model.generate(own, max_new_tokens=4, temperature=0.0, stop_token_ids=[]),
        "compiled": model.report.compiled,
        "warm": model.report.warm,
        "from cache": model.report.graphs_from_cache,
        "graphs": [graph.name for graph in model.report.journal.graphs],
        "collectives": model.report.collectives(),
    }


def _trained(mesh: DeviceMesh, reference: str) -> dict[str, Any]:
    halves = df.Parallel(overlap="halves")
    trainer = df.build(TWO_LAYERS, device="cpu", training=IN_HALVES, mesh=mesh, parallel=halves, seed=1)
    steps = train(trainer, graphs=True, many=2)
    graphs = trainer.runner.journal.graphs
    return {
        "errors": errors_of(steps, torch.load(reference), trainer),
        "compiled": trainer.compiled,
        "graphs": [graph.name for graph in graphs],
        "all-to-alls back": sum(op == "all_to_all_single" for graph in graphs for op, *_ in graph.collectives),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
