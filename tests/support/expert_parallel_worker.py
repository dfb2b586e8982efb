"""One of the processes of tests/blocks/test_expert_parallel.py: how far each case is from one process with all tokens.

Every process computes what one process would, without a word to others, and compares its own part.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import tiny_checkpoint
from deepfuse.blocks import message
from deepfuse.blocks.axis import Axis
from deepfuse.blocks.capacity import Capacity
from deepfuse.blocks.chunked import Chunked
from deepfuse.blocks.collectives import all_to_all
from deepfuse.blocks.dropless import Dropless
from deepfuse.blocks.exchange import Local
from deepfuse.blocks.expert_parallel import to_expert_parallel
from deepfuse.blocks.fp8 import FP8Experts, to_fp8
from deepfuse.blocks.fp8_training import TrainedFP8Experts
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.moe import Experts
from deepfuse.blocks.node_limited import NodeLimited
from deepfuse.ops.dequantize import straight_through

TINY = replace(tiny_checkpoint.TINY, num_hidden_layers=2, num_nextn_predict_layers=0)
D, I = TINY.hidden_size, TINY.moe_intermediate_size


class Worker:
    """A process, its place among the others, and what it has to say."""

    def __init__(self):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.axis = Axis("expert", dist.group.WORLD.group_name, self.size, self.rank)
        self.said = {}

    def tokens(self, each):
        """This process's tokens, where process i has ``each[i]``."""
        return slice(sum(each[: self.rank]), sum(each[: self.rank + 1]))

    def exchange(self, name, exchange, chosen, each, backend=None, kept=None, kind="plain", width=D, padding=0):
        """An exchange on its own.

        Args:
            chosen: ``[T, K]``.
            padding: of each process's tokens, how many of the last choose nothing.
            kept: of the weights, which choices are not dropped.
            kind: of experts.
        """
        E, T = exchange.num_experts, sum(each)
        torch.manual_seed(0)
        x, dy, weights = torch.randn(T, width), torch.randn(T, width), torch.rand(chosen.shape)
        whole = Experts(E, width, I)
        for parameter in whole.parameters():
            nn.init.normal_(parameter, std=0.3)
        keep = torch.ones_like(weights) if kept is None else kept(weights)
        share, mine = self.axis.share(E, "experts"), self.tokens(each)
        part = Experts(E // self.size, width, I)
        for own, all_of in zip(part.parameters(), whole.parameters(), strict=True):
            own.data = all_of.data[share].clone()
        whole, part = of_kind(kind, whole), of_kind(kind, part)
        local = Local(E)
        if kind == "plain" and getattr(exchange, "dispatch", "") == "fp8":
            local = Rounded(local)
        expected = self._gradients(local, x, weights * keep, chosen, whole, dy)
        if kept is not None:
            expected["weights"] *= keep
        run = torch.compile(exchange, fullgraph=True, backend=backend) if backend else exchange
        sent = self.padded(chosen, each, padding, E)[mine]
        actual = self._gradients(run, x[mine], weights[mine], sent, part, dy[mine])
        for key in ("y", "x", "weights"):
            expected[key] = None if expected[key] is None else expected[key][mine]
        for key in ("gate_up_proj", "down_proj") if kind == "plain" else ():
            expected[key] = expected[key][share]
        if kind != "plain":
            # in FP8 for inference they have no gradient, and blocks of 128 rows begin elsewhere in the trained kind's
            for key in [key for key in expected if "proj" in key or expected[key] is None]:
                del expected[key], actual[key]
        # every expert's load is counted where its tokens are
        expected["load"] = torch.bincount(sent.flatten(), minlength=E)[:E]
        self.compare(name, actual, expected)

    @staticmethod
    def padded(chosen, each, padding, E):
        chosen, end = chosen.clone(), 0
        for count in each if padding else ():
            end += count
            chosen[end - padding : end] = E
        return chosen

    @staticmethod
    def _gradients(exchange, x, weights, chosen, ffn, dy):
        with torch.set_grad_enabled(not isinstance(ffn, FP8Experts)):
            x, weights = (t.clone().requires_grad_(torch.is_grad_enabled()) for t in (x, weights))
            y, load = exchange(x, weights, chosen, ffn)
        if y.requires_grad:
            y.backward(dy)
        gradients = {name: p.grad for name, p in ffn.named_parameters()}
        return {"y": y.detach(), "x": x.grad, "weights": weights.grad, "load": load, **gradients}

    def capacity(self, name, drop, factor, each, backend=None, padding=0):
        """Of four experts a process."""
        E, T, K = 4 * self.size, sum(each), 2
        chosen = uniform(T, K, E)
        # more than the mean for one of them
        chosen[::2, 0], chosen[::2, 1] = 1, chosen[::2, 1].clamp(min=2)
        exchange = Capacity(E, self.axis, capacity_factor=factor, drop=drop)
        capacity = exchange.capacity(each[0], K)
        sent, mine, lost = self.padded(chosen, each, padding, E), self.tokens(each), []

        def kept(weights):
            keep = torch.zeros_like(weights)
            for r in range(self.size):
                begin = sum(each[:r])
                for e in range(E):
                    pairs = [(begin + t, k) for t, k in (sent[begin : begin + each[r]] == e).nonzero().tolist()]
                    if drop == "affinity":
                        pairs.sort(key=lambda pair: -float(weights[pair]))
                    for pair in pairs[:capacity]:
                        keep[pair] = 1.0
            lost.append(int((keep[mine][sent[mine] < E] == 0).sum()))
            return keep

        self.exchange(name, exchange, chosen, each, backend, kept, padding=padding)
        self.said[name + ", counts"] = [exchange.dropped.tolist(), [lost[0], int((sent[mine] < E).sum())]]

    def nodes(self, name, number, chosen, each, backend=None, **settings):
        """Nodes of equally many processes, two experts each; and how many rows go over the network."""
        size = self.size // number
        axes = []
        for parts in (
            [[n * size + p for n in range(number)] for p in range(size)],
            [[n * size + p for p in range(size)] for n in range(number)],
        ):
            groups = [dist.new_group(ranks) for ranks in parts]
            mine, group = next((ranks, g) for ranks, g in zip(parts, groups, strict=True) if self.rank in ranks)
            axes.append(Axis("expert", group.group_name, len(mine), mine.index(self.rank)))
        exchange = NodeLimited(2 * self.size, *axes, **settings)
        across, rows = axes[0].group, []

        def counted(x, received, sent, axis):
            if axis.group == across and not backend:
                rows.append(sum(sent) - sent[axis.rank])
            return all_to_all(x, received, sent, axis)

        message.all_to_all = counted
        self.exchange(name, exchange, chosen, each, backend, width=200 if settings else D)
        message.all_to_all = all_to_all
        # a token of this process in each other node where it chose an expert, or several
        there = {
            (t, e // (2 * size)) for t, of_token in enumerate(chosen[self.tokens(each)].tolist()) for e in of_token
        }
        others = [pair for pair in there if pair[1] != self.rank // size]
        # the first message; in FP8 the gradient goes the same way
        self.said[name + ", rows"] = [rows[:1], [] if backend else [len(others)]]

    def model(self, name, each, backend=None, *, halves=False, **settings):
        """A whole model: its loss, its logits, every gradient and the load of every expert.

        ``halves``: in this process, of its tokens in three sequences.
        """
        config, T = TINY, sum(each)
        whole = CausalLM(config)
        whole.initialize()
        part = CausalLM(config)
        part.load_state_dict(whole.state_dict())
        layers = to_expert_parallel(part, self.axis, **settings)
        assert layers == ["model.layers.1.mlp"], layers
        torch.manual_seed(1)
        ids, targets = torch.randint(config.vocab_size, (2, T))
        lengths = [[1, n // 2, n - 1 - n // 2] if halves else [n] for n in each]
        expected = self._step(whole, ids, targets, [n for own in lengths for n in own])
        mine, own = self.tokens(each), lengths[self.rank]
        actual = self._step(part, ids[mine], targets[mine], own, backend, sum(own[:2]) if halves else None)
        share = self.axis.share(config.n_routed_experts, "experts")
        expected["logits"] = expected["logits"][mine]
        for key, value in list(actual.items()):
            if ".experts." in key:
                expected[key] = expected[key][share]
            elif key != "logits":
                dist.all_reduce(value)
        self.compare(name, actual, expected)

    @staticmethod
    def _step(model, ids, targets, lengths, backend=None, first_half=None):
        ends = torch.tensor([0, *lengths]).cumsum(0)
        positions = torch.cat([torch.arange(n) for n in lengths])

        def loss_of(model, ids, targets):
            logits = model(ids, positions, ends.to(torch.int32), first_half=first_half)
            return nn.functional.cross_entropy(logits, targets, reduction="sum"), logits

        run = torch.compile(loss_of, fullgraph=True, backend=backend) if backend else loss_of
        loss, logits = run(model.train(), ids, targets)
        loss.backward()
        found = {"loss": loss.detach(), "logits": logits.detach()}
        found |= {name: p.grad for name, p in model.named_parameters()}
        return found | {"load": model.model.layers[1].mlp.gate.tokens_per_expert}

    def compare(self, name, actual, expected):
        """Keep the largest difference of each tensor, as a share of the largest number in it."""
        assert list(actual) == list(expected), (name, list(actual), list(expected))
        found = {}
        for key, value in actual.items():
            wanted = expected[key]
            assert value.shape == wanted.shape, (name, key, value.shape, wanted.shape)
            scale = float(wanted.abs().max()) if wanted.numel() else 0.0
            difference = float((value - wanted).abs().max()) if wanted.numel() else 0.0
            found[key] = difference / (scale or 1.0)
        self.said[name] = found


class Rounded(nn.Module):
    """An exchange of tokens rounded to FP8, with the gradient of the identity."""

    def __init__(self, exchange):
        super().__init__()
        self.exchange = exchange

    def forward(self, x, weights, chosen, ffn):
        return self.exchange(straight_through(x, torch.float8_e4m3fn, 1, 128, False), weights, chosen, ffn)


def of_kind(kind, experts):
    if kind.startswith("trained"):
        experts.__class__, experts.saved = TrainedFP8Experts, kind.split()[1]
    holder = nn.ModuleDict({"experts": experts})
    if kind.startswith("fp8"):
        to_fp8(holder, wanted=lambda name: True, activations=kind != "fp8 weights")
    return holder["experts"]


def uniform(T, K, E, seed=0):
    """``[T, K]``: K different experts for each token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(T, E, generator=generator).topk(K).indices


def main(folder):
    dist.init_process_group("gloo")
    worker = Worker()
    R, axis = worker.size, worker.axis
    torch._dynamo.config.capture_scalar_outputs = True
    even, full, uneven = [6] * R, [12] * R, [3 + 4 * (i % 3) for i in range(R)]
    for L in (1, 2, 4):
        worker.exchange(f"{L} a process", Dropless(L * R, axis), uniform(6 * R, min(3, L * R), L * R), even)
    E, dropless = 2 * R, Dropless(2 * R, axis)
    of_uneven = uniform(sum(uneven), 2, E)
    worker.exchange("uneven", dropless, of_uneven, uneven)
    worker.exchange("all to one", dropless, torch.full((sum(uneven), 1), 1), uneven)
    worker.exchange("empty experts", dropless, uniform(sum(even), 2, 3), even)
    silent = [0 if i == R - 1 else 5 for i in range(R)]
    worker.exchange("a process without tokens", dropless, uniform(sum(silent), 2, E), silent)
    worker.exchange("no tokens at all", dropless, uniform(0, 2, E), [0] * R)

    worker.capacity("dropped by affinity", "affinity", 1.0, full)
    worker.capacity("dropped by position", "position", 1.0, full)
    worker.capacity("half dropped", "affinity", 0.3, full)
    worker.capacity("nothing dropped", "affinity", 100.0, full)
    worker.capacity("padding by affinity", "affinity", 0.5, full, padding=7)
    worker.capacity("padding by position", "position", 0.5, full, padding=7)
    worker.capacity("padding alone", "affinity", 1.0, full, padding=12)

    # one block of 128 columns and a part of one; not a multiple of 16
    fp8 = Dropless(E, axis, dispatch="fp8")
    for kind in ("fp8", "fp8 weights", "trained fp8", "trained high"):
        worker.exchange(f"experts {kind}", dropless, of_uneven, uneven, kind=kind, width=200)
    worker.exchange("dispatch in fp8", fp8, of_uneven, uneven, width=200)
    bounded = Capacity(E, axis, capacity_factor=2 * R, dispatch="fp8")
    worker.exchange("dispatch in fp8 with a capacity", bounded, uniform(sum(even), 2, E), even, width=200)

    for name, number in (("nodes of one", R), ("one node", 1), *([("two nodes", 2)] if R == 4 else [])):
        worker.nodes(name, number, uniform(sum(uneven), 3, E), uneven)
    worker.nodes("nodes and a process without tokens", 2, uniform(sum(silent), 3, E), silent)
    worker.nodes("nodes in fp8", 2, uniform(sum(uneven), 3, E), uneven, dispatch="fp8")

    # 3 tokens in two chunks, 7 in one of 3 and one of 4; of none, none in each
    worker.exchange("chunks", Chunked(dropless, 2), of_uneven, uneven)
    worker.exchange("chunks and a process without tokens", Chunked(dropless, 3), uniform(sum(silent), 2, E), silent)
    worker.exchange("chunks compiled by aot_eager", Chunked(dropless, 2), of_uneven, uneven, "aot_eager")

    worker.model("model", uneven)
    worker.model("halves", uneven, halves=True)
    worker.model("halves with a capacity", full, halves=True, mode="capacity", capacity_factor=8)
    if R == 2:
        worker.model("halves compiled by aot_eager", uneven, "aot_eager", halves=True)
        worker.exchange("compiled by aot_eager", dropless, of_uneven, uneven, "aot_eager")
        worker.capacity("capacity compiled by aot_eager", "affinity", 1.0, full, "aot_eager")
        worker.exchange("dispatch in fp8 compiled by aot_eager", fp8, of_uneven, uneven, "aot_eager", width=200)
        worker.nodes("nodes compiled by aot_eager", 2, uniform(sum(uneven), 3, E), uneven, "aot_eager")
        worker.model("model compiled by aot_eager", uneven, "aot_eager")
        worker.exchange("compiled by inductor", dropless, of_uneven, uneven, "inductor")
    (folder / f"said{worker.rank}.json").write_text(json.dumps(worker.said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
