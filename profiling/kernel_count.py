"""How many kernels a function launches on a GPU, without one: it is run on fake tensors, and its launches are counted.

A launch is a Triton kernel, or a PyTorch op that computes or fills; views and allocations are none. A PyTorch op counts
as one, whatever its library makes of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepfuse.profiling.view_ops import is_view

ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


def count_kernels(fn: Callable[..., Any], args: tuple[Any, ...]) -> list[str]:
    """Names of the kernels that ``fn`` launches for these arguments, in order.

    Args:
        fn: allocates its results and launches; may not read values.
        args: fake tensors, of one mode, and plain values; memory counts as aligned.
    """
    from triton.runtime.jit import KernelInterface

    launched: list[str] = []

    def counted(kernel: Any, grid: Any) -> Callable[..., None]:
        """``kernel[grid]``, which enters the kernel instead of launching it."""
        name = getattr(kernel, "__name__", None) or kernel.fn.__name__
        return lambda *args, **kwargs: launched.append(name)

    modes = [a.fake_mode for a in torch.utils._pytree.tree_leaves(args) if hasattr(a, "fake_mode")]
    with (
        modes[0],
        _Counter(launched),
        _replaced(KernelInterface, "__getitem__", counted),
        _replaced(FakeTensor, "data_ptr", lambda x: 0),
    ):
        fn(*args)
    return launched


class _Counter(TorchDispatchMode):
    def __init__(self, launched: list[str]):
        super().__init__()
        self.launched = launched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in ALLOCATIONS and not is_view(func) and func.namespace not in ("prim", "profiler"):
            self.launched.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def _replaced(owner: type, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """Inside, a class has another method."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
