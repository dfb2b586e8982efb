"""Inductor's code for a GPU, written on a machine without one: what it asks of the device is answered for it.

Code is written and never loaded, so that no kernel is compiled. Nothing else of a build runs: no passes, no captured graph.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import fx

from deepfuse.ir.private import _sites_in_code
from deepfuse.passes.sites import Site, number_sites

# a Hopper GPU as torch.cuda.get_device_properties describes it, as far as Inductor reads it
HOPPER = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


def cuda_code(
    fn: Callable[..., Any], *shapes: tuple[int, ...], modules: Mapping[str, str] | None = None
) -> tuple[str, list[Site]]:
    """Inductor's Python for ``fn`` on a GPU, with comments of the sites; and the sites.

    Args:
        shapes: of its arguments, in float32.
        modules: node name -> path of the module it is called in.
    """
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        args = [torch.empty(shape, device="cuda") for shape in shapes]
        gm: fx.GraphModule = make_fx(fn, decomposition_table=select_decomp_table())(*args)
    for node in gm.graph.nodes:
        # as Dynamo's graphs have it: a node without one was made by Inductor
        node.meta["stack_trace"] = "cuda_code"
        if node.name in (modules or {}):
            node.meta["nn_module_stack"] = {"": (f"L['self'].model.{modules[node.name]}", None)}
    sites = number_sites(gm.graph)
    # once there is a pool of processes for it, kernels are compiled while code is written
    with _a_gpu(), _sites_in_code(), config.patch(compile_threads=1):
        lowering = GraphLowering(gm, example_inputs=args, shape_env=mode.shape_env)
        with V.set_debug_handler(DebugContext()), V.set_fake_mode(mode), V.set_graph_handler(lowering):
            lowering.run(*args)
            return lowering.codegen()[0].value, sites


@contextlib.contextmanager
def _a_gpu() -> Iterator[None]:
    from torch._dynamo.device_interface import CudaInterface
    from torch.utils import _triton

    answers: tuple[tuple[Any, str, Any], ...] = (
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_capability", lambda *_: (HOPPER.major, HOPPER.minor)),
        (torch.cuda, "get_device_properties", lambda *_: HOPPER),
        (torch.cuda, "_get_device_properties", lambda *_: HOPPER),
        (torch.cuda, "_lazy_init", lambda: None),
        (CudaInterface, "is_available", staticmethod(lambda *_: True)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda *_: 90)),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: HOPPER)),
        (_triton, "triton_hash_with_backend", lambda: "triton"),
    )
    with contextlib.ExitStack() as stack:
        stack.callback(_forget)
        for owner, name, answer in answers:
            stack.enter_context(mock.patch.object(owner, name, answer, create=True))
        _forget()  # that there is none
        yield


def _forget() -> None:
    """What is kept of the device for the life of the process."""
    from torch._inductor import utils
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton

    for owner in (_triton, utils, DeviceProperties):
        for name in vars(owner):
            forget = getattr(getattr(owner, name), "cache_clear", None)
            if forget is not None:
                forget()
