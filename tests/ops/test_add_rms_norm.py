import pytest
import torch

from accuracy import assert_as_accurate
from deepfuse.ops.add_rms_norm import add_rms_norm, add_rms_norm_ref
from deepfuse.ops.rms_norm import rms_norm_ref

TRITON = next(p.fn for p in add_rms_norm.providers if p.name == "triton")
EPS = 1e-6

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("run", [add_rms_norm, TRITON], ids=["op", "triton"])
def test_is_an_add_and_then_a_norm_of_the_rounded_sum(run, dtype):
    x, residual, weight = (torch.randn(shape, dtype=dtype) for shape in [(2, 7168), (2, 7168), (7168,)])
    y, h = run(x, residual, weight, EPS)
    assert torch.equal(h, x + residual)
    exact = rms_norm_ref(h.double(), weight.double(), EPS)
    assert_as_accurate(y, rms_norm_ref(h, weight, EPS), exact)
    # nearly every number is the nearest there is; a norm of the sum before rounding is that far less often
    assert (y == exact.to(dtype)).double().mean() > (0.99 if dtype == torch.bfloat16 else 0)


def test_kernel_reads_rows_of_any_stride():
    wide, weight = torch.randn(4, 3, 40), torch.randn(16)
    x, residual = wide[..., 8:24], wide[..., :32:2]
    actual = TRITON(x, residual, weight, EPS)
    assert all(t.is_contiguous() for t in actual)
    torch.testing.assert_close(actual, add_rms_norm_ref(x, residual, weight, EPS))


def test_both_outputs_pass_their_gradient_on():
    x, residual, weight = (torch.randn(shape, requires_grad=True) for shape in [(3, 5), (3, 5), (5,)])
    wide = [t.detach().double().requires_grad_() for t in (x, residual, weight)]
    dy, dh = torch.randn(3, 5), torch.randn(3, 5)
    actual = torch.autograd.grad(add_rms_norm(x, residual, weight, EPS), (x, residual, weight), (dy, dh))
    expected = torch.autograd.grad(add_rms_norm_ref(*wide, EPS), wide, (dy.double(), dh.double()))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e.float())


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_can_be_differentiated(used):
    x, residual, weight = (torch.randn(shape, requires_grad=True) for shape in [(3, 5), (3, 5), (5,)])
    actual = torch.autograd.grad(add_rms_norm(x, residual, weight, EPS)[used].sum(), x)
    expected = torch.autograd.grad(add_rms_norm_ref(x, residual, weight, EPS)[used].sum(), x)
    torch.testing.assert_close(actual, expected)


def test_refuses_what_does_not_fit():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"got \[2, 4\] torch.float32, \[2, 3\] torch.float32 and \[4\]"):
        add_rms_norm(x, torch.ones(2, 3), torch.ones(4), EPS)
    with pytest.raises(ValueError, match=r"got \[2, 4\] torch.float32, \[2, 4\] torch.bfloat16 and \[4\]"):
        add_rms_norm(x, x.bfloat16(), torch.ones(4), EPS)
    with pytest.raises(ValueError, match=r"and \[3\]"):
        add_rms_norm(x, x, torch.ones(3), EPS)
    with pytest.raises(ValueError, match=r"want x and residual \[\.\.\., D\]"):
        add_rms_norm(torch.ones(()), torch.ones(()), torch.ones(()), EPS)
