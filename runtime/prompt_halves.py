"""Prompts of a prefill as two halves of about as many tokens, which ``blocks/two_batch.py`` takes through the layers by turns."""

import itertools
from collections.abc import Sequence

UNEVEN = 1.5
"""Times the smaller half's tokens that the larger may have: what is left over has nothing to run under."""


def halves_of(prompts: Sequence[Sequence[int]]) -> tuple[int, tuple[int, int]]:
    """How many prompts make the first half, and the tokens of the smaller and of the larger half.

    Prompts stay in order and whole. All 0 where the halves would be too uneven.
    """
    ends = list(itertools.accumulate(map(len, prompts)))
    if len(ends) < 2:
        return 0, (0, 0)
    first = min(range(1, len(ends)), key=lambda n: abs(2 * ends[n - 1] - ends[-1]))
    smaller, larger = sorted((ends[first - 1], ends[-1] - ends[first - 1]))
    return (first, (smaller, larger)) if larger <= UNEVEN * smaller else (0, (0, 0))
