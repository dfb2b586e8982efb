"""One axis of a device mesh as blocks see it: a process group, and this process's place in it.

data     replicas: each has tokens of its own
tensor   parts of each weight; all have the same tokens
expert   experts; each has tokens of its own
"""

from dataclasses import dataclass

AXES = ("data", "tensor", "expert")


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis.

    Attributes:
        name: out of ``AXES``.
        group: name of the process group, as functional collectives take it.
        size: processes in the group.
        rank: of this process, in the group.
    """

    name: str
    group: str
    size: int
    rank: int

    def share(self, total: int, what: str) -> slice:
        """This process's part of ``total`` things, which are dealt out evenly and in order.

        Raises:
            ValueError: they do not come out even.
        """
        if total % self.size:
            raise ValueError(
                f"mesh: want {what} divisible by the {self.size} processes of axis {self.name!r}, got {total}; "
                f"choose a size of that axis that divides it"
            )
        each = total // self.size
        return slice(self.rank * each, (self.rank + 1) * each)
