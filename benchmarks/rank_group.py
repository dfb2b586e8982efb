"""What a script that is one of several ranks does around its measurement."""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from deepfuse.blocks.axis import Axis


def in_group(measure: Callable[[list[dict[str, Any]], Axis], Any]) -> None:
    """Measure the specs of the command line, which are JSON, on one thread; rank 0 prints what was found, as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world: Any = dist.group.WORLD
    axis = Axis("expert", world.group_name, dist.get_world_size(), dist.get_rank())
    found = measure(json.loads(sys.argv[1]), axis)
    if axis.rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()
