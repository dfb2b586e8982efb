"""Predicted step of a model on a cluster nobody needs to own: time by part, exposed communication, memory, and the overlap.

    step = layers of experts under the best plan + other layers + head + sums over tensor and data ranks

Work is that of the graphs after the passes (:mod:`deepfuse.profiling.layer_work`), times are the rates of
:mod:`deepfuse.profiling.cluster`, and plans those of :mod:`deepfuse.profiling.overlap_choice`. Loads are those of equally
likely experts, but for a factor ``imbalance`` that is given. A training step counts backward with forward; gradients are summed in bfloat16 behind it.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from deepfuse.blocks.config import Config
from deepfuse.ops.quantize import scale_shape
from deepfuse.profiling.cluster import Cluster, Exchange
from deepfuse.profiling.fake_step import Workload
from deepfuse.profiling.layer_work import PARTS, Phase, RankWork, compute_dtype
from deepfuse.profiling.overlap_choice import LayerSeconds, Ops, best, plans

MOST_TOKENS = 1 << 32
"""Of a rank: of more, the bytes of its tensors are beyond 64 bits."""
OPTIMIZER_BYTES = 16
"""A parameter in training: float32 weight, gradient and two moments of Adam; of what is not FP8, a working copy besides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One run.

    Attributes:
        sequences: of each rank of the data and expert axes.
        length: tokens of each sequence; in decode, those that are cached.
        expert: ranks that share the routed experts; each has ``(n_routed_experts + redundant) / expert`` of them.
        imbalance: rows of the busiest rank over the mean of all; ``None``: what chance makes of it (:func:`by_chance`).
        exchange: ``None`` takes direct in decode, and node-limited where a prefill or training step crosses nodes.
    """

    phase: Phase
    sequences: int
    length: int
    expert: int = 1
    tensor: int = 1
    data: int = 1
    fp8: bool = True
    redundant: int = 0
    imbalance: float | None = None
    exchange: Exchange | None = None

    @property
    def gpus(self) -> int:
        return self.data * self.expert * self.tensor

    @property
    def passes(self) -> tuple[bool, ...]:
        """Whether each pass of a step is the backward one."""
        return (False, True) if self.phase == "train" else (False,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Of one rank in one step.

    Attributes:
        parts: seconds by part of all layers, each by itself.
        plans: overlap -> seconds of the step.
        exposed_seconds: what the step takes longer than its computation alone.
        tokens_per_second: of a node.
        memory: bytes by what holds them.
    """

    setup: Setup
    parts: dict[str, float]
    plans: dict[str, float]
    overlap: str
    step_seconds: float
    exposed_seconds: float
    tokens_per_second: float
    memory: dict[str, float]
    fits: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Simulation:
    """A model on a cluster; captures of its graphs are kept, so that setups may differ in ``expert`` for free."""

    def __init__(self, config: Config, cluster: Cluster):
        if "sparse" not in {config.feed_forward(i) for i in range(config.num_hidden_layers)}:
            raise ValueError(
                "simulate: want a model with routed experts, got n_routed_experts None or dense layers only"
            )
        self.config, self.cluster = config, cluster
        self._works: dict[Any, RankWork] = {}

    def predict(self, setup: Setup) -> Prediction:
        """Of one setup.

        Raises:
            ValueError: sizes that do not fit each other, the model or the cluster.
        """
        rank = self._rank(setup)
        layers, others = rank.layers("sparse"), rank.rest()
        computing, stacks = others, Counter[str]()
        for backward in setup.passes:
            at = functools.partial(rank.layer, backward=backward)
            computing += layers * at(1.0).compute
            stacks.update(
                plans(
                    at,
                    layers,
                    can_split=setup.sequences * rank.new_tokens >= 4,
                    busy=self.cluster.busy(decode=setup.phase == "decode"),
                    late=self.cluster.exchange_latency,
                )
            )
        seconds = {name: stack + others + rank.sums() for name, stack in stacks.items()}
        overlap = best(seconds)
        step = seconds[overlap]
        new_tokens = setup.sequences * rank.new_tokens * self.cluster.gpus_per_node / setup.tensor
        memory = rank.memory()
        return Prediction(
            setup=setup,
            parts=rank.parts(),
            plans=seconds,
            overlap=overlap,
            step_seconds=step,
            exposed_seconds=max(step - computing, 0.0),
            tokens_per_second=new_tokens / step,
            memory=memory,
            fits=sum(memory.values()) <= self.cluster.device.memory_bytes,
        )

    def predict_all(self, setups: Sequence[Setup]) -> list[Prediction]:
        """Of each; all are checked before the first is captured."""
        for setup in setups:
            check(self.config, self.cluster, setup)
        return [self.predict(setup) for setup in setups]

    def layer(self, setup: Setup, fraction: float = 1.0, *, backward: bool = False) -> LayerSeconds:
        """One layer of experts by its ops and messages, with a fraction of the tokens, in one pass."""
        return self._rank(setup).layer(fraction, backward=backward)

    def experts(self, setup: Setup, fraction: float = 1.0, *, backward: bool = False) -> LayerSeconds:
        """Its mixture of experts alone, of which the router is what comes first: what a measured one is held against."""
        rank = self._rank(setup)
        router = rank.part("sparse", "router", fraction, backward=backward)
        return replace(rank.layer(fraction, backward=backward), attention=router)

    def _rank(self, setup: Setup) -> "_Rank":
        check(self.config, self.cluster, setup)
        return _Rank(self.config, self.cluster, setup, self._work(setup))

    def _work(self, setup: Setup) -> RankWork:
        key = setup.phase, setup.sequences, setup.length, setup.tensor, setup.fp8
        if key not in self._works:
            new = 1 if setup.phase == "decode" else setup.length
            workload = Workload("rank", setup.sequences, new, cached=setup.length)
            share = share_of(self.config, setup.tensor)
            self._works[key] = RankWork(share, workload, setup.phase, fp8=setup.fp8, device=self.cluster.device)
        return self._works[key]


def share_of(config: Config, tensor: int) -> Config:
    """The model of one of so many tensor ranks: heads, inner widths and vocabulary are divided."""
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // tensor,
        num_key_value_heads=None,
        intermediate_size=config.intermediate_size // tensor,
        moe_intermediate_size=config.moe_intermediate_size // tensor,
        vocab_size=config.vocab_size // tensor,
    )


def by_chance(rows: float, ranks: int) -> float:
    """Rows of the busiest of so many ranks over their mean ``rows``, where each row is as likely to come to any.

    Source: Raab and Steger 1998, Balls into Bins, theorem 1, of many balls: ``m/n + sqrt(2 (m/n) ln n)`` in the fullest of n.
    """
    return 1 + math.sqrt(2 * math.log(ranks) / rows)


def check(config: Config, cluster: Cluster, setup: Setup) -> None:
    """Raise the error of a setup that cannot be."""
    for name in ("sequences", "length", "expert", "tensor", "data"):
        if getattr(setup, name) < 1:
            raise ValueError(f"simulate: want {name} >= 1, got {getattr(setup, name)}")
    if setup.sequences * setup.length > MOST_TOKENS:
        raise ValueError(f"simulate: want sequences * length <= {MOST_TOKENS}, got {setup.sequences} * {setup.length}")
    if setup.redundant < 0 or not 1 <= (1 if setup.imbalance is None else setup.imbalance) < math.inf:
        raise ValueError(
            f"simulate: want redundant >= 0 and a finite imbalance >= 1, got {setup.redundant} and {setup.imbalance}"
        )
    if setup.phase == "prefill" and setup.length < 2:
        raise ValueError(f"simulate: want prompts of a length >= 2, got {setup.length}")
    for name in ("num_attention_heads", "intermediate_size", "moe_intermediate_size", "vocab_size"):
        if getattr(config, name) % setup.tensor:
            raise ValueError(f"simulate: want tensor to divide {name}, got {setup.tensor} and {getattr(config, name)}")
    if setup.tensor > cluster.gpus_per_node or cluster.gpus_per_node % setup.tensor:
        raise ValueError(
            f"simulate: want tensor to divide the GPUs of a node, got {setup.tensor} and {cluster.gpus_per_node}"
        )
    experts = (config.n_routed_experts or 0) + setup.redundant
    if experts % setup.expert:
        raise ValueError(
            f"simulate: want expert to divide n_routed_experts + redundant, got {setup.expert} and {experts}; "
            f"redundant = {setup.redundant + -experts % setup.expert} fits"
        )
    near = cluster.gpus_per_node // setup.tensor
    if setup.expert > near and setup.expert % near:
        raise ValueError(
            f"simulate: want expert ranks that fill nodes, got {setup.expert} with {near} to a node; a multiple of {near} fits"
        )
    if setup.fp8 and cluster.device.kind != "cuda":
        raise ValueError(f"simulate: want no FP8 on {cluster.device.name}, got it; quantize = none fits")


@dataclass(frozen=True, slots=True)
class _Rank:
    config: Config
    cluster: Cluster
    setup: Setup
    work: RankWork

    @property
    def new_tokens(self) -> int:
        """Of each sequence."""
        return 1 if self.setup.phase == "decode" else self.setup.length

    @property
    def slots(self) -> int:
        return ((self.config.n_routed_experts or 0) + self.setup.redundant) // self.setup.expert

    def layers(self, kind: str) -> int:
        return sum(self.config.feed_forward(i) == kind for i in range(self.config.num_hidden_layers))

    def part(self, kind: str, part: str, fraction: float = 1.0, *, backward: bool) -> Ops:
        """Seconds of the ops of one layer with a fraction of the tokens, in one pass."""
        sequences = fraction * self.setup.sequences
        ops = [] if (kind, part) == ("sparse", "routed") else self.work.ops((kind, part), sequences)
        if kind == "sparse" and part in ("routed", "permute"):
            rows = self.rows(fraction)
            # alone, what is permuted for the experts is permuted already
            if part == "routed" or self.setup.expert > 1:
                ops += self.work.routed_ops(part, rows, self.slots)
        return tuple(
            self.cluster.seconds(op.op, op.cost, op.dtype, op.launches, backward=backward)
            for op in ops
            if op.backward == backward
        )

    @property
    def imbalance(self) -> float:
        s = self.setup
        if s.imbalance is not None:
            return s.imbalance
        return by_chance(s.sequences * self.new_tokens * self.config.num_experts_per_tok, s.expert)

    def rows(self, fraction: float) -> float:
        """That come for the experts of the busiest rank."""
        s = self.setup
        return self.imbalance * fraction * s.sequences * self.new_tokens * self.config.num_experts_per_tok

    def layer(self, fraction: float, *, backward: bool) -> LayerSeconds:
        """Of a layer of experts in one pass."""
        inside = {name: self.part("sparse", name, fraction, backward=backward) for name in PARTS}
        dispatch, combine = self.exchanges(fraction, backward=backward)
        return LayerSeconds(
            attention=inside["attention"] + inside["norm"] + inside["router"],
            shared=inside["shared"],
            dispatch=dispatch,
            routed=inside["routed"] + inside["permute"],
            combine=combine,
        )

    def exchanges(self, fraction: float, *, backward: bool) -> tuple[float, float]:
        """Dispatch and combine of a layer in one pass; gradients travel as results do."""
        D = self.config.hidden_size
        high = D * compute_dtype(self.cluster.device).itemsize
        low = D + 4 * scale_shape((1, D), 1, 128)[1] if self.setup.fp8 and not backward else high
        return self._exchange(fraction, low), self._exchange(fraction, high)

    def _exchange(self, fraction: float, row_bytes: int) -> float:
        s = self.setup
        if s.expert == 1:
            return 0.0
        crosses = s.expert * s.tensor > self.cluster.gpus_per_node
        how = s.exchange or ("node_limited" if crosses and s.phase != "decode" else "direct")
        tokens = self.imbalance * fraction * s.sequences * self.new_tokens
        return self.cluster.exchange(self.config, tokens, row_bytes, s.expert, how, s.tensor)

    def rest(self) -> float:
        """Seconds of computation outside of layers of experts."""
        dense = sum(self._whole("dense", name) for name in PARTS)
        return self._whole("", "head") + self.layers("dense") * dense

    def _whole(self, kind: str, part: str) -> float:
        """Seconds of a part of one layer in all passes."""
        return sum(sum(self.part(kind, part, backward=backward)) for backward in self.setup.passes)

    def tensor_sums(self) -> float:
        """Of what attention and feed-forward blocks of all layers add; of their gradients as well."""
        tokens = self.setup.sequences * self.new_tokens
        size = tokens * self.config.hidden_size * compute_dtype(self.cluster.device).itemsize
        times = 2 * self.config.num_hidden_layers * (2 if self.setup.phase == "train" else 1)
        return times * self.cluster.all_reduce(size, self.setup.tensor)

    def gradient_sums(self) -> float:
        """Of what data and expert ranks share, and of the experts over data ranks."""
        s = self.setup
        if s.phase != "train":
            return 0.0
        size, experts = compute_dtype(self.cluster.device).itemsize, self.expert_parameters()
        shared = self.parameters() - experts
        return self.cluster.all_reduce(size * shared, s.data * s.expert) + self.cluster.all_reduce(
            size * experts, s.data
        )

    def sums(self) -> float:
        return self.tensor_sums() + self.gradient_sums()

    def parts(self) -> dict[str, float]:
        """Seconds of all layers by part, computation and communication."""
        kinds = {kind: self.layers(kind) for kind in ("dense", "sparse")} | {"": 1}
        found = {name: sum(n * self._whole(kind, name) for kind, n in kinds.items()) for name in PARTS}
        both = zip(*(self.exchanges(1.0, backward=backward) for backward in self.setup.passes), strict=True)
        dispatch, combine = (kinds["sparse"] * sum(seconds) for seconds in both)
        found |= {"dispatch": dispatch, "combine": combine}
        found |= {"tensor sums": self.tensor_sums(), "gradient sums": self.gradient_sums()}
        return {name: seconds for name, seconds in found.items() if seconds}

    def weights(self) -> float:
        """Bytes."""
        kinds = {kind: self.layers(kind) for kind in ("dense", "sparse")} | {"": 1}
        held = self.work.base.weight_bytes.items()
        others = sum(kinds[kind] * size for (kind, part), size in held if (kind, part) != ("sparse", "routed"))
        return others + self.layers("sparse") * self.slots * self.work.slot_bytes()

    def expert_parameters(self) -> float:
        share = share_of(self.config, self.setup.tensor)
        return self.layers("sparse") * self.slots * 3.0 * share.hidden_size * share.moe_intermediate_size

    def parameters(self) -> float:
        """Of training, where no weight is stored in FP8: of decoder layers float32 where they are trained in FP8."""
        high = compute_dtype(self.cluster.device).itemsize
        in_fp8 = 4 if self.setup.fp8 else high
        kinds = {kind: self.layers(kind) for kind in ("dense", "sparse")}
        held = self.work.base.weight_bytes
        plain = held["", "head"] + sum(
            n * held.get((kind, p), 0) for kind, n in kinds.items() for p in ("norm", "router")
        )
        return plain / high + (self.weights() - plain) / in_fp8

    def saved(self) -> float:
        """Bytes that a training step keeps for the gradient."""
        kept = {place: float(size) for place, size in self.work.base.saved_bytes.items()}
        kept["sparse", "routed"] = self.work.routed_saved("routed", self.rows(1.0), self.slots)
        if self.setup.expert > 1:
            received = self.work.routed_saved("permute", self.rows(1.0), self.slots)
            kept["sparse", "permute"] = kept.get(("sparse", "permute"), 0.0) + received
        return sum((self.layers(kind) if kind else 1) * size for (kind, _), size in kept.items())

    def memory(self) -> dict[str, float]:
        s, base = self.setup, self.work.base
        if s.phase == "train":
            working = 0.0 if s.fp8 else self.weights()
            return {"weights and optimizer": OPTIMIZER_BYTES * self.parameters() + working, "activations": self.saved()}
        tokens = s.sequences * (s.length + (s.phase == "decode"))
        row = self.config.cache_width * compute_dtype(self.cluster.device).itemsize
        cache = tokens * row * self.config.num_hidden_layers
        return {"weights": self.weights(), "cache": float(cache), "activations": float(base.activation_bytes)}
