"""Text generation: prompts in, tokens out one step at a time, batched as sequences come and go.

Prompts beyond ``max_batch_size`` wait; one that finishes makes room for the next.
"""

import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from numbers import Integral, Real

import torch
from torch import Tensor

from deepfuse.ops.sample import sample
from deepfuse.runtime.engine import Engine
from deepfuse.runtime.latent_cache import CacheFullError, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int | None = None
    """``None`` until the caller has settled it: :func:`generate_tokens` wants a number."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Only the so many most likely; 0 for all."""
    top_p: float = 1.0
    """Only the most likely that together reach this probability."""
    seed: int = 0
    """Prompt ``i`` draws with ``seed + i``; a draw depends on seed, place and logits alone."""
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, kind in (
            ("max_new_tokens", Integral),
            ("temperature", Real),
            ("top_k", Integral),
            ("seed", Integral),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) and (name, value) != ("max_new_tokens", None):
                raise TypeError(f"generate: want {name} as {kind.__name__.lower()} number, got {value!r}")
        if not -(1 << 62) <= self.seed < 1 << 62:
            raise ValueError(f"generate: want a seed of at most 62 bits, got {self.seed}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"generate: want max_new_tokens >= 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature <= 1e6:
            raise ValueError(f"generate: want temperature in 0 .. 1e6, got {self.temperature}")
        if not 0 <= self.top_k < 1 << 62:
            raise ValueError(f"generate: want top_k >= 0 and below 2 ** 62, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"generate: want 0 < top_p <= 1, got {self.top_p}")


@dataclass(slots=True)
class Request:
    """One prompt and what has been generated for it."""

    index: int
    prompt: list[int]
    generated: list[int] = field(default_factory=list)
    finish: str = ""
    """``stop`` (a stop token or string), ``length`` (max_new_tokens), or empty while it runs."""
    place: Sequence | None = None


@dataclass(slots=True)
class Speed:
    """Tokens and seconds of one generation."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


def generate_tokens(
    engine: Engine, prompts: Many[Many[int]], sampling: Sampling, speed: Speed
) -> Iterator[tuple[Request, int]]:
    """Yield each token as it is chosen, stop tokens included; set ``request.finish`` to end a request early."""
    assert sampling.max_new_tokens is not None
    waiting = [Request(i, list(p)) for i, p in enumerate(prompts)]
    running: list[Request] = []
    try:
        while waiting or running:
            admitted = _admit(engine, waiting, running, sampling.max_new_tokens)
            running += admitted  # before anything can fail: their pages must come back
            if admitted:
                start = time.perf_counter()
                places = [r.place for r in admitted]
                logits = engine.prefill([r.prompt for r in admitted], places, last_only=True)
                chosen = _choose(logits, admitted, sampling)
                speed.prefill_seconds += time.perf_counter() - start
                speed.prefill_tokens += sum(len(r.prompt) for r in admitted)
                yield from _accept(admitted, chosen, sampling)
            running = _retire(engine, running)
            if not running:
                continue
            start = time.perf_counter()
            places_running = [r.place for r in running if r.place is not None]
            logits = engine.decode([r.generated[-1] for r in running], places_running)
            chosen = _choose(logits, running, sampling)
            speed.decode_seconds += time.perf_counter() - start
            speed.decode_tokens += len(running)
            yield from _accept(running, chosen, sampling)
            running = _retire(engine, running)
    finally:
        # a consumer that stops early, or an interrupt, must not keep pages
        for request in running:
            if request.place is not None:
                engine.cache.release(request.place)


def _admit(engine: Engine, waiting: list[Request], running: list[Request], max_new_tokens: int) -> list[Request]:
    admitted: list[Request] = []
    while waiting and len(running) + len(admitted) < engine.max_batch_size:
        request = waiting[0]
        try:
            request.place = engine.cache.allocate(len(request.prompt) + max_new_tokens)
        except CacheFullError:
            if not running and not admitted:
                raise
            break  # a running sequence will give pages back
        admitted.append(waiting.pop(0))
    return admitted


def _choose(logits: Tensor, requests: list[Request], sampling: Sampling) -> list[int]:
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    device, rows = logits.device, len(requests)
    tokens = sample(
        logits,
        torch.full((rows,), sampling.temperature, dtype=torch.float32, device=device),
        torch.full((rows,), sampling.top_k, device=device),
        torch.full((rows,), sampling.top_p, dtype=torch.float32, device=device),
        torch.tensor([sampling.seed + r.index for r in requests], device=device),
        torch.tensor([len(r.prompt) + len(r.generated) for r in requests], device=device),
    )
    return tokens.tolist()


def _accept(requests: list[Request], chosen: list[int], sampling: Sampling) -> Iterator[tuple[Request, int]]:
    for request, token in zip(requests, chosen, strict=True):
        request.generated.append(token)
        if token in sampling.stop_token_ids:
            request.finish = "stop"
        elif len(request.generated) == sampling.max_new_tokens:
            request.finish = "length"
        yield request, token


def _retire(engine: Engine, running: list[Request]) -> list[Request]:
    for request in running:
        if request.finish and request.place is not None:
            engine.cache.release(request.place)
            request.place = None
    return [r for r in running if not r.finish]
