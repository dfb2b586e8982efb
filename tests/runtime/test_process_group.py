"""Groups and meshes that are refused; no other process is needed for it."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import deepfuse as df
from deepfuse.blocks.parallel import Parallel
from deepfuse.ir.private import process_group
from deepfuse.runtime import heartbeat, processes
from deepfuse.runtime.axes import axes_of
from deepfuse.runtime.checkpoint import CheckpointError
from deepfuse.runtime.process_group import VARIABLES, BesideCompute, check_mesh, command, device_mesh, started
from deepfuse.runtime.processes import Processes
from deepfuse.runtime.told_once import Unless, kind_of, of_kind, told_once
from tiny_model import ONE_LAYER

CPU = torch.device("cpu")


@pytest.fixture
def world():
    """Eight processes, of which there is one."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


def test_missing_variables_come_with_the_command_that_sets_them(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "10"])
    with pytest.raises(
        ValueError,
        match="want the variables RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, which torchrun sets, got no RANK, WORLD_SIZE, "
        "MASTER_ADDR, MASTER_PORT; start it with: torchrun --standalone --nproc-per-node=6 train.py --steps 10$",
    ):
        device_mesh({"data": 2, "expert": 3}, CPU, 5)


def test_the_command_of_a_module(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/__main__.py", "x"])
    spec = type("Spec", (), {"name": "deepfuse.__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    assert command(2) == "torchrun --standalone --nproc-per-node=2 -m deepfuse x"


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("x", "2"), ("0", "")])
def test_variables_that_contradict_each_other(monkeypatch, rank, size):
    for name, value in zip(VARIABLES, (rank, size, "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="want 0 <= RANK < WORLD_SIZE|got no WORLD_SIZE"):
        started(CPU, 5)


def test_nccl_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match="want a backend for device cpu, got cpu:nccl; init_process_group"):
        started(CPU, 5, backend="nccl")


def test_a_group_without_the_device_is_refused(world, monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: "cuda:nccl")
    with pytest.raises(ValueError, match="want a backend for device cpu, got cuda:nccl"):
        check_mesh(init_device_mesh("cpu", (8,), mesh_dim_names=("expert",)), CPU, 5)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"expert": 4}, "want 4 processes, got 8; change the sizes of the mesh, or start it with: torchrun .*-node=4"),
        ({"data": 2, "pipe": 4}, "want axes out of data, tensor, expert, got 'pipe'"),
        ({"data": 8, "expert": 0}, "want at least one axis, and sizes >= 1, got {'expert': 0}"),
        ({}, "want at least one axis"),
    ],
)
def test_sizes_that_are_refused(world, sizes, words):
    with pytest.raises(ValueError, match=words):
        device_mesh(sizes, CPU, 5)


def test_meshes_that_are_refused(world):
    with pytest.raises(TypeError, match="want mesh as a DeviceMesh, got 'expert'"):
        check_mesh("expert", CPU, 5)
    for mesh, words in (
        (DeviceMesh("cpu", list(range(8))), "want axes with names out of data, tensor, expert, got 1 without"),
        (
            DeviceMesh("cpu", [[0, 1, 2, 3], [4, 5, 6, 7]], mesh_dim_names=("data", "data")),
            "want each axis once, got 'data' more than once",
        ),
        (DeviceMesh("cpu", [0, 1], mesh_dim_names=("expert",)), "want 2 processes, got 8"),
    ):
        with pytest.raises(ValueError, match=words):
            check_mesh(mesh, CPU, 5)
    mesh = device_mesh({"data": 2, "expert": 4}, CPU, 5)
    with pytest.raises(ValueError, match="want one of device cuda, which the model is on, got one of cpu"):
        check_mesh(mesh, torch.device("cuda"), 5)
    for timeout_s in (0, -1.0, float("nan"), float("inf"), 1e10, 10**400, True, "60"):
        with pytest.raises(ValueError, match="want timeout_s as a number of seconds > 0"):
            check_mesh(mesh, CPU, timeout_s)


@pytest.mark.skipif(not dist.is_nccl_available(), reason="torch without NCCL")
@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_with_nccl_alone_tokens_travel_in_groups_of_their_own(world, monkeypatch, backend):
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("tensor", "expert"))
    monkeypatch.setattr(dist, "get_backend_config", lambda group: f"cuda:{backend}")
    new_group, made = dist.new_group, []

    def noted(ranks, **settings):
        made.append((ranks, settings))
        return new_group(ranks)

    limited = set()
    monkeypatch.setattr(dist, "new_group", noted)
    monkeypatch.setattr(processes, "limit_waits", lambda group, timeout_s: limited.add(group.group_name))
    parallel = Parallel(mode="node_limited", ranks_per_node=2, max_ctas=12)
    before = Processes(mesh=mesh, axes=axes_of(mesh), parallel=parallel)
    after = before.with_groups()
    assert limited == after.axes.groups.keys() and len(limited) == 4
    experts, nodes = made[: 2 * (backend == "nccl")], made[-8:]
    assert [ranks for ranks, _ in experts] == [[0, 1, 2, 3], [4, 5, 6, 7]][: len(experts)]
    assert [ranks for ranks, _ in nodes] == [[0, 2], [1, 3], [4, 6], [5, 7], [0, 1], [2, 3], [4, 5], [6, 7]]
    assert (after.axes.expert.group == before.axes.expert.group) == (backend == "gloo")
    assert dist.get_process_group_ranks(process_group(after.axes.expert.group)) == [0, 1, 2, 3]
    assert after.tokens_axis().group == before.axes.expert.group
    assert len(made) == len(experts) + 8 and before.axes.nodes is None
    # a second build has the same groups, as its graphs in the cache are to be called by them
    again = replace(before, parallel=replace(parallel)).with_groups()
    assert again.axes == after.axes and len(made) == len(experts) + 8
    other = replace(before, parallel=replace(parallel, ranks_per_node=4)).with_groups()
    assert other.axes.nodes != after.axes.nodes
    if backend == "gloo":
        assert not any(settings for _, settings in made)
        return
    options = [settings["pg_options"] for _, settings in made]
    # a group writes its name into them
    assert len(set(map(id, options))) == len(made)
    assert all(s["backend"] == "nccl" for _, s in made)
    assert all(o.config.max_ctas == 12 and o.is_high_priority_stream for o in options)


@pytest.mark.skipif(not dist.is_nccl_available(), reason="torch without NCCL")
def test_the_bound_on_multiprocessors_may_be_left_to_nccl():
    plain = dist.ProcessGroupNCCL.Options().config.max_ctas
    assert (
        BesideCompute(None)()["pg_options"].config.max_ctas
        == plain
        != BesideCompute(20)()["pg_options"].config.max_ctas
    )


def test_without_other_processes_nothing_beats(world):
    heartbeat.start(5)
    assert not heartbeat.running()
    with pytest.raises(RuntimeError, match=r"^gloo/ my own$"), heartbeat.watched("forward", 1):
        raise RuntimeError("gloo/ my own")


def test_nobody_is_waited_for_over_a_fake_group(world):
    model = df.build(ONE_LAYER, mesh={"data": 8}, device="cpu", compile=False, max_batch_size=1, max_seq_len=32)
    assert len(model.generate([[1, 2]], max_new_tokens=2, stop_token_ids=())[0]) == 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (CheckpointError("damaged"), ValueError("damaged")),
        (MemoryError("3 GiB"), MemoryError("3 GiB")),
        (
            UnicodeDecodeError("utf-8", b"x", 0, 1, "no"),
            RuntimeError("'utf-8' codec can't decode byte 0x78 in position 0: no"),
        ),
    ],
)
def test_others_raise_the_nearest_type_that_python_has(error, told):
    made = of_kind(kind_of(error), str(error))
    assert (type(made), str(made)) == (type(told), str(told))


@pytest.mark.parametrize(("rank", "prints"), [("0", True), ("1", False)])
def test_one_process_of_a_machine_prints(monkeypatch, rank, prints):
    printed = []
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(sys, "excepthook", lambda *error: printed.append(error))
    told = told_once(ValueError("mine"))
    told_once(told)
    other = ValueError("other")
    for error in (told, other):
        sys.excepthook(type(error), error, None)
    assert [error for _, error, _ in printed] == ([told, other] if prints else [other])
    assert isinstance(sys.excepthook, Unless) is not prints
