"""Models to be timed side by side: ours, transformers' (eager or compiled) and llama.cpp's, with the same weights.

Each gives calls to time: ``steps(context)`` makes ``STEPS`` decode steps behind so many tokens, ``prefill(tokens)`` one
prefill, ``training()`` one step of training. Prefills and training steps have other tokens in each call, as in use: libraries
that prepare for a number of rows (oneDNN writes code for it) meet other numbers at every expert. What they compute is compared in tests/benchmarks/test_stepping.py.
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import deepfuse as df
from deepfuse.runtime.latent_cache import Sequence

STEPS = 8
"""Decode steps a timed call makes: the context hardly changes over them."""
SEQUENCES, LENGTH = 2, 256
"""Of a training step."""

Call = Callable[[], torch.Tensor]


class Ours:
    """A built model, stepped by hand."""

    def __init__(self, folder: Path, dtype: torch.dtype, max_seq_len: int, *, compile: bool = True):
        self.max_seq_len = max_seq_len
        self.model = df.build(
            folder, device="cpu", dtype=dtype, max_batch_size=1, max_seq_len=max_seq_len, compile=compile
        )
        self.vocab_size = self.model.engine.model.config.vocab_size
        self.places: list[Sequence] = []

    def _place(self, tokens: int) -> Sequence:
        self.places.append(self.model.engine.cache.allocate(tokens))
        return self.places[-1]

    def release(self) -> None:
        """Give the cache back for the next measurement."""
        for place in self.places:
            self.model.engine.cache.release(place)
        self.places = []

    def steps(self, context: int) -> Call:
        engine = self.model.engine
        place = self._place(self.max_seq_len)
        engine.prefill([prompt(context, self.vocab_size)], [place], last_only=True)

        def run() -> torch.Tensor:
            place.length = context
            for i in range(STEPS):
                logits = engine.decode([i], [place])
            return logits[0]

        return run

    def prefill(self, tokens: int) -> Call:
        engine = self.model.engine
        place = self._place(tokens)
        number = itertools.count()

        def run() -> torch.Tensor:
            ids = prompt(tokens, self.vocab_size, next(number))
            return engine.prefill([ids], [place], last_only=True)[0]

        return run


class Transformers:
    """transformers' model; compiled, with a static cache."""

    def __init__(self, folder: Path, dtype: torch.dtype, max_seq_len: int, *, compiled: bool):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.max_seq_len, self.compiled = max_seq_len, compiled
        self.forward: Any = torch.compile(self.model.forward, dynamic=False) if compiled else self.model.forward

    def _cache(self) -> Any:
        if self.compiled:
            return transformers.StaticCache(config=self.model.config, max_cache_len=self.max_seq_len)
        return transformers.DynamicCache(config=self.model.config)

    def _prompt(self, tokens: int, number: int = 0) -> torch.Tensor:
        return torch.tensor([prompt(tokens, self.model.config.vocab_size, number)])

    @torch.no_grad()
    def steps(self, context: int) -> Call:
        cache = self._cache()
        self.model.forward(self._prompt(context), past_key_values=cache, use_cache=True)

        @torch.no_grad()
        def run() -> torch.Tensor:
            if self.compiled:
                for layer in cache.layers:
                    layer.cumulative_length.fill_(context)  # it cannot be cropped
            for i in range(STEPS):
                positions = torch.tensor([[context + i]])
                out = self.forward(torch.tensor([[i]]), past_key_values=cache, use_cache=True, position_ids=positions)
            if not self.compiled:
                cache.crop(-STEPS)
            return out.logits[0, -1].float()

        return run

    def prefill(self, tokens: int) -> Call:
        number = itertools.count()

        @torch.no_grad()
        def run() -> torch.Tensor:
            ids = self._prompt(tokens, next(number))
            return self.forward(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()

        return run


class LlamaCpp:
    """llama.cpp, through its Python package; reads what `gguf_export.py` wrote."""

    def __init__(self, path: Path, dtype: torch.dtype, max_seq_len: int):
        import gguf  # no dependencies of ours: the suite says where they are missing
        import llama_cpp

        threads = torch.get_num_threads()
        self.last_logits = llama_cpp.llama_get_logits_ith
        kinds = gguf.GGMLQuantizationType
        cached = int({torch.float32: kinds.F32, torch.bfloat16: kinds.BF16}[dtype])  # float16 if nothing is said
        self.llama = llama_cpp.Llama(
            str(path),
            type_k=cached,
            type_v=cached,
            n_ctx=max_seq_len,
            n_batch=max_seq_len,
            n_ubatch=max_seq_len,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def _logits(self) -> torch.Tensor:
        row = self.last_logits(self.llama.ctx, -1)
        return torch.from_numpy(np.ctypeslib.as_array(row, (self.llama.n_vocab(),)).copy())

    def steps(self, context: int) -> Call:
        tokens = prompt(context, self.llama.n_vocab())

        def run() -> torch.Tensor:
            if self.llama.n_tokens < context:
                self.llama.reset()
                self.llama.eval(tokens)
            self.llama.n_tokens = context  # what is behind it is dropped from the cache by the next call
            for i in range(STEPS):
                self.llama.eval([i])
            return self._logits()

        return run

    def prefill(self, tokens: int) -> Call:
        number = itertools.count()

        def run() -> torch.Tensor:
            self.llama.reset()
            self.llama.eval(prompt(tokens, self.llama.n_vocab(), next(number)))
            return self._logits()

        return run


def prompt(tokens: int, vocab_size: int, number: int = 0) -> list[int]:
    """The same random tokens for every model; a single one repeated would always go to the same few experts."""
    return _text(vocab_size, tokens, number).tolist()


def disagreement(calls: Mapping[str, Callable[[], torch.Tensor]], dtype: torch.dtype) -> str | None:
    """Why the calls are not of one model, which alone can be timed side by side; ``None`` where their logits agree.

    In float32 the order of sums is all that differs; in bfloat16 each of some ten roundings a layer is 2**-9 of its value,
    and a token may take another expert: with llama.cpp, which rounds at other places, 0.13 was seen. A model that is another
    one differs by the size of the logits, by 1 and more.
    """
    bound = 1e-3 if dtype == torch.float32 else 0.3
    (first, expected), *others = [(label, call()) for label, call in calls.items()]
    for label, logits in others:
        off = float((logits - expected).norm() / expected.norm())
        if not off < bound:
            return f"{label} and {first} differ by {off:.2g} in the norm of their logits, more than {bound}"
    return None


def our_training(model: df.CausalLM, dtype: torch.dtype, *, compile: bool = True) -> Callable[[], float]:
    """Steps of our trainer: weights and moments in float32, forward and backward in ``dtype``."""
    training = df.Training(steps=1 << 20, batch_size=SEQUENCES, seq_len=LENGTH, dtype=dtype)
    trainer = df.build(model, training=training, compile=compile)
    tokens = _text(model.config.vocab_size)
    return lambda: trainer.train_step(tokens)


def transformers_training(folder: Path, dtype: torch.dtype, *, compiled: bool) -> Callable[[], float]:
    """The same of transformers' model: float32 weights and moments, its own loss under autocast, the same optimizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model.forward, dynamic=False) if compiled else model.forward
    number = itertools.count()

    def run() -> float:
        ids = torch.tensor(prompt(SEQUENCES * LENGTH, model.config.vocab_size, next(number))).view(SEQUENCES, LENGTH)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return run


def _text(vocab_size: int, tokens: int = 1 << 14, number: int = 0) -> np.ndarray:
    return np.random.default_rng(number).integers(0, vocab_size, size=tokens).astype(np.uint16)
