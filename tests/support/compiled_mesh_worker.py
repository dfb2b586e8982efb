"""One of the two processes of tests/runtime/test_compiled_mesh.py: compiles over a mesh, and says what comes of it.

Each process has caches of its own, as on a machine of its own.
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import deepfuse as df
from deepfuse.runtime.placement import place_experts
from mesh_worker import LOADS, SLOW, TRAINING, errors_of, train
from tiny_model import CONFIG

LAYER = replace(CONFIG, num_hidden_layers=1, first_k_dense_replace=0)
"""The least with experts."""
PROMPTS = [[5, 9, 200, 31, 7], [44, 299, 12]]
"""One of each process."""
SERVED = df.Parallel(
    mode="node_limited",
    ranks_per_node=1,
    placement=place_experts(LOADS, 2, redundant=2, ranks_per_node=1, n_group=CONFIG.n_group),
)
"""Each process a node, and copies of the experts that are asked for most."""
IN_HALVES = replace(TRAINING, mtp_steps=0)
"""One graph and its backward pass; of each process two sequences."""


def main(folder: Path, checkpoint: str, reference: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    own = folder / f"cache{rank}"
    os.environ["DEEPFUSE_CACHE_DIR"] = str(own)
    said = {name: _served(checkpoint, rank) for name in ("cold", "warm")}
    if rank == 1:
        shutil.rmtree(own)
    said["warm beside cold"] = _served(checkpoint, rank)
    # a trainer keeps its code with Inductor's own
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"inductor{rank}")
    said["halves"] = _trained(reference)
    (folder / f"said{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def _served(checkpoint: str, rank: int) -> dict[str, Any]:
    room = {"device": "cpu", "max_batch_size": 1, "max_seq_len": 64}
    # made anew each time
    model = df.build(checkpoint, mesh={"expert": 2}, parallel=SERVED, **room)
    return {
        "greedy": model.generate([PROMPTS[rank]], max_new_tokens=6, temperature=0.0, stop_token_ids=[])[0],
        "logits": model(torch.tensor([PROMPTS[rank]]), last_only=True)[0].tolist(),
        "warm": model.report.warm,
        "report": str(model.report),
        "collectives": model.report.collectives(),
    }


def _trained(reference: str) -> dict[str, Any]:
    halves = df.Parallel(overlap="halves", link=SLOW)
    trainer = df.build(LAYER, device="cpu", training=IN_HALVES, mesh={"expert": 2}, parallel=halves, seed=1)
    errors = errors_of(train(trainer, graphs=True, many=2), torch.load(reference), trainer)
    return {"errors": errors, "overlap": trainer.runner.journal.explain("overlap_all_to_all")}


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
