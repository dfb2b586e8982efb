"""Sets of moments as intervals ``(began, ended)`` of integers, the end not among them."""

from collections.abc import Iterable

Interval = tuple[int, int]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same moments in order, as few intervals as there can be, none of them empty."""
    merged: list[Interval] = []
    for began, ended in sorted(i for i in intervals if i[0] < i[1]):
        if merged and began <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], ended)
        else:
            merged.append((began, ended))
    return merged


def length(intervals: Iterable[Interval]) -> int:
    """How long they are together; what is in several counts once."""
    return sum(ended - began for began, ended in union(intervals))


def difference(those: Iterable[Interval], without: Iterable[Interval]) -> list[Interval]:
    """Moments of the first that are in none of the others."""
    holes = union(without)
    left: list[Interval] = []
    at = 0
    for began, ended in union(those):
        # a hole may reach over several
        while at < len(holes) and holes[at][1] <= began:
            at += 1
        # not a slice, which would copy all that follow
        for hole_began, hole_ended in map(holes.__getitem__, range(at, len(holes))):
            if hole_began >= ended:
                break
            left.append((began, hole_began))
            began = max(began, hole_ended)
        left.append((began, ended))
    return [i for i in left if i[0] < i[1]]


def intersection(those: Iterable[Interval], these: Iterable[Interval]) -> list[Interval]:
    """Moments that are in both."""
    those = union(those)
    return difference(those, difference(those, these))
