import pytest
import torch

from accuracy import assert_as_accurate
from deepfuse.ops.rms_norm import rms_norm, rms_norm_ref

TRITON = next(p.fn for p in rms_norm.providers if p.name == "triton")
EPS = 1e-6

pytestmark = pytest.mark.usefixtures("kernel_device")


def test_follows_the_formula():
    x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0])
    torch.testing.assert_close(rms_norm(x, weight, 0.0), torch.tensor([[3.0, 8.0]]) / 12.5**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [1, 576, 7168])
def test_kernel_error_is_at_most_twice_that_of_pytorch_in_the_same_dtype(D, dtype):
    x, weight = torch.randn(3, D, dtype=dtype), torch.randn(D, dtype=dtype)
    exact = rms_norm_ref(x.double(), weight.double(), EPS)
    assert_as_accurate(TRITON(x, weight, EPS), torch.nn.functional.rms_norm(x, (D,), weight, EPS), exact)


def test_kernel_reads_strided_rows():
    wide, weight = torch.randn(4, 3, 40), torch.randn(16)
    for x in (wide[..., 8:24], wide[:, :, :32:2], wide.transpose(0, 2)[:16].transpose(0, 2)[..., :16]):
        y = TRITON(x, weight, EPS)
        assert y.is_contiguous()
        torch.testing.assert_close(y, rms_norm_ref(x, weight, EPS))


def test_kernel_takes_weights_in_another_dtype():
    x, weight = torch.randn(3, 64, dtype=torch.bfloat16), torch.randn(64)
    torch.testing.assert_close(TRITON(x, weight, EPS), rms_norm_ref(x, weight, EPS))


def test_large_and_small_values_keep_their_scale():
    x, weight = torch.randn(2, 64), torch.ones(64)
    for scale in (1e-12, 1e12):
        torch.testing.assert_close(TRITON(x * scale, weight, 0.0), TRITON(x, weight, 0.0))


def test_gradient_in_float32_is_that_of_float64():
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    dy = torch.randn(3, 5)
    actual = torch.autograd.grad(rms_norm(x, weight, EPS), (x, weight), dy)
    expected = torch.autograd.grad(rms_norm_ref(*wide, EPS), wide, dy.double())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e.float())


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"x \[\.\.\., D\] and weight \[D\], got \[2, 4\] and \[3\]"):
        rms_norm(torch.ones(2, 4), torch.ones(3), EPS)
    with pytest.raises(TypeError, match="floating-point x, got torch.int64"):
        rms_norm(torch.ones(2, 4, dtype=torch.int64), torch.ones(4), EPS)
