"""What one rank's share of a step has to do, by kind of layer and part of it: read off the graphs after the passes.

The share is a model of its own, cut to a layer of each kind. It is captured on fake tensors, rewritten and lowered as any
build, and each site brings its op's own cost; what ATen computes between them is counted as the loops that Inductor fuses it
into (:mod:`deepfuse.profiling.fused_loops`). Costs are affine in the sequences of a step, and those of routed experts in
the rows that come for them and in the slots (experts) of a rank; so two captures give them for every batch, and three for
every number of ranks.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from deepfuse.blocks.config import Config
from deepfuse.blocks.fp8 import to_fp8
from deepfuse.blocks.fp8_training import train_in_fp8
from deepfuse.blocks.model import CausalLM
from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.device import Device
from deepfuse.ir.private import SITE, uncompiled_backend, with_own_code
from deepfuse.passes.pipeline import default
from deepfuse.passes.runner import Runner
from deepfuse.passes.sites import Site
from deepfuse.profiling.fake_step import Workload, hopper
from deepfuse.profiling.fused_loops import fused_loops
from deepfuse.profiling.size_expression import evaluated
from deepfuse.profiling.view_ops import is_view
from deepfuse.runtime.losses import next_token_loss
from deepfuse.runtime.weight_layout import lay_side_by_side, layout_key

Phase = Literal["prefill", "decode", "train"]
PARTS = ("attention", "dense", "norm", "router", "shared", "permute", "routed", "head")
"""Of a step: norms are those between blocks, and the head is what is outside of layers."""
_OF_MODULE = {"self_attn": "attention", "mlp": "dense", "mlp.gate": "router", "mlp.shared_experts": "shared"}
LOOPS = "loops"
"""Name of an :class:`OpWork` that is no op: a part's fused loops in a graph, all together."""
_OF_OP = {"expert_permute": "permute", "permute_quantize": "permute", "expert_unpermute": "permute"}


Place = tuple[str, str]
"""Kind of layer, empty for the head; and part."""
_ROWS, _SLOTS = 4096, 8
"""Of the captures of routed experts: any size with more rows than slots."""


@dataclass(frozen=True, slots=True)
class OpWork:
    """One op: what it costs, the dtype its products are computed in, its kernels, and whether the backward graph has it; or all
    the loops of a part in a graph."""

    op: str
    cost: Cost
    dtype: torch.dtype
    launches: float = 1.0
    backward: bool = False


@dataclass(frozen=True, slots=True)
class Captured:
    """Of one capture.

    Attributes:
        ops: of one layer.
        weight_bytes: likewise.
        activation_bytes: the most that results of one layer and the head hold at once.
        saved_bytes: what a training step keeps for the gradient, of one layer.
    """

    ops: Mapping[Place, tuple[OpWork, ...]]
    weight_bytes: Mapping[Place, int]
    activation_bytes: int
    saved_bytes: Mapping[Place, int]


class RankWork:
    """Of a rank, for any number of sequences, rows and slots."""

    def __init__(self, config: Config, workload: Workload, phase: Phase, *, fp8: bool, device: Device):
        """Capture. ``config``, ``workload``: the rank's share; see :func:`captured`."""
        self.sequences = workload.sequences

        def step(times: int) -> Captured:
            more = replace(workload, sequences=times * workload.sequences)
            return captured(config, more, phase, fp8=fp8, device=device)

        def experts(rows: int, slots: int) -> Captured:
            kind: Phase = "train" if phase == "train" else "prefill"
            return captured(experts_alone(config, slots), Workload("rows", 1, rows), kind, fp8=fp8, device=device)

        self.base, self._twice = step(1), step(2)
        self._routed = None
        if config.n_routed_experts is not None:
            self._routed = experts(_ROWS, _SLOTS), experts(2 * _ROWS, _SLOTS), experts(_ROWS, 2 * _SLOTS)

    def ops(self, place: Place, sequences: float) -> list[OpWork]:
        """Of one layer in a step of so many sequences; fractions are as good as any."""
        one, two = self.base.ops.get(place, ()), self._twice.ops.get(place, ())
        return [_at(sequences / self.sequences - 1, a, b) for a, b in zip(one, two, strict=True)]

    def routed_ops(self, part: str, rows: float, slots: int) -> list[OpWork]:
        """``routed`` or ``permute`` of a layer, of rows that came for so many experts."""
        assert self._routed is not None
        base, more_rows, more_slots = (c.ops["sparse", part] for c in self._routed)
        # with fewer rows than slots, a weight a row at most is read
        steps = _steps(rows, min(slots, rows))
        return [
            OpWork(
                a.op,
                _at(steps[0], a, b).cost + _at(steps[1], a, c).cost + _times(-1.0, a.cost),
                a.dtype,
                a.launches + steps[0] * (b.launches - a.launches) + steps[1] * (c.launches - a.launches),
                a.backward,
            )
            for a, b, c in zip(base, more_rows, more_slots, strict=True)
        ]

    def routed_saved(self, part: str, rows: float, slots: int) -> float:
        """What of it a training step keeps for the gradient: quantized weights as well."""
        assert self._routed is not None
        base, more_rows, more_slots = (c.saved_bytes.get(("sparse", part), 0) for c in self._routed)
        by_rows, by_slots = _steps(rows, slots)
        return base + by_rows * (more_rows - base) + by_slots * (more_slots - base)

    def slot_bytes(self) -> float:
        """Of the weights of one expert of one layer."""
        return 0.0 if self._routed is None else self._routed[0].weight_bytes["sparse", "routed"] / _SLOTS


def _steps(rows: float, slots: float) -> tuple[float, float]:
    """From the first capture, in units of the way to the two others."""
    return rows / _ROWS - 1, slots / _SLOTS - 1


def _at(step: float, one: OpWork, two: OpWork) -> OpWork:
    """On the line through a first cost and a second, so many steps behind the first."""
    assert (one.op, one.backward) == (two.op, two.backward), f"{one.op} became {two.op} with a larger step"
    cost = _times(1 - step, one.cost) + _times(step, two.cost)
    return OpWork(one.op, cost, one.dtype, (1 - step) * one.launches + step * two.launches, one.backward)


def _times(factor: float, cost: Cost) -> Cost:
    return Cost(factor * cost.flops, factor * cost.bytes)


def experts_alone(config: Config, slots: int) -> Config:
    """A layer as a rank sees its experts: whatever comes is for one of them."""
    return replace(
        config, n_routed_experts=slots, num_experts_per_tok=1, n_group=1, topk_group=1, n_shared_experts=None,
        num_hidden_layers=1, mlp_layer_types=("sparse",),
    )  # fmt: skip


def captured(config: Config, workload: Workload, phase: Phase, *, fp8: bool, device: Device) -> Captured:
    """A step of ``config``, with a layer of each kind that it has.

    Args:
        workload: ``tokens`` of each sequence are 1 in decode.
        fp8: whether weights and activations of decoder layers are FP8; else all is bfloat16 (float32 on a CPU).
        device: what the passes decide for; it need not be here.
    """
    kinds = list(dict.fromkeys(config.feed_forward(i) for i in range(config.num_hidden_layers)))
    cut = replace(config, num_hidden_layers=len(kinds), mlp_layer_types=tuple(kinds), num_nextn_predict_layers=0)
    # a gradient wants a device that is there; the passes are told of the other
    dtype, place = compute_dtype(device), torch.device("cpu" if phase == "train" else device.kind)
    with torch.device("meta"):
        model = CausalLM(cut).to(dtype)
    if fp8 and phase != "train":
        to_fp8(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device=place).train(phase == "train")
        if fp8 and phase == "train":
            for weight in train_in_fp8(model):
                weight.data = weight.data.float()
        if phase != "train":
            lay_side_by_side(model, with_experts=False)
        # experts of other ranks are no neighbours of a shared one
        pipeline = default().without("merge_shared_expert")
        settings = {"providers": {}, "device": device, "max_seq_len": 2 * workload.cached, "layout": layout_key(model)}
        graphs = _graphs(model, workload, phase, Runner(pipeline, settings, strict=True), dtype, place)
    ops = defaultdict(list)
    loops: dict[tuple[Place, bool], list[int]] = defaultdict(list)
    for backward, graph in zip((False, True), graphs, strict=False):
        for site in graph.sites:
            flops, size = evaluated(site.flops, {}), evaluated(site.bytes, {})
            if flops is not None and size is not None:
                cost = Cost(flops, size)
                ops[_place(site, kinds)].append(OpWork(site.op, cost, getattr(torch, site.dtype), backward=backward))
        for site, size in graph.loops:
            loops[_place(site, kinds), backward].append(size)
    for at in {**ops, **{place: () for place, _ in loops}}:
        for backward in (False, True)[: len(graphs)]:
            # one for each part, however many there are: a step of another size may have others
            sizes = loops[at, backward]
            ops[at].append(OpWork(LOOPS, Cost(0, sum(sizes)), dtype, len(sizes), backward))
    weights: dict[Place, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        weights[_place(Site(0, name.removeprefix("model."), ""), kinds)] += tensor_bytes(parameter)
    saved: dict[Place, int] = defaultdict(int)
    for site, size in graphs[0].results if phase == "train" else []:
        saved[_place(site, kinds)] += size
    return Captured({k: tuple(v) for k, v in ops.items()}, weights, max(g.peak_bytes for g in graphs), saved)


def compute_dtype(device: Device) -> torch.dtype:
    """Of activations."""
    return torch.bfloat16 if device.kind == "cuda" else torch.float32


@dataclass(frozen=True, slots=True)
class _Graph:
    """After the passes: its sites, the bytes of its results and of its loops with their sites, and of all that is alive at
    once."""

    sites: list[Site]
    results: list[tuple[Site, int]]
    loops: list[tuple[Site, int]]
    peak_bytes: int


def _graphs(
    model: CausalLM, workload: Workload, phase: Phase, runner: Runner, dtype: torch.dtype, place: torch.device
) -> list[_Graph]:
    found: list[_Graph] = []
    peaks: list[int] = []

    def run(hook: str, gm: fx.GraphModule) -> None:
        with hopper(place.type == "cuda"):
            runner.run(gm.graph, hook)
        if hook == "partitioned":
            # an op is one node still: what it is lowered to has results that no loop stores
            peaks.append(_peak_bytes(gm.graph))
        if hook == "last":
            sites = runner.journal.graphs[-1].sites
            # one that goes on outside of a layer is the layer's: the others are not the last
            loops = [(sites[loop.nodes[0].meta[SITE]], loop.bytes) for loop in fused_loops(gm.graph)]
            found.append(_Graph(sites, _results(gm.graph, sites), loops, peaks[-1]))

    fn: Any
    if phase == "train":
        B, T = workload.sequences, workload.tokens
        tokens = torch.empty(B, T + 2, dtype=torch.int64, device=place)
        q_start = torch.empty(B + 1, dtype=torch.int32, device=place)
        fn, given = next_token_loss, [tokens, torch.empty(B * T, dtype=torch.int64, device=place), q_start]
    else:
        fn, inputs = workload.inputs(place)
        given = [workload.caches(model.config, dtype, place), *inputs]  # type: ignore[list-item]
    compiled = torch.compile(with_own_code(fn), fullgraph=True, dynamic=False, backend=uncompiled_backend(run))
    with torch.set_grad_enabled(phase == "train"):
        out = compiled(model, *given)
    if phase == "train":
        out.backward()
    return found


def _place(site: Site, kinds: list[str]) -> Place:
    """Kind of layer and part of a site, or of a parameter's name."""
    layers, _, rest = site.module.partition(".")
    number, _, inside = rest.partition(".")
    if layers != "layers":
        return "", "head"
    kind = kinds[int(number)]
    if site.op in _OF_OP:
        return kind, _OF_OP[site.op]
    if not inside.startswith("self_attn") and (not inside.startswith("mlp") or "norm" in site.op):
        return kind, "norm"
    if inside.startswith("mlp.experts"):
        return kind, "routed"
    names = [name for name in _OF_MODULE if inside == name or inside.startswith(f"{name}.")]
    part = _OF_MODULE[max(names, key=len)]
    # what a mixture of experts adds up itself comes before the next block, like a norm
    return kind, "norm" if (kind, part) == ("sparse", "dense") else part


def _results(graph: fx.Graph, sites: list[Site]) -> list[tuple[Site, int]]:
    nodes = next(n for n in graph.nodes if n.op == "output").all_input_nodes
    return [(sites[n.meta[SITE]], _bytes(n)) for n in nodes if SITE in n.meta]


def _peak_bytes(graph: fx.Graph) -> int:
    """The most that results hold at once, freed behind their last reader; a view is its operand."""
    nodes = list(graph.nodes)
    owner: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        view = node.op == "call_function" and is_view(node.target) and isinstance(node.args[0], fx.Node)
        several = isinstance(node.args[0].meta.get("val"), tuple | list) if view else False  # type: ignore[union-attr]
        owner[node] = owner[node.args[0]] if view and not several else node  # type: ignore[index]
        for read in node.all_input_nodes:
            last[owner[read]] = i
    alive = peak = 0
    freed = defaultdict(list)
    for node, i in last.items():
        freed[i].append(node)
    for i, node in enumerate(nodes):
        if node.op == "call_function" and owner[node] is node and node in last:
            alive += _bytes(node)
            peak = max(peak, alive)
        alive -= sum(_bytes(n) for n in freed[i] if n.op == "call_function")
    return peak


def _bytes(node: fx.Node) -> int:
    """Of a tensor; the parts of a tuple are counted where they are taken out."""
    value = node.meta.get("val")
    return int(tensor_bytes(value)) if isinstance(value, Tensor) else 0
