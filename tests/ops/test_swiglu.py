import pytest
import torch

from accuracy import assert_as_accurate
from deepfuse.ops.swiglu import swiglu, swiglu_ref

TRITON = next(p.fn for p in swiglu.providers if p.name == "triton")

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.mark.parametrize("run", [swiglu, TRITON], ids=["op", "triton"])
def test_is_silu_times_up(run):
    gate, up = torch.randn(5, 300), torch.randn(5, 300)
    torch.testing.assert_close(run(gate, up), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("run", [swiglu, TRITON], ids=["op", "triton"])
def test_large_gates_give_the_limits(run):
    gate = torch.tensor([-1e30, -100.0, 0.0, 100.0, 1e30])
    assert torch.equal(run(gate, torch.ones(5)), torch.tensor([0.0, 0.0, 0.0, 100.0, 1e30]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_takes_the_halves_of_a_fused_projection_where_they_lie(dtype):
    # more than one block of the kernel, and a width that is no multiple of one
    gate, up = torch.randn(3, 2, 2 * 1500, dtype=dtype).chunk(2, -1)
    y = TRITON(gate, up)
    assert y.is_contiguous()
    assert_as_accurate(y, swiglu_ref(gate, up), swiglu_ref(gate.double(), up.double()))


def test_gradient_in_float32_is_that_of_float64():
    gate, up = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    dy = torch.randn(3, 5)
    actual = torch.autograd.grad(swiglu(gate, up), (gate, up), dy)
    expected = torch.autograd.grad(swiglu_ref(*wide), wide, dy.double())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e.float())


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"got \[2, 4\] torch.float32 and \[2, 3\] torch.float32"):
        swiglu(torch.ones(2, 4), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"got \[2\] torch.float32 and \[2\] torch.bfloat16"):
        swiglu(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"want gate and up \[\.\.\., F\]"):
        swiglu(torch.ones(()), torch.ones(()))
