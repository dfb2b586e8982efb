"""Processes that compute together run the same graphs, one after the other; over axis ``expert``, each for prompts of its own.

A call of the model is one for all processes of the axes ``tensor`` and ``expert``: each must take part in the collectives of
every layer. So before a call they agree on which it is (prefill goes first, and the largest batch), and a process with
nothing to do takes part in it with padding, until no process has anything left.

    process 0   prefill  decode 2  decode 2  (padding)
    process 1   prefill  decode 2  decode 1  decode 1

Over ``tensor`` the call must be the same. A process with an error, a bad prompt or Ctrl-C, says so instead of the next call.
It costs one reduction of five numbers a call and axis, and nothing without these axes.
"""

import contextlib
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.collectives import largest_over
from deepfuse.runtime.axes import Axes
from deepfuse.runtime.blame import RankError
from deepfuse.runtime.heartbeat import first_line
from deepfuse.runtime.told_once import kind_of, of_kind, settled, told_once

MOST = 2000
"""Bytes of an error that travel."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a call comes to nothing."""

    rank: int
    """Of the process that says so."""
    kind: str
    """Python's name of the error; empty for what is none that others can have."""
    text: str


class Call(NamedTuple):
    """What processes have agreed on."""

    tokens: int
    """To prefill, the most of any process."""
    bucket: int
    """To decode, the largest of any."""
    least_half: int = 0
    """Tokens of a half of the prompts, the fewest of any process; 0 where one of them has no halves."""
    largest_half: int = 0


@dataclass(frozen=True, slots=True)
class Lockstep:
    """What processes agree on before each call."""

    axes: Axes
    device: torch.device
    equal: bool = False
    """Whether a call wants as many tokens on every process."""

    @property
    def alone(self) -> bool:
        """Whether no other process takes part in this one's calls."""
        return self.axes.tensor is None and self.axes.expert is None

    def agree(self, tokens: int, bucket: int, halves: tuple[int, int] = (0, 0)) -> Call:
        """The next call: prefill of any process's tokens, or decode of the largest bucket; 0 and 0 where all are done.

        Args:
            halves: tokens of the smaller and of the larger half, where this process's prompts can be dealt out so.

        Raises:
            ValueError: on all of them, where processes of axis ``tensor`` want different calls.
            Exception: on all of them, what one has told.
        """
        what = "generate: want the same calls, of streams that are read equally far,"
        # halves are of the same prompts over tensor
        return self._over_expert(Call(tokens, bucket, *halves), self._over_tensor(tokens, bucket, None, what))

    def check_same(self, what: str, value: object) -> None:
        """Compare what the processes of axis ``tensor``, which share each token's work, were given.

        Raises:
            ValueError: on each of them, where it is not the same.
        """
        digest = zlib.crc32(repr(value).encode())
        trouble = self._over_tensor(digest, 0, None, f"{what}: want the same")
        if trouble is not None:
            self._over_expert(Call(0, 0), trouble)

    def tell(self, error: BaseException) -> None:
        """Say, instead of the next call, that this process has an error; the others raise it, and so must the caller."""
        # Ctrl-C is nobody else's
        kind = kind_of(error) if isinstance(error, Exception) else ""
        who = f"rank {self.axes.rank}"
        text = f"{who}: {error}" if kind else f"{who} was interrupted ({first_line(error)})"
        trouble = self._over_tensor(0, 0, Trouble(self.axes.rank, kind, text), "")
        with contextlib.suppress(Exception):
            self._over_expert(Call(0, 0), trouble)
        (told_once if kind else settled)(error)

    def _over_tensor(self, first: int, second: int, trouble: Trouble | None, what: str) -> Trouble | None:
        """Whether the two numbers are everybody's."""
        axis = self.axes.tensor
        if axis is None:
            return trouble
        most, trouble = self._largest(axis, [first, second, -first, -second], trouble)
        if trouble is None and (most[0], most[1]) != (-most[2], -most[3]):
            text = (
                f"{what} on the {axis.size} processes of axis {axis.name!r}, which share each token's work, got others on "
                "some of them"
            )
            trouble = Trouble(self.axes.rank, "ValueError", text)
        return trouble

    def _over_expert(self, call: Call, trouble: Trouble | None) -> Call:
        axis = self.axes.expert
        if axis is not None:
            most, trouble = self._largest(axis, [*call[:2], -call.least_half, call.largest_half], trouble)
            tokens, bucket, fewest, largest = most
            call = Call(tokens, bucket, -fewest, largest)
        if trouble is None:
            return call
        if trouble.kind:
            raise told_once(of_kind(trouble.kind, trouble.text))
        raise RankError(trouble.text, ranks=(trouble.rank,), step=None, phase="")

    def _largest(self, axis: Axis, numbers: list[int], trouble: Trouble | None) -> tuple[list[int], Trouble | None]:
        """Of each number; and of all trouble that of the last process that has any."""
        asked = torch.tensor([*numbers, 0 if trouble is None else trouble.rank + 1], device=self.device)
        *most, who = largest_over(asked, axis).tolist()
        if not who:
            return most, None
        told = torch.zeros(MOST, dtype=torch.int64)
        if trouble is not None and trouble.rank + 1 == who:
            # whatever it is made of, it fits: the others wait for it
            written = f"{trouble.kind}\n{trouble.text}".encode(errors="replace")[:MOST]
            told[: len(written)] = torch.tensor(list(written))
        read = bytes(largest_over(told.to(self.device), axis).tolist())
        kind, _, text = read.rstrip(b"\0").decode(errors="ignore").partition("\n")
        return most, Trouble(who - 1, kind, text)
