"""The functions that a model's graphs are captured of, and what they are called with.

Dims: T tokens, B sequences, P pages a sequence, R rows.
"""

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from deepfuse.blocks.model import CausalLM
from deepfuse.ir.private import mark_unbacked
from deepfuse.runtime.latent_cache import Sequence


def prefill(model: CausalLM, caches: list[Tensor], tokens: Tensor, q_start: Tensor, rows: Tensor) -> Tensor:
    """``tokens [3, T]``: ids, positions, slots; ``q_start [B + 1]``; ``rows [R]`` -> logits ``[R, vocab]``."""
    # every argument is given: torch 2.11 cannot read back a graph that depends on a default value
    return model(
        tokens[0],
        tokens[1],
        q_start,
        slots=tokens[2],
        block_table=None,
        seqlens=None,
        caches=caches,
        rows=rows,
        first_half=None,
        second_start=None,
    )


def prefill_in_halves(
    model: CausalLM,
    caches: list[Tensor],
    first: Tensor,
    first_start: Tensor,
    first_rows: Tensor,
    second: Tensor,
    second_start: Tensor,
    second_rows: Tensor,
) -> Tensor:
    """What :func:`prefill` is given, of each half of the sequences -> logits of the rows of both.

    The halves go through the layers by turns (``blocks/two_batch.py``).
    """
    tokens, first_half = torch.cat((first, second), 1), first.shape[1]
    return model(
        tokens[0],
        tokens[1],
        first_start,
        slots=tokens[2],
        block_table=None,
        seqlens=None,
        caches=caches,
        rows=torch.cat((first_rows, second_rows + first_half)),
        first_half=first_half,
        second_start=second_start,
    )


def decode(model: CausalLM, caches: list[Tensor], step: Tensor, block_table: Tensor) -> Tensor:
    """``step [4, B]``: ids, positions, slots, sequence lengths; ``block_table [B, P]`` -> logits ``[B, vocab]``."""
    q_start = torch.arange(step.shape[1] + 1, dtype=torch.int32, device=step.device)
    return model(
        step[0],
        step[1],
        q_start,
        slots=step[2],
        block_table=block_table,
        seqlens=step[3].to(torch.int32),
        caches=caches,
        rows=None,
        first_half=None,
        second_start=None,
    )


def prefill_inputs(
    prompts: Many[Many[int]],
    places: Many[Sequence | None],
    device: torch.device,
    *,
    last_only: bool,
    padding: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, starts and rows for :func:`prefill`; ``padding``: tokens behind the prompts that nobody asked about."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    ends = [0]
    for prompt, place in zip(prompts, places, strict=True):
        ids += prompt
        positions += range(len(prompt))
        # without a place in the cache, latents go to the page that is nobody's
        slots += [0] * len(prompt) if place is None else [place.slot(i) for i in range(len(prompt))]
        ends.append(len(ids))
    # of no sequence, a row all the same
    rows = ([end - 1 for end in ends[1:]] if last_only else list(range(len(ids)))) or [0]
    # padding stands behind the last sequence, which is empty where there is none
    ends += [] if prompts else [0]
    nothing = [0] * padding
    # a compiled graph checks no dtype, and an empty list would be float32
    tokens = torch.tensor([ids + nothing, positions + nothing, slots + nothing], dtype=torch.int64, device=device)
    q_start = torch.tensor(ends, dtype=torch.int32, device=device)
    rows_R = torch.tensor(rows, dtype=torch.int64, device=device)
    for tensor, dim in ((tokens, 1), (q_start, 0), (rows_R, 0)):
        mark_unbacked(tensor, dim)
    return tokens, q_start, rows_R


def example_prefill(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What a prefill graph is captured with."""
    return prefill_inputs([[0, 0, 0], [0, 0]], [None, None], device, last_only=True)


def example_prefill_in_halves(device: torch.device) -> tuple[Tensor, ...]:
    """The same in halves."""
    return (*example_prefill(device), *example_prefill(device))


def decode_inputs(
    ids: Many[int], places: Many[Sequence], device: torch.device, *, bucket: int, pages: int
) -> tuple[Tensor, Tensor]:
    """Steps and block table for :func:`decode`; ``bucket``: sequences, beyond those given padding; ``pages``: of each."""
    padding = bucket - len(ids)
    step = torch.tensor(
        [
            [*ids, *[0] * padding],
            [*(p.length for p in places), *[0] * padding],
            [*(p.slot(p.length) for p in places), *[0] * padding],
            [*(p.length + 1 for p in places), *[0] * padding],
        ],
        dtype=torch.int64,
        device=device,
    )
    table = [[*p.pages[:pages], *[0] * (pages - len(p.pages))] for p in places] + [[0] * pages] * padding
    block_table = torch.tensor(table, dtype=torch.int64, device=device)
    if device.type == "cpu":
        mark_unbacked(block_table, 1)
    return step, block_table


def example_decode(bucket: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same of a decode graph."""
    return decode_inputs([], [], device, bucket=bucket, pages=2)
