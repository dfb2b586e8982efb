"""One of the processes of tests/blocks/test_collectives.py: what each collective gives, and its gradient."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.collectives import all_to_all, gather_columns, gather_rows, same_over, sum_over


def main(folder):
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    axis = Axis("expert", dist.group.WORLD.group_name, size, rank)
    said = {}

    def case(name, fn, x):
        for kind, run in (("", fn), (" compiled", torch.compile(fn, fullgraph=True, backend="aot_eager"))):
            leaf = x.clone().requires_grad_()
            out = run(leaf)
            # a gradient of its own for each process and element
            (out * (torch.arange(out.numel()).view_as(out) + 100.0 * rank)).sum().backward()
            said[name + kind] = [out.tolist(), leaf.grad.tolist()]

    # process r has 3 rows of value 10 * r + i; one goes to process 0, two to process 1
    rows = (10.0 * rank + torch.arange(3.0))[:, None]
    case("all_to_all", lambda x: all_to_all(x, [rank + 1] * 2, [1, 2], axis), rows)
    case("sum_over", lambda x: sum_over(x, axis), rows)
    case("same_over", lambda x: same_over(x, axis), rows)
    case("gather_rows", lambda x: gather_rows(x, axis), rows)
    case("gather_columns", lambda x: gather_columns(x, axis), rows)
    (folder / f"said{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
