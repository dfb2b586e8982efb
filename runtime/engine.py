"""The compiled graphs of a model and their calls: one prefill graph, and one decode graph for each batch bucket.

    prefill   tokens of fresh sequences, one after the other, of any number and length -> logits of chosen rows;
              over processes perhaps others for many tokens, see ``runtime/large_prefill.py``
    decode    one token of each of B sequences, B = 1, 2, 4 .. max_batch_size; a smaller batch is padded into it
              (``runtime/steps.py`` has them)

Both write the latent cache. All graphs are captured when the engine is made; afterwards a call checks nothing and
compiles nothing.

Over processes, a call is one for all of them; see ``runtime/lockstep.py``.
Dims: T tokens, B sequences, P pages a sequence, R rows.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from deepfuse.blocks.capacity import Capacity
from deepfuse.blocks.exchange import Local
from deepfuse.blocks.load_counter import LoadCounter
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.moe import MoE
from deepfuse.ir.private import capture, load_captured, sizes_from_data, with_own_code
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.passes.journal import naming
from deepfuse.passes.runner import Runner
from deepfuse.runtime.axes import Axes
from deepfuse.runtime.blame import RankError
from deepfuse.runtime.compile_cache import BuildFolder
from deepfuse.runtime.cuda_graph import CudaGraph, Graph
from deepfuse.runtime.heartbeat import watched
from deepfuse.runtime.latent_cache import LatentCache, Sequence
from deepfuse.runtime.lockstep import Call, Lockstep
from deepfuse.runtime.overlap_form import LargePrefill, in_form
from deepfuse.runtime.prompt_halves import halves_of
from deepfuse.runtime.steps import (
    decode,
    decode_inputs,
    example_decode,
    example_prefill,
    example_prefill_in_halves,
    prefill,
    prefill_in_halves,
    prefill_inputs,
)
from deepfuse.runtime.told_once import everywhere
from deepfuse.runtime.uninterrupted import uninterrupted

ROWS = 16
"""Of a CPU's tile in bfloat16. oneDNN writes code for each number of rows that it multiplies: 15 ms for a prompt of a new
length, where the shipped model's prefill of 512 tokens takes 19 ms. There are few lengths in whole tiles, which cost the same."""


class Engine:
    """A model, its cache and its graphs."""

    def __init__(
        self,
        model: CausalLM,
        cache: LatentCache,
        runner: Runner,
        *,
        max_batch_size: int,
        folder: BuildFolder | None,
        lockstep: Lockstep | None = None,
        together: bool = False,
        large: Many[LargePrefill] = (),
    ):
        """Capture all graphs, and try each out.

        Args:
            folder: where compiled graphs are kept; ``None`` runs the graphs as the passes leave them, uncompiled.
            lockstep: with the processes that each call is made with; ``None`` where this is the only one.
            together: whether compiled graphs are not tried out yet, but by :meth:`try_out`, when others have theirs.
            large: forms for many tokens, the first of them that fits a call; none where one graph serves any number.
        """
        self.model, self.cache, self.runner, self.folder = model, cache, runner, folder
        self._together = together
        self.large = tuple(large)
        self._models = {"prefill": model, **{each.graph: in_form(model, each.form) for each in self.large}}
        self.max_batch_size = max_batch_size
        self.device = cache.layers[0].device
        self.lockstep = lockstep or Lockstep(Axes(), self.device)
        exchanges = [m.exchange for m in model.modules() if isinstance(m, MoE)]
        self._counters = [m for m in model.modules() if isinstance(m, LoadCounter)]
        self.static = all(isinstance(exchange, Local | Capacity) for exchange in exchanges)
        """Whether no exchange waits to learn how much comes; then CUDA can record a step."""
        self.buckets = tuple(buckets(max_batch_size))
        by_onednn = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
        self.multiple = ROWS if by_onednn and self.device.type == "cpu" else 1
        """Of tokens, to which a prefill is padded."""
        self.graphs_from_cache = 0
        self._within = False
        self.calls = 0
        """Of the model, since it was built; those made for other processes, too."""
        began = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad(), sizes_from_data():
            self._prefills = {name: self._graph(name, *self._prefill_step_of(name)) for name in self._models}
            self._decode = {
                b: self._graph(f"decode_{b}", decode, *example_decode(b, self.device)) for b in self.buckets
            }
        self._forget_counts()
        self.compile_seconds = time.perf_counter() - began

    @torch.inference_mode(False)
    @torch.no_grad()
    def try_out(self) -> None:
        """Run each compiled graph once, and have CUDA record what it can; all processes come here at once."""
        args: tuple[Any, ...]
        for name, graph in self._prefills.items():
            _, *given = self._prefill_step_of(name)
            graph(self._models[name], self.cache.layers, *given)
        for bucket, graph in self._decode.items():
            args = (self.model, self.cache.layers, *example_decode(bucket, self.device))
            graph(*args)
            self._decode[bucket] = self._recorded(graph, decode, args)
        self._forget_counts()

    def _prefill_step_of(self, name: str) -> tuple[Any, ...]:
        """The function of a prefill graph, and what it is captured with."""
        if any(each.graph == name and each.form.halves for each in self.large):
            return prefill_in_halves, *example_prefill_in_halves(self.device)
        return prefill, *example_prefill(self.device)

    def _graph(self, name: str, fn: Graph, *example: Tensor) -> Graph:
        args = (self._models.get(name, self.model), self.cache.layers, *example)
        if self.folder is None:
            compiled = torch.compile(with_own_code(fn), fullgraph=True, dynamic=False, backend=self.runner.backend())
            with naming(name):
                compiled(*args)
            return compiled
        graph = self._load(name, args)
        if graph is not None:
            self.graphs_from_cache += 1
        else:
            text = f"compiling {name} (kept for the next build)"
            # a minute of silence would look as if nothing happened; off a terminal it prints nothing
            with naming(name), Console(stderr=True).status(text):
                graph, data = capture(fn, args, self.runner.options())
            self.folder.write(f"{name}.graph", data)
            if not self._together:
                graph(*args)
        return graph if self._together else self._recorded(graph, fn, args)

    def _recorded(self, graph: Graph, fn: Graph, args: tuple[Any, ...]) -> Graph:
        return CudaGraph(graph, args) if self.device.type == "cuda" and fn is decode and self.static else graph

    def _load(self, name: str, args: tuple[Any, ...]) -> Graph | None:
        """The graph of an earlier build; ``None`` if there is none, or it is damaged."""
        assert self.folder is not None
        try:
            graph = load_captured(self.folder.graph_path(name).read_bytes())
            if not self._together:  # else it runs with others, and only when all have theirs
                graph(*args)
        except Exception:  # noqa: BLE001 - unpickling damaged bytes may raise anything, as may the code that they hold
            return None
        return graph

    @property
    def from_cache(self) -> bool:
        """Whether nothing was compiled."""
        return self.graphs_from_cache == graphs_of(self.max_batch_size, self.large)

    def _capacities(self) -> list[Capacity]:
        return [m for m in self.model.modules() if isinstance(m, Capacity)]

    def _forget_counts(self) -> None:
        """Of calls that nobody asked for."""
        for exchange in self._capacities():
            exchange.dropped.zero_()
        for counter in self._counters:
            counter.tokens.zero_()

    def drops(self) -> tuple[int, int]:
        """Choices of experts that exchanges have dropped, and all choices, since the engine was made."""
        counts = [exchange.dropped for exchange in self._capacities()]
        dropped, choices = torch.stack(counts).sum(0).tolist() if counts else (0, 0)
        return dropped, choices

    def loads(self) -> Tensor | None:
        """``[L, E]`` int64, tokens of this process for each expert since the engine was made; ``None``: nobody counts."""
        return torch.stack([counter.tokens for counter in self._counters]) if self._counters else None

    @contextlib.contextmanager
    def wrapped(self, wrap: Callable[[str, Graph], Graph]) -> Iterator[None]:
        """Inside, each graph is what ``wrap`` makes of its name and of itself."""
        prefill, decode = self._prefills, self._decode
        self._prefills = {name: wrap(name, graph) for name, graph in prefill.items()}
        self._decode = {b: wrap(f"decode_{b}", graph) for b, graph in decode.items()}
        try:
            yield
        finally:
            self._prefills, self._decode = prefill, decode

    # whatever the caller's mode, as graphs are made for this one
    @torch.inference_mode(False)
    @torch.no_grad()
    def prefill(self, prompts: Many[Many[int]], places: Many[Sequence | None], *, last_only: bool) -> Tensor:
        """Logits ``[R, vocab]`` float32 of the prompts' last tokens, or of all their tokens one after the other.

        Args:
            prompts: token ids of fresh sequences, none empty.
            places: their places in the cache; ``None`` keeps nothing.
        """
        with self._call("prefill"):
            return self._prefill_step(prompts, places, last_only=last_only)

    def _prefill_step(self, prompts: Many[Many[int]], places: Many[Sequence | None], *, last_only: bool) -> Tensor:
        first, halves = halves_of(prompts) if any(each.form.halves for each in self.large) else (0, (0, 0))
        call = self.lockstep.agree(sum(map(len, prompts)), 0, halves)
        form = self._form(call)
        parts, most = [slice(None)], call.tokens
        if form is not None and form.form.halves:
            parts, most = [slice(first), slice(first, None)], call.largest_half
        inputs: list[Tensor] = []
        for part in parts:
            tokens = sum(map(len, prompts[part]))
            # where what comes is not measured, all processes send as much
            padding = most - tokens if self.lockstep.equal else 0
            padding += -(tokens + padding) % self.multiple
            inputs += prefill_inputs(prompts[part], places[part], self.device, last_only=last_only, padding=padding)
        logits = self._call_prefill(form, inputs)
        for prompt, place in zip(prompts, places, strict=True):
            if place is not None:
                place.length = len(prompt)
        return logits

    @torch.inference_mode(False)
    @torch.no_grad()
    def decode(self, ids: Many[int], places: Many[Sequence]) -> Tensor:
        """Logits ``[B, vocab]`` float32 after one more token of each sequence."""
        own = next(b for b in self.buckets if b >= len(ids))
        with self._call("decode"):
            while True:
                call = self.lockstep.agree(0, own)
                if not call.tokens:
                    break
                self._pad_prefill(call)
            logits = self._decode_step(ids, places, call.bucket)
        for place in places:
            place.length += 1
        return logits[: len(ids)]

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish(self) -> None:
        """Take part in what other processes still have to do, until none has anything; every process must come here."""
        while True:
            with self._call("padding"):
                call = self.lockstep.agree(0, 0)
                if call.tokens:
                    self._pad_prefill(call)
                elif call.bucket:
                    self._decode_step([], [], call.bucket)
                else:
                    return

    @contextlib.contextmanager
    def _call(self, phase: str) -> Iterator[None]:
        """A call of all processes, which ends before a Ctrl-C does anything."""
        with contextlib.nullcontext() if self.lockstep.alone else uninterrupted(), watched(phase, self.calls):
            self._within = True
            try:
                yield
                self._within = False
            except Exception as error:
                self._within = not everywhere(error)
                raise

    def check_same(self, what: str, value: object) -> None:
        """:meth:`Lockstep.check_same`, which a call of all processes begins with."""
        with self._call("checking"):
            self.lockstep.check_same(what, value)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """A call of all processes, of which each hears what another one's error is."""
        try:
            yield
        except BaseException as error:
            self.tell(error)
            raise

    def tell(self, error: BaseException) -> None:
        """Have the others end what they do with this process, for its error: at once, where it is between two calls.

        In the middle of one, they are in a collective, and learn of it when this process ends.
        """
        lost = isinstance(error, RankError) or everywhere(error)
        if not (self.lockstep.alone or self._within or lost):
            with watched("telling", self.calls):
                self.lockstep.tell(error)

    def _pad_prefill(self, call: Call) -> None:
        padding = call.tokens if self.lockstep.equal else 1
        # it has no halves, so that nobody's are taken
        inputs = prefill_inputs([], [], self.device, last_only=True, padding=padding)
        self._call_prefill(self._form(call), inputs)

    def _form(self, call: Call) -> LargePrefill | None:
        """By what all processes have agreed on, so that all take the same."""
        for each in self.large:
            tokens = 2 * call.least_half if each.form.halves else call.tokens
            if tokens and tokens >= each.tokens:
                return each
        return None

    def _call_prefill(self, form: LargePrefill | None, inputs: Many[Tensor]) -> Tensor:
        self.calls += 1
        name = "prefill" if form is None else form.graph
        return self._prefills[name](self._models[name], self.cache.layers, *inputs)

    def _decode_step(self, ids: Many[int], places: Many[Sequence], bucket: int) -> Tensor:
        # CUDA graphs want one shape; elsewhere only the pages in use are read
        pages = self.cache.pages_per_sequence
        if self.device.type == "cpu":
            pages = max((p.length // PAGE_SIZE + 1 for p in places), default=1)
        inputs = decode_inputs(ids, places, self.device, bucket=bucket, pages=pages)
        self.calls += 1
        return self._decode[bucket](self.model, self.cache.layers, *inputs)


def buckets(max_batch_size: int) -> Iterator[int]:
    """1, 2, 4, ... and ``max_batch_size`` itself."""
    size = 1
    while size < max_batch_size:
        yield size
        size *= 2
    yield max_batch_size


def graphs_of(max_batch_size: int, large: Many[LargePrefill]) -> int:
    """How many an engine has."""
    return 1 + len(large) + len(list(buckets(max_batch_size)))
