"""Kernels are counted without being run."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from deepfuse.ops import expert_permute, quantize
from deepfuse.ops.expert_order import COMPARED_ROWS, COUNTED_ROWS
from deepfuse.profiling.kernel_count import count_kernels


def fakes(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    with FakeTensorMode():
        return [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]


def test_views_and_allocations_are_none_and_copies_are() -> None:
    (x,) = fakes((4, 6))
    assert count_kernels(lambda x: torch.empty_like(x).view(2, 12)[:, :3].t(), (x,)) == []
    assert count_kernels(lambda x: x.contiguous(), (x,)) == []
    assert count_kernels(lambda x: x.t().contiguous(), (x,)) == ["aten.clone.default"]
    assert count_kernels(lambda x: torch.zeros_like(x).add_(x), (x,)) == ["aten.zeros_like.default", "aten.add_.Tensor"]


def test_kernels_of_triton_are_counted_by_name() -> None:
    (x,) = fakes((300, 256))
    for rows, cols, names in (
        (1, 128, ["_quantize_kernel"]),
        (0, 0, ["aten.zeros.default", "_amax_kernel", "_quantize_kernel"]),
    ):
        assert count_kernels(quantize._launch, (x, torch.float8_e4m3fn, rows, cols, False)) == names


@pytest.mark.parametrize(("tokens", "sorting"), [(1, 0), (COUNTED_ROWS // 4, 1), (COMPARED_ROWS, 3)])
def test_what_is_launched_follows_the_sizes(tokens: int, sorting: int) -> None:
    with FakeTensorMode():
        x = torch.empty(tokens, 64, device="cuda")
        experts = torch.empty(tokens, 8, dtype=torch.int64, device="cuda")
    names = count_kernels(expert_permute._launch, (x, experts, 16))
    assert len(names) == sorting + 1 and names[-1] == "_expert_permute_kernel"


def test_memory_is_aligned() -> None:
    assert count_kernels(lambda x: x.clone() if x.data_ptr() % 16 else x, (fakes((2,))[0],)) == []


def test_an_error_leaves_triton_as_it_was() -> None:
    from triton.runtime.jit import KernelInterface

    before, pointer = KernelInterface.__getitem__, FakeTensor.data_ptr

    def fails(x: Tensor) -> None:
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        count_kernels(fails, (fakes((2,))[0],))
    assert KernelInterface.__getitem__ is before
    assert FakeTensor.data_ptr is pointer
