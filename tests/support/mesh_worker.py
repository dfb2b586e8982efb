"""One of the processes of tests/runtime/test_mesh.py: builds and trains over meshes, and says what comes of it."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import deepfuse as df
from deepfuse.blocks.cut import taken
from deepfuse.blocks.placement import Placement
from deepfuse.ir.link import Link
from deepfuse.runtime.axes import axes_of
from deepfuse.runtime.losses import mtp_loss, next_token_loss
from deepfuse.runtime.placement import place_experts
from deepfuse.runtime.save import save_checkpoint
from deepfuse.runtime.trainer import Trainer
from tiny_checkpoint import TINY
from tiny_model import CONFIG

PROMPTS = [[5, 9, 200, 31, 7], [44], [299, 0, 12], [150, 151, 152, 153, 154, 155, 156, 157, 158], [17, 18]]
TRAINED = replace(TINY, num_hidden_layers=2)
CORPUS = np.tile(np.arange(7, dtype=np.uint16) * 5, 40)
TRAINING = df.Training(
    steps=2,
    batch_size=4,
    seq_len=8,
    lr=1e-3,
    warmup_steps=1,
    dtype=torch.float32,
    mtp_steps=1,
    clip_norm=0.05,
    aux_loss_alpha=0.1,
)
"""Which clips the gradients of each step, and in which the balance loss has a large part of the routers'."""

SLOW = Link(name="slow", bandwidth=4e7, latency=1e-9)
"""On which messages of the least of models take about as long as its compute."""
LOADS = torch.tensor([[10, 90, 20, 40, 10, 10, 20, 40]])
"""Of the one layer with experts: the second is to have copies."""
PARALLEL = {
    "capacity": df.Parallel(mode="capacity", capacity_factor=8),
    "nodes": df.Parallel(mode="node_limited", ranks_per_node=2, link=SLOW, overlap="shared"),
    "halves": df.Parallel(overlap="halves"),
    "placed": df.Parallel(placement=place_experts(LOADS, 2, redundant=2)),
    "slots": df.Parallel(
        mode="capacity", capacity_factor=10, placement=place_experts(LOADS, 2, redundant=2), overlap="none"
    ),
    "homes": df.Parallel(
        mode="node_limited",
        ranks_per_node=2,
        placement=place_experts(LOADS, 4, redundant=4, ranks_per_node=2, n_group=CONFIG.n_group),
        overlap="none",
    ),
    "bounded": df.Parallel(overlap="halves", mode="capacity", capacity_factor=8),
}
"""``slots`` drops nothing: the factor is the number of slots."""

WIDE = replace(
    TINY,
    hidden_size=256,
    moe_intermediate_size=512,
    num_experts_per_tok=2,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    num_nextn_predict_layers=0,
    max_position_embeddings=1024,
    initializer_range=0.1,
)
"""A layer whose experts take as long, on the row of a CPU, as the way to them over :data:`LINK`."""
SMALL = replace(TINY, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, initializer_range=0.3)
LINK = Link(name="slow", bandwidth=1e8, latency=1e-5)
LONG = [[(7 * i + 3) % 60 for i in range(n)] for n in (150, 5, 40, 30)]
"""Prompts of many tokens and of few: two calls of two processes each."""
TWO_BATCH = [
    [[[5, 9, 20, 31, 7], [44, 2, 3, 1]], [[8, 8], [50, 51, 52]]],
    [[[17, 18], [6, 4, 5]], [[33, 34, 35, 36]]],
]
"""Prompts of two calls, by process; in the second one of them has no halves."""


def prompts_of(rank: int) -> list[list[int]]:
    """Other numbers for each process with tokens of its own, and none at all for one."""
    return {0: PROMPTS[:3], 1: [], 2: PROMPTS[3:], 3: PROMPTS[:1]}[rank]


def texts_of(rank: int) -> list[str]:
    return [f"{chr(97 + i)} quick fox" for i in range(len(prompts_of(rank)))]


def train(trainer: Trainer, *, graphs: bool, many: int = 3) -> list[dict[str, Any]]:
    """Of each of so many steps the loss and the balance loss, all gradients after clipping, and the router's biases."""
    if not graphs:
        trainer.next_token_loss, trainer.mtp_loss = next_token_loss, mtp_loss
    steps = []
    for _ in range(many):
        loss = trainer.train_step(CORPUS)
        gradients = {n: p.grad.clone() for n, p in trainer.masters.items() if p.grad is not None}
        biases = {n: b.clone() for n, b in trainer.model.named_buffers() if n.endswith("correction_bias")}
        losses = torch.tensor([loss, trainer.balance_loss()], dtype=torch.float64)
        steps.append({"losses": losses, "gradients": gradients, "biases": biases})
    return steps


def main(folder: Path, checkpoint: str, reference: str, *meshes: str) -> None:
    torch.distributed.init_process_group("gloo")
    said: dict[str, Any] = {}
    for asked in meshes:
        spec, *what = asked.split()
        sizes = {name: int(size) for name, _, size in (part.partition("=") for part in spec.split(","))}
        mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        words: dict[str, Any] = {"token_rank": axes_of(mesh).token_rank}
        said[asked] = words
        parallel = next((PARALLEL[word] for word in what if word in PARALLEL), None)
        if "model" in what:
            words |= _built(mesh, checkpoint, folder / f"saved {asked}", parallel, 2 if "batches" in what else 1)
        if "placed" in what:
            words |= _counted(mesh, checkpoint, folder, parallel)
        if "prompts" in what:
            words |= _two_batch(mesh, parallel)
        if "large" in what:
            words |= _large(mesh)
        if "fp8" in what:
            words |= _in_fp8(mesh, checkpoint, parallel)
        if "refused" in what:
            words |= _refused(mesh, checkpoint)
        if "trainer" in what:
            words |= _trained(
                mesh, torch.load(reference), folder / f"trainer {asked}", parallel, graphs="graphs" in what
            )
        if "rows" in what:
            words["rows"] = _dropping(mesh, folder / "rows")
    (folder / f"said{torch.distributed.get_rank()}.json").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


def _built(
    mesh: DeviceMesh, checkpoint: str, folder: Path, parallel: df.Parallel | None, max_batch_size: int
) -> dict[str, Any]:
    room = {"max_batch_size": max_batch_size, "max_seq_len": 64}
    model = df.build(checkpoint, device="cpu", compile=False, mesh=mesh, parallel=parallel, **room)
    own = prompts_of(axes_of(mesh).token_rank)
    ids = torch.tensor(own[:1]) if own else torch.zeros(0, 1, dtype=torch.int64)
    model.save(folder)
    greedy = model.generate(own, max_new_tokens=6, temperature=0.0, stop_token_ids=[])
    return {
        "greedy": greedy,
        "drops": [model.report.dropped, model.report.choices],
        "scores": [score.tolist() for score in model.score([p for p in own if len(p) > 1])],
        "logits": model(ids, last_only=True).tolist(),
        "sampled": model.generate(texts_of(axes_of(mesh).token_rank), max_new_tokens=4, temperature=1.0, seed=3),
        "first pieces": list(_cut_short(model, own)),
        "again": model.generate(own, max_new_tokens=2, temperature=0.0, stop_token_ids=[]),
        "report": str(model.report),
        "overlap": model.explain("overlap_all_to_all"),
        "collectives": model.report.collectives(),
        "choices in all": model.report.choices,
        "parameters": sum(p.numel() for p in model.engine.model.parameters()),
    }


def _counted(mesh: DeviceMesh, checkpoint: str, folder: Path, parallel: df.Parallel | None) -> dict[str, Any]:
    """A model that counts, and a placement of what it counted."""
    room = {"max_batch_size": 1, "max_seq_len": 64, "count_loads": True}
    model = df.build(checkpoint, device="cpu", compile=False, mesh=mesh, parallel=parallel, **room)
    model.generate(prompts_of(axes_of(mesh).token_rank), max_new_tokens=6, temperature=0.0, stop_token_ids=[])
    loads = model.expert_loads(folder / "loads.json")
    return {"loads": loads.tolist(), "rows": model.engine.model.model.layers[1].mlp.experts.down_proj.shape[0]}


def _in_fp8(mesh: DeviceMesh, checkpoint: str, parallel: df.Parallel | None) -> dict[str, Any]:
    model = in_fp8(checkpoint, mesh, parallel)
    own = [p for p in prompts_of(axes_of(mesh).token_rank) if len(p) > 1]
    return {
        "scores": [score.tolist() for score in model.score(own)],
        "greedy": model.generate(own, max_new_tokens=4, temperature=0.0, stop_token_ids=[]),
        "quantized": model.report.quantized,
    }


def in_fp8(checkpoint: str, mesh: DeviceMesh | None = None, parallel: df.Parallel | None = None) -> Any:
    room = {"max_batch_size": 1, "max_seq_len": 64, "parallel": parallel}
    return df.build(checkpoint, quantize="fp8", device="cpu", compile=False, strict=True, mesh=mesh, **room)


def _refused(mesh: DeviceMesh, checkpoint: str) -> dict[str, str]:
    """What each process is told of builds that cannot be, in which no process may wait for another."""
    rank = torch.distributed.get_rank()
    odd = replace(CONFIG, n_routed_experts=7, n_group=1, topk_group=1)
    plain = replace(CONFIG, n_group=1, topk_group=1)
    asked: dict[str, tuple[Any, df.Parallel | None]] = {
        "experts": (odd, None),
        "nodes": (checkpoint, df.Parallel(mode="node_limited", ranks_per_node=3)),
        "groups": (plain, df.Parallel(mode="node_limited", ranks_per_node=1)),
        "not alike": (checkpoint, df.Parallel(mode="node_limited", ranks_per_node=2 - rank)),
        "placed otherwise": (checkpoint, df.Parallel(placement=place_experts(LOADS.roll(rank), 2))),
        "slots": (checkpoint, df.Parallel(mode="node_limited", ranks_per_node=1, placement=torn())),
    }
    told = {}
    for name, (source, parallel) in asked.items():
        try:
            df.build(source, device="cpu", compile=False, mesh=mesh, parallel=parallel)
        except ValueError as error:
            told[name] = str(error)
    return told


def torn() -> Placement:
    """Groups of two experts on both nodes."""
    return Placement(torch.tensor([[0, 2, 4, 6, 1, 3, 5, 7]]), 2, LOADS.double())


def _large(mesh: DeviceMesh) -> dict[str, Any]:
    """A model with a prefill graph of its own for many tokens: its scores, and the graphs that were called for them."""
    room = {"max_batch_size": 1, "max_seq_len": 1024}
    model = df.build(WIDE, device="cpu", compile=False, mesh=mesh, parallel=df.Parallel(link=LINK), **room)
    called: list[str] = []

    def noted(name: str, graph: Any) -> Any:
        return lambda *args: (called.append(name), graph(*args))[1]

    rank = axes_of(mesh).token_rank
    with model.engine.wrapped(noted):
        scores = [model.score([LONG[2 * i + rank]])[0].tolist() for i in range(2)]
    return {
        "scores": scores,
        "called": called,
        "large": [[each.form.chunks, each.tokens] for each in model.engine.large],
        "graphs": [g.name for g in model.report.journal.graphs],
        "explained": model.explain("overlap_all_to_all"),
    }


def _two_batch(mesh: DeviceMesh, parallel: df.Parallel | None) -> dict[str, Any]:
    """A model whose prompts go through the layers in halves: what it says, and the prefill graphs that were called."""
    room = {"max_batch_size": 2, "max_seq_len": 64}
    model = df.build(SMALL, device="cpu", compile=False, mesh=mesh, parallel=parallel, **room)
    called: list[str] = []

    def noted(name: str, graph: Any) -> Any:
        return lambda *args: (called.append(name), graph(*args))[1]

    rank = axes_of(mesh).token_rank
    with model.engine.wrapped(noted):
        greedy = [model.generate(call[rank], max_new_tokens=3, temperature=0.0) for call in TWO_BATCH]
        # tokens of all, padded on the right
        ids = torch.tensor([[5, 9, 20], [44, 2, 0]])
        logits = model(ids + rank, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    return {
        "greedy": greedy,
        "logits": logits.tolist(),
        "called": [name for name in called if name.startswith("prefill")],
        "graphs": [g.name for g in model.report.journal.graphs],
    }


def _cut_short(model: Any, own: list[list[int]]) -> Any:
    """One process stops reading early; the others must not wait for it."""
    pieces = model.generate(own, max_new_tokens=6, temperature=0.0, stop_token_ids=[], stream=True)
    yield from (piece for piece, _ in zip(pieces, range(2), strict=False)) if len(own) > 1 else pieces
    pieces.close() if hasattr(pieces, "close") else None


def _trained(
    mesh: DeviceMesh, reference: list[dict[str, Any]], own: Path, parallel: df.Parallel | None, *, graphs: bool
) -> dict[str, Any]:
    def trainer() -> Trainer:
        return df.build(TRAINED, device="cpu", compile=False, training=TRAINING, mesh=mesh, parallel=parallel, seed=1)

    first = trainer()
    steps = train(first, graphs=graphs)
    errors = errors_of(steps, reference, first)
    first.save(own)
    save_checkpoint(first.model, own / "exported", processes=first.processes)
    again, others = trainer(), []
    # of the cases before; over the same processes it goes on, however tokens reach experts
    for other in sorted(own.parent.glob("trainer *")):
        if other != own:
            try:
                again.resume(other)
            except ValueError as error:
                others.append(str(error))
    again.resume(own)
    state, other = first._state(), again._state()
    return {
        "errors": errors,
        "heldout": first.evaluate(CORPUS[:50]),
        "numbers": sum(p.numel() for p in first.masters.values()),
        "resumed": again.step == 3
        and state.keys() == other.keys()
        and all(torch.equal(state[k], other[k]) for k in state),
        "others": others,
        "files": sorted(p.name for p in own.rglob("*") if "exported" not in p.parts),
    }


def errors_of(steps: list[dict[str, Any]], reference: list[dict[str, Any]], trainer: Trainer) -> list[dict[str, float]]:
    """Of each step, how far what :func:`train` returned is from what it did of one process, of which this has its part."""
    errors = []
    for step, want in zip(steps, reference, strict=True):
        assert step["gradients"].keys() == want["gradients"].keys()
        error = {n: _error(g, _own(want["gradients"][n], trainer, n)) for n, g in step["gradients"].items()}
        error |= {n: _error(b, want["biases"][n]) for n, b in step["biases"].items()}
        errors.append({"losses": _error(step["losses"], want["losses"]), **error})
    return errors


def _dropping(mesh: DeviceMesh, folder: Path) -> list[dict[str, float]]:
    """Rows of a training in which experts take a quarter of their mean load."""
    training = replace(TRAINING, checkpoint_every=1, mtp_steps=0, aux_loss_alpha=0.0)
    parallel = df.Parallel(mode="capacity", capacity_factor=0.25)
    trainer = df.build(TRAINED, device="cpu", compile=False, training=training, mesh=mesh, parallel=parallel)
    trainer.next_token_loss = next_token_loss
    return list(trainer.run(folder, CORPUS))


def _own(whole: Tensor, trainer: Trainer, name: str) -> Tensor:
    """This process's part of a gradient of one process."""
    part = taken(whole, trainer.model.cuts.get(name, ()))
    axis = trainer._replicas(name)
    if axis is None:
        return part
    each = -(-part.numel() // axis.size)
    flat = torch.cat((part.flatten(), part.new_zeros(each * axis.size - part.numel())))
    return flat[axis.rank * each : (axis.rank + 1) * each]


def _error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-12))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
