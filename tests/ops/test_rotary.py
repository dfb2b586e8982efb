import pytest
import torch

from accuracy import assert_as_accurate
from deepfuse.ops.rotary import rotary, rotary_ref

TRITON = next(p.fn for p in rotary.providers if p.name == "triton")

pytestmark = pytest.mark.usefixtures("kernel_device")
every_run = pytest.mark.parametrize("run", [rotary, TRITON], ids=["op", "triton"])
both_layouts = pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])


def _arguments(T: int, H: int, R: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    angle = torch.rand(T, R // 2) * 6
    return torch.randn(T, H, R, dtype=dtype), angle.cos(), angle.sin()


@every_run
def test_interleaved_pairs_turn_as_complex_numbers(run):
    x, cos, sin = _arguments(5, 3, 12)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[:, None]
    torch.testing.assert_close(run(x, cos, sin, True), torch.view_as_real(turned).flatten(-2))


@every_run
def test_half_split_is_interleaved_with_the_channels_in_another_order(run):
    x, cos, sin = _arguments(5, 3, 12)
    apart = torch.cat((torch.arange(0, 12, 2), torch.arange(1, 12, 2)))
    torch.testing.assert_close(run(x[..., apart], cos, sin, False), run(x, cos, sin, True)[..., apart])


@every_run
@both_layouts
def test_scores_depend_on_the_distance_of_tokens_alone(run, interleaved):
    q, k = torch.randn(1, 1, 8).expand(10, 1, 8), torch.randn(1, 1, 8).expand(10, 1, 8)
    angle = torch.arange(10)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    scores = torch.einsum("qhr,khr->qk", *(run(t, angle.cos(), angle.sin(), interleaved) for t in (q, k)))
    for distance in (0, 1, 5):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-5, rtol=0)


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_takes_the_rotary_part_of_wider_heads(interleaved, dtype):
    # more than one block of heads; the strides of DeepSeek-V3's queries
    x, cos, sin = _arguments(2, 40, 64)
    wide = torch.randn(2, 40, 192, dtype=dtype)
    wide[..., 128:] = x
    y = TRITON(wide[..., 128:], cos, sin, interleaved)
    assert y.is_contiguous()
    exact = rotary_ref(wide[..., 128:].double(), cos, sin, interleaved)
    assert_as_accurate(y, rotary_ref(wide[..., 128:], cos, sin, interleaved), exact)


@both_layouts
def test_kernel_takes_any_strides(interleaved):
    x, cos, sin = _arguments(6, 5, 12)
    y = TRITON(
        x.transpose(0, 1).contiguous().transpose(0, 1), cos.t().contiguous().t(), sin[:1].expand(6, 6), interleaved
    )
    torch.testing.assert_close(y, rotary_ref(x, cos, sin[:1].expand(6, 6), interleaved))
    x = torch.randn(6, 12, 5).transpose(1, 2)
    torch.testing.assert_close(TRITON(x, cos, sin, interleaved), rotary_ref(x, cos, sin, interleaved))


@both_layouts
def test_gradient_turns_back(interleaved):
    x, cos, sin = _arguments(4, 2, 6)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(rotary(x, cos, sin, interleaved), x, rotary(x.detach(), cos, sin, interleaved))
    torch.testing.assert_close(dx, x.detach())


def test_refuses_what_does_not_fit():
    x, cos, sin = _arguments(3, 2, 8)
    for arguments in [(x[0], cos, sin), (x[..., :7], cos, sin), (x, cos[:, :3], sin[:, :3]), (x, cos, sin[:2])]:
        with pytest.raises(ValueError, match=r"rotary: want x \[T, H, R\] with even R, cos and sin \[T, R/2\], got"):
            rotary(*arguments, True)
    with pytest.raises(ValueError, match="rotary: want 3 rows in cos, got 2"):
        rotary(x, cos[:2], sin[:2], True)
