"""``deepfuse place``: choose where the experts of a served model go, from loads that it counted."""

import json
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(kw_only=True)
class Place:
    """Choose copies and places of experts from loads that ``Model.expert_loads`` wrote, and print the balance they make."""

    loads: Positional[Path]
    """The file of Model.expert_loads(path)."""
    ranks: int
    """Processes that share the experts."""
    redundant: int = 0
    """Further copies of experts in each layer, over all ranks."""
    ranks_per_node: int | None = None
    """All ranks are on one node where it is not given."""
    n_group: int = 1
    """Groups of experts, each of which stays on one node; of node-limited routing."""
    out: Path | None = None
    """File to write, for build(..., parallel=Parallel(placement=FILE))."""
    json: bool = False

    def run(self) -> None:
        from deepfuse.runtime.out_file import check_out_file
        from deepfuse.runtime.placement import place_experts
        from deepfuse.runtime.placement_file import save_placement

        if self.out is not None:
            check_out_file(self.out, "place: want --out")
        placement = place_experts(
            self.loads,
            self.ranks,
            redundant=self.redundant,
            ranks_per_node=self.ranks_per_node,
            n_group=self.n_group,
        )
        if self.out is not None:
            save_placement(placement, self.out)
        if self.json:
            balances = {"before": placement.before.tolist(), "after": placement.after.tolist()}
            print(json.dumps({**balances, "expert_of_slot": placement.expert_of_slot.tolist()}))
        else:
            print(placement)
