"""All cases of tests/runtime/test_faults.py: processes that train a layer of experts over Gloo until one has a fault.

``python faults_worker.py FOLDER`` imports once and forks the processes of all cases, which run side by side: most wait.
Of each it writes the exit code, when it ended, and what it printed. With torchrun's variables it is one process of the
case ``FOLDER`` names.
"""

import atexit
import contextlib
import gc
import json
import os
import random
import signal
import socket
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from deepfuse.blocks.collectives import all_to_all
from deepfuse.blocks.presets import PRESETS
from deepfuse.ir.private import process_group, set_group_timeout
from deepfuse.passes.pipeline import default
from deepfuse.runtime.agreement import agree, raised_by_every_rank, setup
from deepfuse.runtime.heartbeat import watched
from deepfuse.runtime.process_group import device_mesh
from deepfuse.runtime.processes import Processes
from deepfuse.runtime.trainer_checkpoint import write_state
from deepfuse.runtime.training import Training

WORLD, TIMEOUT_S, STEP = 3, 16.0, 4
"""The fault is in this step."""
WIDTH = 8


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def hang():
    time.sleep(3 * TIMEOUT_S)


def linger():
    time.sleep(1.2 * TIMEOUT_S)


def work():
    """As long, and awake again and again."""
    for _ in range(100):
        time.sleep(0.012 * TIMEOUT_S)


def fail():
    raise ValueError("no such expert")


def leave():
    sys.exit(0)


def tear():
    """Every connection of this process is closed."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    connection.shutdown(socket.SHUT_RDWR)


def never_ends(axis):
    """Collectives wait as if without end, as those of NCCL do."""
    set_group_timeout(process_group(axis.group), timedelta(hours=1))


CASES = {
    "killed in dispatch": ("dispatch", 2, die),
    "killed in combine": ("combine", 2, die),
    "killed in backward": ("backward", 1, die),
    "killed with the store": ("dispatch", 0, die),
    "stopped in dispatch": ("dispatch", 2, stop),
    "stopped with the store": ("combine", 0, stop),
    "stopped in an endless wait": ("dispatch", 1, stop),
    "hangs in combine": ("combine", 1, hang),
    "torn in dispatch": ("dispatch", 2, tear),
    "fails in dispatch": ("dispatch", 1, fail),
    "fails in dispatch and stays": ("dispatch", 1, fail),
    "leaves in combine": ("combine", 2, leave),
    "killed in save": ("save", 2, die),
    "hangs before a meeting": ("meeting", 1, linger),
    "killed before a meeting": ("meeting", 2, die),
    "hangs while it compiles": ("compile", 1, hang),
    "stopped while it compiles": ("compile", 2, stop),
    "killed while it compiles": ("compile", 1, die),
}
"""Name -> phase, rank and fault."""
SETUPS = {
    "another config": lambda rank, config, passes: (
        replace(config, routed_scaling_factor=2.0 + rank // 2),
        None,
        passes,
    ),
    "another pass list": lambda rank, config, passes: (
        config,
        None,
        passes.without(*["merge_projections"][: rank % 2]),
    ),
    "another checkpoint": lambda rank, config, passes: (config, Path(f"checkpoint{rank // 2}"), passes),
}
REFUSED = ("world size", "axis", "one fails", "all fail")


class AtBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fault):
        ctx.fault = fault
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.fault("backward")
        return grad, None


def train(axis, weight, step, fault):
    """One expert a process; each sends ``rank + 1`` tokens to each."""
    sent, received = [axis.rank + 1] * axis.size, [r + 1 for r in range(axis.size)]
    x = torch.full((sum(sent), WIDTH), float(axis.rank), requires_grad=True)
    with watched("dispatch", step):
        fault("dispatch")
        there = AtBackward.apply(all_to_all(x, received, sent, axis), fault)
    y = there @ weight
    with watched("combine", step):
        fault("combine")
        back = all_to_all(y, sent, received, axis)
    with watched("backward", step):
        back.square().sum().backward()


def save(folder, step, processes, fault):
    def part():
        fault("save")
        return {"weight": torch.full((WIDTH,), float(step))}

    with watched("save", step):
        write_state(folder, part, step, Training(steps=1), processes)


def run_case(case, folder):
    phase, victim, what = CASES[case]
    processes = begun()
    axis, rank = processes.axes.expert, dist.get_rank()
    if case.endswith("endless wait"):
        never_ends(axis)
    weight = torch.eye(WIDTH, requires_grad=True)

    def fault(here):
        if step == STEP and here == phase and rank == victim:
            (folder / "when").write_text(repr(time.monotonic()))
            what()

    for step in range(STEP + 3):
        try:
            train(axis, weight, step, fault)
        except ValueError:
            if case.endswith("stays"):
                time.sleep(TIMEOUT_S)
            raise
        if phase == "save":
            save(folder / "checkpoint", step, processes, fault)
        if phase == "compile":
            with processes.raising_together("compile"):
                fault("compile")
        if phase == "meeting":
            fault("meeting")
            with raised_by_every_rank(TIMEOUT_S):
                pass


def be_slow():
    """One process is longer at something that lasts than others wait for what does not."""
    processes = begun()
    with processes.raising_together("load"):
        if dist.get_rank() == 1:
            work()
    agree({"what": "the same"}, TIMEOUT_S)


def begun():
    mesh = device_mesh({"expert": int(os.environ["WORLD_SIZE"])}, torch.device("cpu"), TIMEOUT_S)
    return Processes.of(mesh, None, "cpu", TIMEOUT_S)[0]


def compare_setups(case, folder):
    begun()
    os.chdir(folder)
    config, checkpoint, passes = SETUPS[case](dist.get_rank(), PRESETS["v3-tiny"](), default())
    agree(setup(config, checkpoint, passes, dtype=torch.float32), TIMEOUT_S)


def be_refused(case):
    cpu = torch.device("cpu")
    if case == "world size":
        device_mesh({"data": 2, "expert": 2}, cpu, TIMEOUT_S)
    begun()
    with raised_by_every_rank(TIMEOUT_S):
        if case == "axis":
            device_mesh({"pipeline": WORLD}, cpu, TIMEOUT_S)
        if case == "all fail" or dist.get_rank() == 1:
            raise MemoryError("want 3 GiB, got 2")


def one_process(case, folder):
    if case in CASES:
        run_case(case, folder)
    elif case == "slow":
        be_slow()
    elif case in SETUPS:
        compare_setups(case, folder)
    else:
        be_refused(case)


def forked(case, rank, port, folder):
    """A process of its own, which ends as a program of its own would."""
    pid = os.fork()
    if pid:
        return pid
    # registered first, called last
    atexit.register(lambda: (folder / f"ended{rank}").write_text(repr(time.monotonic())))
    log = os.open(folder / f"log{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    one_process(case, folder)
    sys.exit()


def free_ports(count):
    """Of those that no outgoing connection is given in the meantime."""
    with contextlib.ExitStack() as stack:
        found = []
        for port in random.Random(os.getpid()).sample(range(16000, 32000), 50 * count):
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError(f"free_ports: want {count} between 16000 and 32000, got {len(found)}")


def write_checkpoints(folder):
    """Two of one size, that differ in a weight."""
    from safetensors.torch import save_file

    for i in range(2):
        (folder / f"checkpoint{i}").mkdir()
        save_file({"weight": torch.full((4,), float(i))}, folder / f"checkpoint{i}" / "model.safetensors")


def run_all(folder):
    names = [*CASES, *SETUPS, *REFUSED, "slow"]
    running, stopped = {}, {}
    gc.freeze()  # or each process would copy what it collects
    for case, port in zip(names, free_ports(len(names)), strict=True):
        (folder / case).mkdir()
        if case == "another checkpoint":
            write_checkpoints(folder / case)
        for rank in range(WORLD):
            running[forked(case, rank, port, folder / case)] = case, rank
            if case in CASES and CASES[case][1] == rank and CASES[case][2] is stop:
                stopped[case] = next(p for p, at in running.items() if at == (case, rank))
    ended = {case: {} for case in names}
    while running:
        pid, status = os.wait()
        case, rank = running.pop(pid)
        ended[case][rank] = os.waitstatus_to_exitcode(status), time.monotonic()
        # who is stopped has survivors to outlive, and no end of its own
        if stopped.get(case) in running and len(ended[case]) == WORLD - 1:
            os.kill(stopped[case], signal.SIGKILL)
    (folder / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    where = Path(sys.argv[1])
    one_process(where.name, where) if "RANK" in os.environ else run_all(where)
