"""Whole models for the suite ``gpu``: ours and transformers', with random weights, stepped by hand at chosen batches.

Each sequence has tokens of its own: rows that are alike would all choose the same experts. Sampling is in nobody's time.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any
from unittest import mock

import torch

import deepfuse as df
from deepfuse.blocks.fp8 import to_fp8
from deepfuse.runtime.config_json import config_object
from deepfuse.runtime.latent_cache import Sequence
from deepfuse.runtime.weight_layout import lay_side_by_side

STEPS = 8
"""Decode steps of a timed call: the context hardly changes over them."""


class Ours:
    """A built model.

    Args:
        batches: sizes that decode graphs are made for.
    """

    def __init__(
        self,
        config: df.Config,
        *,
        device: torch.device,
        fp8: bool,
        batches: Collection[int],
        max_seq_len: int,
        compile: bool = True,
    ):
        causal_lm = random_model(config, device, fp8=fp8)
        with _buckets(batches):
            self.model = df.build(
                causal_lm, device=device, max_batch_size=max(batches), max_seq_len=max_seq_len, compile=compile
            )
        self.vocab_size = config.vocab_size
        self.places: list[Sequence] = []

    def steps(self, batch: int, context: int) -> Callable[[], None]:
        """``STEPS`` steps of so many sequences, over and over from the same context; :meth:`release` ends it."""
        engine = self.model.engine
        for _ in range(batch):
            self.places.append(engine.cache.allocate(context + STEPS))
        for prompt, place in zip(prompts(batch, context, self.vocab_size), self.places, strict=True):
            engine.prefill([prompt], [place], last_only=True)
        tokens = prompts(STEPS, batch, self.vocab_size)

        def run() -> None:
            for place in self.places:
                place.length = context
            for ids in tokens:
                engine.decode(ids, self.places)

        return run

    def release(self) -> None:
        """Give the cache back."""
        for place in self.places:
            self.model.engine.cache.release(place)
        self.places = []

    def prefill(self, tokens: int) -> Callable[[], object]:
        prompt = prompts(1, tokens, self.vocab_size)
        return lambda: self.model.engine.prefill(prompt, [None], last_only=True)


class Transformers:
    """The same architecture in transformers, in bfloat16."""

    def __init__(self, config: df.Config, *, device: torch.device, compiled: bool):
        import transformers

        loaded = transformers.AutoConfig.for_model(**config_object(config, torch.bfloat16))
        with device:
            self.model = transformers.AutoModelForCausalLM.from_config(loaded, dtype=torch.bfloat16).eval()
        self.device, self.compiled, self.vocab_size = device, compiled, config.vocab_size
        self.forward: Any = self.model.forward
        if compiled:
            mode = "reduce-overhead" if device.type == "cuda" else "default"
            self.forward = torch.compile(self.model.forward, dynamic=False, mode=mode)

    @torch.no_grad()
    def steps(self, batch: int, context: int) -> Callable[[], None]:
        """As :meth:`Ours.steps`; compiled over a static cache, else over one that grows."""
        import transformers

        kinds = transformers.StaticCache, transformers.DynamicCache
        room = {"max_cache_len": context + STEPS} if self.compiled else {}
        cache = kinds[not self.compiled](config=self.model.config, **room)
        ids = torch.tensor(prompts(batch, context, self.vocab_size), device=self.device)
        self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens = prompts(STEPS, batch, self.vocab_size)

        @torch.no_grad()
        def run() -> None:
            for i, ids in enumerate(tokens):
                if self.compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                positions = torch.full((batch, 1), context + i, device=self.device)
                ids_B1 = torch.tensor(ids, device=self.device)[:, None]
                self.forward(ids_B1, past_key_values=cache, use_cache=True, position_ids=positions)
            if self.compiled:
                for layer in cache.layers:
                    layer.cumulative_length.fill_(context)
            else:
                cache.crop(-STEPS)

        return run

    def release(self) -> None:
        """Nothing: each call of :meth:`steps` has a cache of its own."""

    def prefill(self, tokens: int) -> Callable[[], object]:
        ids = torch.tensor(prompts(1, tokens, self.vocab_size), device=self.device)

        @torch.no_grad()
        def run() -> object:
            return self.forward(ids, use_cache=False, logits_to_keep=1)

        return run


@torch.no_grad()
def random_model(config: df.Config, device: torch.device, *, fp8: bool) -> df.CausalLM:
    """In bfloat16, drawn on the device: a processor takes minutes for as many numbers. In FP8 if so."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            causal_lm = df.CausalLM(config)
    finally:
        torch.set_default_dtype(default)
    for name, parameter in causal_lm.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=config.initializer_range)
    if fp8:
        to_fp8(causal_lm)
    lay_side_by_side(causal_lm, with_experts=device.type == "cuda")
    return causal_lm


def prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Random tokens, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (count, length), generator=generator).tolist()


@contextlib.contextmanager
def _buckets(batches: Collection[int]) -> Iterator[None]:
    """A build makes a decode graph for each power of two: a minute each, for batches that nobody measures here."""
    wanted = sorted(batches)
    with mock.patch("deepfuse.runtime.engine.buckets", lambda _: iter(wanted)):
        yield
