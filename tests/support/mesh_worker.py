"""One of the processes of tests/runtime/test_mesh.py: builds a checkpoint over meshes, and says what the models say."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

import deepfuse as df
from deepfuse.runtime.axes import axes_of

PROMPTS = [[5, 9, 200, 31, 7], [44], [299, 0, 12], [150, 151, 152, 153, 154, 155, 156, 157, 158], [17, 18]]


def prompts_of(rank: int) -> list[list[int]]:
    """Other numbers for each process with tokens of its own, and none at all for one."""
    return {0: PROMPTS[:3], 1: [], 2: PROMPTS[3:], 3: PROMPTS[:1]}[rank]


def main(folder: Path, checkpoint: str, *meshes: str) -> None:
    said: dict[str, Any] = {}
    for spec in meshes:
        sizes = {name: int(size) for name, _, size in (part.partition("=") for part in spec.split(","))}
        torch.distributed.init_process_group("gloo") if not torch.distributed.is_initialized() else None
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        said[spec] = _said(mesh, checkpoint)
    (folder / f"said{torch.distributed.get_rank()}.json").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


def _said(mesh: Any, checkpoint: str) -> dict[str, Any]:
    model = df.build(checkpoint, device="cpu", compile=False, mesh=mesh, max_batch_size=2, max_seq_len=64)
    own = prompts_of(axes_of(mesh).token_rank)
    ids = torch.tensor(own[:1]) if own else torch.zeros(0, 1, dtype=torch.int64)
    texts = [f"{chr(97 + i)} quick fox" for i in range(len(own))]
    return {
        "token_rank": axes_of(mesh).token_rank,
        "scores": [score.tolist() for score in model.score([p for p in own if len(p) > 1])],
        "logits": model(ids, last_only=True).tolist(),
        "greedy": model.generate(own, max_new_tokens=6, temperature=0.0, stop_token_ids=[]),
        "sampled": model.generate(texts, max_new_tokens=4, temperature=1.0, seed=3),
        "report": str(model.report),
        "parameters": sum(p.numel() for p in model.engine.model.parameters()),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
