"""The processes of a mesh: started from torchrun's variables, checked, and given a limit to how long they wait.

A collective may wait for a part of ``timeout_s``; in what is left, processes find out who kept them waiting
(``runtime/heartbeat.py``).
"""

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from deepfuse.blocks.axis import AXES
from deepfuse.ir.private import set_group_timeout
from deepfuse.runtime.agreement import raised_by_every_rank
from deepfuse.runtime.axes import made_once
from deepfuse.runtime.timeout import check_timeout

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GLOO_WAITS, NCCL_WAITS = 0.5, 1.0
"""Part of ``timeout_s`` that a collective may wait. A wait of Gloo's ends in an error, and there is time left to name who
is to blame; NCCL's ends the process, which is to come last."""


def started(
    device: torch.device, timeout_s: float, *, processes: int | None = None, backend: str | None = None
) -> None:
    """Start torch.distributed from torchrun's variables, where nobody has; with NCCL on CUDA and Gloo on a CPU.

    Args:
        device: of the model.
        timeout_s: seconds that the others may take to come.
        processes: how many are wanted; as many as there are where ``None``.
        backend: of the collectives; refused where ``device`` cannot have it.

    Raises:
        ValueError: torchrun's variables are missing or contradict each other, or there are more or fewer processes;
            ``device`` and backend do not go together.
        RuntimeError: the others did not come.
    """
    refused = None
    try:
        if backend is not None:
            _check_backend(backend if ":" in backend else f"{device.type}:{backend}", device)
    except ValueError as error:
        if not dist.is_initialized() and _missing_variables():
            raise
        # one process tells it for all, which must have met for that
        refused, backend = error, None
    if not dist.is_initialized():
        _check_variables(processes)
        if device.type == "cuda":
            # NCCL takes the process's current device
            torch.cuda.set_device(device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0")))
        try:
            dist.init_process_group(
                backend or ("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"),
                timeout=timedelta(seconds=timeout_s),
            )
        except RuntimeError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise RuntimeError(
                f"process group: want {os.environ['WORLD_SIZE']} processes at {where} within {timeout_s:g} s, "
                f"got, in rank {os.environ['RANK']}: {str(error).partition(chr(10))[0]}"
            ) from error
    with raised_by_every_rank(timeout_s):
        if refused is not None:
            raise refused
        _check_backend(dist.get_backend_config(), device)
        if processes is not None and processes != dist.get_world_size():
            raise _wrong_number(processes, dist.get_world_size())


def device_mesh(
    sizes: Mapping[str, int], device: torch.device, timeout_s: float, *, backend: str | None = None
) -> DeviceMesh:
    """A mesh with the axes and sizes given, e.g. ``{"data": 2, "expert": 4}``; starts torch.distributed where nobody has.

    Raises:
        ValueError, RuntimeError: as :func:`started` and :func:`check_mesh`.
    """
    wrong = {name: size for name, size in sizes.items() if type(size) is not int or size < 1}
    started(device, timeout_s, processes=None if wrong or not sizes else math.prod(sizes.values()), backend=backend)
    with raised_by_every_rank(timeout_s):
        _check_axes(tuple(sizes))
        if wrong or not sizes:
            raise ValueError(f"mesh: want at least one axis, and sizes >= 1, got {wrong or 'no axis'}")
        mesh = _mesh(device.type, tuple(sizes), tuple(sizes.values()))
        check_mesh(mesh, device, timeout_s)
    return mesh


@made_once
def _mesh(kind: str, names: tuple[str, ...], sizes: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh(kind, sizes, mesh_dim_names=names)


def check_mesh(mesh: DeviceMesh, device: torch.device, timeout_s: float) -> None:
    """Whether a model can be built over a mesh; from now on its collectives wait for a part of ``timeout_s``.

    Raises:
        TypeError: it is no :class:`DeviceMesh`.
        ValueError: its axes are not out of ``AXES``, or twice the same; it lies on another device than ``device``, or
            its backend does; it has not all processes; ``timeout_s`` is none that processes can wait.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"build: want mesh as a DeviceMesh, got {mesh!r:.80}")
    check_timeout(timeout_s)
    if not mesh.mesh_dim_names:
        raise ValueError(
            f"mesh: want axes with names out of {', '.join(AXES)}, got {mesh.ndim} without; "
            'init_device_mesh(device, sizes, mesh_dim_names=("expert",)) names them'
        )
    _check_axes(tuple(mesh.mesh_dim_names))
    if mesh.device_type != device.type:
        raise ValueError(
            f"mesh: want one of device {device.type}, which the model is on, got one of {mesh.device_type}"
        )
    if mesh.size() != dist.get_world_size():
        raise _wrong_number(mesh.size(), dist.get_world_size())
    for group in (dist.group.WORLD, *mesh.get_all_groups()):
        _check_backend(dist.get_backend_config(group), device)
        limit_waits(group, timeout_s)


def limit_waits(group: Any, timeout_s: float) -> None:
    """From now on, collectives of a group wait for a part of ``timeout_s``."""
    backends = dist.get_backend_config(group)
    if "fake" not in backends:  # which waits for nobody
        part = NCCL_WAITS if "nccl" in backends else GLOO_WAITS
        set_group_timeout(group, timedelta(seconds=part * timeout_s))


@dataclass(frozen=True, slots=True)
class BesideCompute:
    """Makes what ``new_group`` is told of a group whose transfers run beside compute, with NCCL on CUDA.

    Its stream has a high priority, so that a transfer does not wait for a matmul to leave it multiprocessors, of which it
    takes ``max_ctas`` at most: ``ncclConfig_t.maxCTAs``; ``None`` leaves that to NCCL.
    """

    max_ctas: int | None

    def __call__(self) -> dict[str, Any]:
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        if self.max_ctas is not None:
            options.config.max_ctas = self.max_ctas
        return {"backend": "nccl", "pg_options": options}


def command(processes: int) -> str:
    """The torchrun command that starts this program in so many processes on this machine."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        program = ["-m", spec.name.removesuffix(".__main__")]
    else:
        program = ["script.py" if sys.argv[0] in ("", "-", "-c") else sys.argv[0]]
    return " ".join(["torchrun", "--standalone", f"--nproc-per-node={processes}", *program, *sys.argv[1:]])


def _wrong_number(want: int, got: int) -> ValueError:
    return ValueError(
        f"process group: want {want} processes, got {got}; change the sizes of the mesh, or start it with: {command(want)}"
    )


def _check_axes(names: tuple[str, ...]) -> None:
    unknown = [name for name in names if name not in AXES]
    if unknown:
        raise ValueError(f"mesh: want axes out of {', '.join(AXES)}, got {', '.join(map(repr, unknown))}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"mesh: want each axis once, got {', '.join(map(repr, twice))} more than once in {names}")


def _missing_variables() -> list[str]:
    return [name for name in VARIABLES if not os.environ.get(name)]


def _check_variables(processes: int | None) -> None:
    missing = _missing_variables()
    if missing:
        raise ValueError(
            f"process group: want the variables {', '.join(VARIABLES)}, which torchrun sets, got no "
            f"{', '.join(missing)}; start it with: {command(processes or 2)}"
        )
    rank, world_size, port = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size) and port.isdecimal()):
        raise ValueError(
            f"process group: want 0 <= RANK < WORLD_SIZE and MASTER_PORT as integers, got RANK={rank!r}, "
            f"WORLD_SIZE={world_size!r}, MASTER_PORT={port!r}; start it with: {command(processes or 2)}"
        )


def _check_backend(backends: str, device: torch.device) -> None:
    """``backends`` as ``cpu:gloo,cuda:nccl``."""
    of_device = dict(pair.split(":") for pair in backends.split(",")).get(device.type)
    if of_device is None or (of_device == "nccl" and device.type != "cuda"):
        better = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        raise ValueError(
            f"process group: want a backend for device {device.type}, got {backends}; "
            f'init_process_group("{better}"), or leave it to build'
        )
