"""What ``build`` returns: a compiled language model that scores, generates and saves.

Dims: B sequences, T tokens a sequence (padded), V vocabulary.
"""

import contextlib
import operator
import sys
from collections.abc import Generator, Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepfuse.blocks.config import Config
from deepfuse.runtime.engine import Engine
from deepfuse.runtime.generation import Request, Sampling, Speed, generate_tokens
from deepfuse.runtime.generation_config import GenerationConfig
from deepfuse.runtime.out_file import check_out_file
from deepfuse.runtime.placement_file import save_loads
from deepfuse.runtime.processes import Processes
from deepfuse.runtime.report import Report
from deepfuse.runtime.save import save_checkpoint
from deepfuse.runtime.stop_strings import TextStream
from deepfuse.runtime.tokenizer import Tokenizer

Prompt = str | Many[int]


class Model:
    """A built model. Not thread-safe: calls share one cache."""

    def __init__(
        self,
        engine: Engine,
        report: Report,
        *,
        max_seq_len: int,
        tokenizer: Tokenizer | None,
        defaults: GenerationConfig,
        source: Path | None,
        processes: Processes | None = None,
    ):
        self.engine, self.report, self.max_seq_len = engine, report, max_seq_len
        self.tokenizer, self.defaults, self.source = tokenizer, defaults, source
        self.processes = processes or Processes()

    @property
    def config(self) -> Config:
        return self.engine.model.config

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, last_only: bool = False) -> Tensor:
        """Logits of the next token.

        Args:
            input_ids: ``[B, T]`` integers.
            attention_mask: ``[B, T]``, 1 for tokens and 0 for padding, on either side; ``None``: all are tokens.
            last_only: only those of each sequence's last token.

        Returns:
            ``[B, T, V]`` float32 (0 at padding), or ``[B, V]``.

        Raises:
            ValueError: a sequence is empty or longer than ``max_seq_len``, an id is out of range, or padding stands
                between tokens.
        """
        with self.engine.telling():
            return self._logits(input_ids, attention_mask, last_only)

    def _logits(self, input_ids: Tensor, attention_mask: Tensor | None, last_only: bool) -> Tensor:
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(f"model: want input_ids [B, T] of integers, got {list(input_ids.shape)} {input_ids.dtype}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise ValueError(f"model: want attention_mask {list(input_ids.shape)}, got {list(mask.shape)}")
        mask = mask.bool().cpu()
        one_sided = mask.long().diff(dim=1).abs().sum(1) <= 1
        if not bool(one_sided.all()):
            raise ValueError("model: want padding on one side of each sequence, got padding between tokens or on both")
        prompts = [row[m].tolist() for row, m in zip(input_ids.cpu(), mask, strict=True)]
        logits = self._batched(self._checked(prompts), last_only)
        if last_only:
            return logits
        out = logits.new_zeros(*input_ids.shape, logits.shape[-1])
        out[mask.to(out.device)] = logits
        return out

    def _batched(self, prompts: list[list[int]], last_only: bool) -> Tensor:
        size = self.engine.max_batch_size
        self.engine.check_same("model", (prompts, last_only))
        parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        logits = [self.engine.prefill(part, [None] * len(part), last_only=last_only) for part in parts]
        self._finish()
        return torch.cat(logits) if logits else torch.zeros(0, self.config.vocab_size, device=self.engine.device)

    def _finish(self) -> None:
        """The end of a call of all processes."""
        self.engine.finish()
        self.report.dropped, self.report.choices = self.engine.drops()

    def score(self, texts: Many[Prompt]) -> list[Tensor]:
        """Log-probabilities, in nats, of each token but the first, given those before it: ``[T - 1]`` a text.

        A string is read with its beginning-of-text token, so that all of its own tokens are scored.

        Raises:
            TypeError: ``texts`` is one text instead of a list of them.
            ValueError: a text is empty, has an id out of range, or is longer than ``max_seq_len``.
        """
        with self.engine.telling():
            if _is_one(texts):
                raise TypeError("score: want a list of texts, got a single one")
            prompts = self._checked([self._ids(t) for t in texts])
            self.engine.check_same("score", prompts)
            scores = []
            for prompt in prompts:
                logits = self.engine.prefill([prompt], [None], last_only=False)[:-1]
                following = torch.tensor(prompt[1:], device=logits.device)
                scores.append(logits.log_softmax(-1).gather(-1, following[:, None])[:, 0])
            self._finish()
            return scores

    def generate(
        self,
        prompts: Prompt | Many[Prompt],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: str | Many[str] = (),
        stop_token_ids: Many[int] | None = None,
        stream: bool = False,
    ) -> Any:
        """Continue prompts.

        Args:
            prompts: strings or lists of token ids, of any lengths; or one of them.
            max_new_tokens, temperature, top_k, top_p: ``None`` takes the checkpoint's ``generation_config.json``;
                temperature 0 is greedy.
            seed: the same seed gives the same text, whatever else is in the batch.
            stop: strings (or one) that end a text; they are not part of the result.
            stop_token_ids: tokens that end a text; ``None`` takes the checkpoint's end-of-text tokens.
            stream: return an iterator of pieces instead: of strings for one prompt, of ``(prompt number, piece)`` for
                several. Pieces are token ids where prompts are.

        Returns:
            What follows each prompt: strings for strings, lists of ids for ids, in the prompts' order; for a single
            prompt that is no list, a single one. An interrupt (Ctrl-C) returns what there is; over axes ``tensor`` and
            ``expert`` it is raised, and the other processes raise an error.

        Raises:
            ValueError: a prompt is empty, has an id out of range, or does not fit ``max_seq_len`` with its continuation.
        """
        with self.engine.telling():
            single = _is_one(prompts)
            listed: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item, arg-type]
            sampling, stops = (
                self._sampling(max_new_tokens, temperature, top_k, top_p, seed, stop_token_ids),
                _strings(stop),
            )
            ids = self._checked([self._ids(p) for p in listed])
            as_text = [isinstance(p, str) for p in listed]
            if any(as_text) and not all(as_text):
                raise TypeError("generate: want prompts all strings or all token ids, got both")
            if stops and not all(as_text):
                raise ValueError("generate: want string prompts with stop strings, got token ids; use stop_token_ids")
            return self._run(ids, sampling, stops, text=all(as_text), single=single, stream=stream)

    def _run(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        stop: tuple[str, ...],
        *,
        text: bool,
        single: bool,
        stream: bool,
    ) -> Any:
        pieces = self._pieces(prompts, self._fitting(prompts, sampling), stop, text=text)
        if stream:
            return _of_one(pieces) if len(prompts) == 1 else pieces
        results = self._collect(pieces, len(prompts), text=text)
        return results[0] if single else results

    def _fitting(self, prompts: list[list[int]], sampling: Sampling) -> Sampling:
        """As many new tokens as were asked for, or as fit where none were."""
        longest = max((len(p) for p in prompts), default=0)
        room = self.max_seq_len - longest
        if room < 1:
            raise ValueError(
                f"generate: want prompts shorter than max_seq_len = {self.max_seq_len} tokens, got {longest}; "
                "build with a larger max_seq_len"
            )
        if sampling.max_new_tokens is None:
            return replace(sampling, max_new_tokens=min(self.defaults.max_new_tokens, room))
        if sampling.max_new_tokens > room:
            raise ValueError(
                f"generate: want prompt + max_new_tokens <= max_seq_len = {self.max_seq_len}, got {longest} + "
                f"{sampling.max_new_tokens}; ask for at most {room}, or build with a larger max_seq_len"
            )
        return sampling

    def _collect(self, pieces: Generator[tuple[int, Any], None, None], count: int, *, text: bool) -> list[Any]:
        collected: list[list[Any]] = [[] for _ in range(count)]
        try:
            for index, piece in pieces:
                collected[index].append(piece)
        except KeyboardInterrupt as error:
            if not self.engine.lockstep.alone:
                pieces.throw(error)  # it may have come here, and not there
                raise
            # what was generated so far is the answer
        return ["".join(parts) for parts in collected] if text else collected

    def _pieces(
        self, prompts: list[list[int]], sampling: Sampling, stop: tuple[str, ...], *, text: bool
    ) -> Generator[tuple[int, Any], None, None]:
        speed = Speed()
        streams: list[TextStream] = []
        try:
            streams += [TextStream(self._tokenizer(), stop) for _ in prompts] if text else []
            self.engine.check_same("generate", (prompts, sampling, stop))
            for request, token in generate_tokens(self.engine, prompts, sampling, speed):
                if not text:
                    if request.finish != "stop":
                        yield request.index, token
                    continue
                piece = self._text_piece(streams[request.index], request, token)
                if piece:
                    yield request.index, piece
            self.engine.finish()
        except GeneratorExit:
            if not sys.is_finalizing():
                self.engine.finish()  # the others are not done
            raise
        except BaseException as error:
            self.engine.tell(error)
            if isinstance(error, KeyboardInterrupt):
                # what might have become a stop string was generated as well
                for index, stream in enumerate(streams):
                    if rest := stream.finish():
                        yield index, rest
            raise
        finally:
            self.report.prefill_tokens_per_second = speed.prefill_tokens / max(speed.prefill_seconds, 1e-9)
            self.report.decode_tokens_per_second = speed.decode_tokens / max(speed.decode_seconds, 1e-9)
            self.report.dropped, self.report.choices = self.engine.drops()

    def _text_piece(self, stream: TextStream, request: Request, token: int) -> str:
        if request.finish == "stop":
            return stream.finish()
        piece = stream.push(token)
        if stream.stopped:
            request.finish = "stop"
        elif request.finish:
            piece += stream.finish()
        return piece

    def chat(self, messages: Many[Mapping[str, str]], **options: Any) -> Any:
        """Answer a conversation ``[{"role": ..., "content": ...}, ...]`` with a string; options as in :meth:`generate`.

        Raises:
            ValueError: the model has no chat template.
        """
        with self.engine.telling():
            tokenizer = self._tokenizer()
            ids = self._checked([tokenizer.encode(tokenizer.chat(messages), add_bos=False)])
            stream, stop = options.pop("stream", False), _strings(options.pop("stop", ()))
            return self._run(ids, self._sampling(**options), stop, text=True, single=True, stream=stream)

    def expert_loads(self, path: str | Path | None = None) -> Tensor:
        """How many tokens have chosen each expert since the build, of a model built with ``count_loads=True``.

        Over a mesh all processes call it, and each gets the sum over the tokens of all.

        Args:
            path: of a JSON file to write them to as well, for ``place_experts``.

        Returns:
            ``[L, E]`` int64 on the CPU, of the layers with experts in order. Padding counts nothing.

        Raises:
            ValueError: nobody counts, or the file cannot be written.
        """
        with self.processes.raising_together("expert loads"):
            counted = self.engine.loads()
            if counted is None:
                raise ValueError(
                    "expert_loads: want a model built with count_loads=True, which has experts, got one that counts nothing"
                )
            with torch.no_grad():
                loads = self.processes.sum_over_tokens(counted).cpu()
            if path is not None and self.processes.axes.rank == 0:
                # behind the sum, in which the others would wait
                check_out_file(Path(path), "expert_loads: want path")
                save_loads(loads, path)
        return loads

    def save(self, path: str | Path) -> None:
        """Write a Hugging Face checkpoint directory, which transformers and :func:`build` load.

        Over a mesh all processes call it, and the first writes the whole model.
        """
        save_checkpoint(self.engine.model, Path(path), source=self.source, processes=self.processes)

    def graph(self, stage: str, name: str | None = None) -> str:
        """A graph as runnable Python: ``before:PASS`` or ``after:PASS``, of the graph ``prefill``, ``decode_1``, ...;

        the first that has the stage where no name is given.
        """
        return self.report.journal.graph(stage, name)

    def explain(self, name: str) -> str:
        """What a pass did at each of its sites, graph by graph: rewritten, or why not."""
        return self.report.journal.explain(name)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("model: want a tokenizer for text, got a model without tokenizer.json; pass token ids")
        return self.tokenizer

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._tokenizer().encode(prompt)
        try:
            # compiled graphs check no dtype: floats would be read as the integers their bits are
            return [operator.index(token) for token in prompt]
        except TypeError:
            raise TypeError(f"model: want a prompt as a string or as integers, got {prompt!r:.80}") from None

    def _checked(self, prompts: list[list[int]]) -> list[list[int]]:
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"model: want at least one token a prompt, got none in prompt {i}")
            if len(prompt) > self.max_seq_len:
                raise ValueError(
                    f"model: want at most max_seq_len = {self.max_seq_len} tokens, got {len(prompt)} in prompt {i}; "
                    "build with a larger max_seq_len"
                )
            low, high = min(prompt), max(prompt)
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"model: want token ids in 0 .. {self.config.vocab_size - 1}, got {low if low < 0 else high} in "
                    f"prompt {i}"
                )
        return prompts

    def _sampling(
        self,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop_token_ids: Many[int] | None = None,
    ) -> Sampling:
        d = self.defaults
        stops = stop_token_ids if stop_token_ids is not None else (d.eos_token_ids or self.config.eos_token_ids)
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=d.temperature if temperature is None else temperature,
            top_k=d.top_k if top_k is None else top_k,
            top_p=d.top_p if top_p is None else top_p,
            seed=seed,
            stop_token_ids=tuple(stops),
        )


def _is_one(prompts: Prompt | Many[Prompt]) -> bool:
    """Whether this is one prompt, and not a list of them."""
    if isinstance(prompts, str) or len(prompts) == 0:
        return isinstance(prompts, str)
    # a number, of Python, of an array or of a tensor
    return isinstance(prompts[0], int | float) or getattr(prompts[0], "ndim", None) == 0


def _of_one(pieces: Generator[tuple[int, Any], None, None]) -> Iterator[Any]:
    # closed with it, and not when it is forgotten, where errors go nowhere
    with contextlib.closing(pieces):
        for _, piece in pieces:
            yield piece


def _strings(stop: str | Many[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple) or not all(isinstance(s, str) for s in stops):
        raise TypeError(f"generate: want stop as a string or a list of strings, got {stop!r}")
    return tuple(stops)
