"""Which orders of a graph are tried: no rule of the list scheduler is the best for all of them, and it is quick.

collectives     as the graph issues them; or by depth, so that those of parallel chains alternate
reach           collectives that work may be moved across: what is moved far lives long
coarse          times a gap that what fills it may be long. With a message that takes as long as two of three products, the
                third belongs under the next one; with gaps shorter than any product, one of them covers several
"""

import itertools
import math
from collections.abc import Iterator, Sequence

from deepfuse.passes.overlap_schedule import Task, in_order, schedule

REACHES = (2, 4, 8, 16, 32)
COARSE = (1.0, 4.0, math.inf)


def orders(tasks: Sequence[Task]) -> Iterator[list[int]]:
    """Of all tasks; those that move work less far come first."""
    for starts in dict.fromkeys((tuple(starts_of(tasks)), tuple(by_depth(tasks)))):
        for reach, coarse in itertools.product(REACHES, COARSE):
            yield schedule(tasks, starts, reach, coarse)


def starts_of(tasks: Sequence[Task]) -> list[int]:
    """What starts collectives, in the order of the graph."""
    return [i for i, task in enumerate(tasks) if task.link_seconds is not None]


def by_depth(tasks: Sequence[Task]) -> list[int]:
    """Starts, ordered by how many collectives lie on the longest way to each."""
    depth = [0] * len(tasks)
    for number in in_order(tasks):
        depth[number] = max((depth[a] + (tasks[a].link_seconds is not None) for a in tasks[number].after), default=0)
    return sorted(starts_of(tasks), key=lambda s: (depth[s], s))
