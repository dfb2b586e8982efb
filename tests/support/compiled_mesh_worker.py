"""One of two processes of tests/runtime/test_compiled_mesh.py: compiles for a mesh with a cache of its own, and says what comes of it."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import deepfuse as df
from deepfuse.runtime.placement import place_experts
from deepfuse.runtime.trainer import Trainer
from mesh_worker import SLOW, error_of, part_of
from tiny_model import CONFIG

LAYER = replace(CONFIG, num_hidden_layers=1, first_k_dense_replace=0)
"""The least with experts."""
PROMPTS = [[5, 9, 200, 31, 7], [44, 299, 12]]
"""By process."""
LOADS = torch.tensor([[10, 90, 20, 40, 10, 10, 20, 40]])
SERVED = df.Parallel(
    mode="node_limited",
    ranks_per_node=1,
    placement=place_experts(LOADS, 2, redundant=2, ranks_per_node=1, n_group=CONFIG.n_group),
)
"""Each process a node, and copies of the second expert."""
CORPUS = np.tile(np.arange(7, dtype=np.uint16) * 5, 40)
TRAINING = df.Training(steps=2, batch_size=4, seq_len=8, lr=1e-3, warmup_steps=1, dtype=torch.float32)


def steps_of(trainer: Trainer) -> list[dict[str, Tensor]]:
    """Of each of two steps the loss, and all gradients."""
    steps = []
    for _ in range(2):
        loss = torch.tensor(trainer.train_step(CORPUS))
        gradients = {n: p.grad.clone() for n, p in trainer.masters.items() if p.grad is not None}
        steps.append({"loss": loss, **gradients})
    return steps


def _served(checkpoint: str, mesh: dict[str, int], rank: int) -> dict[str, Any]:
    room = {"device": "cpu", "max_batch_size": 1, "max_seq_len": 64}
    model = df.build(checkpoint, mesh=mesh, parallel=SERVED, **room)
    own = PROMPTS[rank]
    return {
        "greedy": model.generate([own], max_new_tokens=6, temperature=0.0, stop_token_ids=[])[0],
        "logits": model(torch.tensor([own]), last_only=True)[0].tolist(),
        "warm": model.report.warm,
        "report": str(model.report),
    }


def _trained(mesh: dict[str, int], reference: list[dict[str, Tensor]]) -> dict[str, Any]:
    parallel = df.Parallel(overlap="halves", link=SLOW)
    trainer = df.build(LAYER, device="cpu", training=TRAINING, mesh=mesh, parallel=parallel, seed=1)
    errors = []
    for step, want in zip(steps_of(trainer), reference, strict=True):
        assert step.keys() == want.keys()
        error = {n: error_of(g, part_of(want[n], trainer, n)) for n, g in step.items() if n != "loss"}
        errors.append({"loss": error_of(step["loss"], want["loss"]), **error})
    return {"errors": errors, "overlap": trainer.runner.journal.explain("overlap_all_to_all")}


def main(folder: Path, checkpoint: str, reference: str) -> None:
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), {"expert": 2}
    own = folder / f"cache{rank}"
    os.environ["DEEPFUSE_CACHE_DIR"] = str(own)
    said = {"cold": _served(checkpoint, mesh, rank), "warm": _served(checkpoint, mesh, rank)}
    if rank == 1:
        shutil.rmtree(own)
    said["of one alone"] = _served(checkpoint, mesh, rank)
    said["trained"] = _trained(mesh, torch.load(reference))
    (folder / f"said{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
