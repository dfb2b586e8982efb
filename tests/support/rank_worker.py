"""One of the processes of tests/profiling/test_profile_ranks.py, started with torchrun's variables and a folder.

Experts behind an all-to-all, with a shared expert beside it, and an all-reduce; those of the last process take long.
"""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepfuse as df
from deepfuse.ir.device import device_row
from deepfuse.profiling import rank_session
from deepfuse.profiling.clock_offset import exchange

TOKENS, WIDTH, STEPS, SLOW_S = 16, 32, 6, 0.03
AHEAD_NS = 7 * 10**15
"""Of a clock that the last process is given, to find out what it shows more."""


@torch.library.custom_op("rank_worker::experts", mutates_args=())
def experts(x: Tensor, seconds: float) -> Tensor:
    time.sleep(seconds)
    return x * 2


@experts.register_fake
def _(x, seconds):
    return torch.empty_like(x)


class Experts(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        return torch.ops.rank_worker.experts(x, self.seconds)


class Block(nn.Module):
    """``x [T, D]`` -> ``[T, D]``, T of which half goes to each of two processes."""

    def __init__(self, seconds):
        super().__init__()
        self.norm, self.shared_experts, self.experts = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH), Experts(seconds)

    def forward(self, x):
        c10d, halves = torch.ops._c10d_functional, [TOKENS // 2] * 2
        x = self.norm(x)
        there = c10d.all_to_all_single(x, halves, halves, "0")
        shared = self.shared_experts(x)
        y = self.experts(c10d.wait_tensor(there))
        back = c10d.wait_tensor(c10d.all_to_all_single(y, halves, halves, "0"))
        load = c10d.wait_tensor(c10d.all_reduce(y.sum(0), "sum", "0"))
        return back + shared + load


class Model(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.layers = nn.ModuleList([Block(seconds)])

    def forward(self, x):
        return self.layers[0](x)


def error_of(fn):
    try:
        fn()
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def main(folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    rank, said = dist.get_rank(), {}
    last = rank == dist.get_world_size() - 1
    offset = exchange(dist.group.WORLD, now=lambda: time.perf_counter_ns() + (AHEAD_NS if last else 0))
    said["offset"] = [offset.ns, offset.uncertainty_ns]

    # not measured, which would take a second each time
    device = device_row(torch.device("cpu"))
    model = df.build(Model(SLOW_S if last else 0.0), device="cpu")
    x = torch.randn(TOKENS, WIDTH)
    with torch.no_grad():
        expected = model(x)
        with df.profile_ranks(model, folder / "run", device=device) as run:
            same = [bool(torch.equal(model(x), expected)) for _ in range(STEPS)]
        said["same"], said["steps"] = all(same), len(run.steps)
        expected_eagerly = model.module(x)
        said["close"] = bool(torch.allclose(expected, expected_eagerly, rtol=1e-5, atol=1e-5))

        def alone():
            with df.profile(model):
                model(x)

        def together(where, fails=False):
            with df.profile_ranks(model, where, device=device):
                model(x)
                if fails:
                    raise RuntimeError("mine")

        said["alone"] = error_of(alone)
        said["there already"] = error_of(lambda: together(folder / "run"))
        said["no directory"] = error_of(lambda: together(folder / "file" / "run"))
        said["group"] = error_of(lambda: df.profile_ranks(model, folder / "other", group="ep").__enter__())
        said["again"] = error_of(lambda: together(folder / "again"))
        said["failed"] = error_of(lambda: together(folder / "failed", fails=last))
        if rank == 0:
            rank_session.PATIENCE = timedelta(seconds=1)
            said["nobody else"] = error_of(lambda: together(folder / "nobody"))
    (folder / f"said{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
