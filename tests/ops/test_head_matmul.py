import pytest
import torch

from accuracy import assert_as_accurate
from deepfuse.ops.head_matmul import head_matmul, head_matmul_ref
from deepfuse.ops.linear import MATVEC_ROWS

PROVIDERS = {p.name: p for p in head_matmul.providers}
TRITON = PROVIDERS["triton"].fn

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.mark.parametrize("run", [head_matmul, TRITON], ids=["op", "triton"])
def test_each_head_has_a_matrix_of_its_own(run):
    x, weight = torch.randn(5, 3, 20), torch.randn(3, 20, 7)
    y = run(x, weight)
    for h in range(3):
        torch.testing.assert_close(y[:, h], x[:, h] @ weight[h], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 16, 33, 130])
def test_kernel_reads_both_sides_of_kv_b_proj_where_they_lie(T, dtype):
    H, N, V, C = 2, 48, 80, 96
    kv_b = torch.randn(H, N + V, C, dtype=dtype) / C**0.5
    query, latent = torch.randn(T, H, N + 16, dtype=dtype)[..., :N], torch.randn(T, H, C, dtype=dtype)
    for x, weight in [(query, kv_b[:, :N]), (latent, kv_b[:, N:].mT)]:
        y = TRITON(x, weight)
        assert y.is_contiguous()
        assert_as_accurate(y, head_matmul_ref(x, weight), head_matmul_ref(x.double(), weight.double()))


def test_no_inputs_sum_to_zero():
    assert torch.equal(TRITON(torch.ones(2, 3, 0), torch.ones(3, 0, 4)), torch.zeros(2, 3, 4))


def test_matvec_is_for_few_tokens():
    weight = torch.randn(3, 8, 4)
    taken = [T for T in range(MATVEC_ROWS + 3) if PROVIDERS["matvec"].supports(torch.randn(T, 3, 8), weight) is None]
    assert taken == list(range(1, MATVEC_ROWS + 1))


def test_gradient_in_float32_is_that_of_float64():
    x, weight = torch.randn(4, 2, 6, requires_grad=True), torch.randn(2, 6, 3, requires_grad=True)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    dy = torch.randn(4, 2, 3)
    actual = torch.autograd.grad(head_matmul(x, weight), (x, weight), dy)
    expected = torch.autograd.grad(head_matmul_ref(*wide), wide, dy.double())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e.float(), atol=1e-5, rtol=1e-5)


def test_refuses_what_does_not_fit():
    x = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match=r"weight \[H, K, N\], got \[2, 3, 4\] and \[3, 5, 6\]"):
        head_matmul(x, torch.ones(3, 5, 6))
    with pytest.raises(TypeError, match="one dtype, got torch.float32 and torch.bfloat16"):
        head_matmul(x, torch.ones(3, 4, 6, dtype=torch.bfloat16))
