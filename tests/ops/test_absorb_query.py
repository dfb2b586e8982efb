"""The query of absorbed attention: head_matmul by W^UK, of a weight in FP8 too, and rotary."""

import pytest
import torch

from accuracy import assert_as_accurate
from deepfuse.ops.absorb_query import _launch, absorb_query, absorb_query_ref
from deepfuse.ops.absorbed_weight import sample_weight
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.head_matmul import head_matmul
from deepfuse.ops.rotary import rotary

pytestmark = pytest.mark.usefixtures("kernel_device")

KINDS = ["numbers", "fp8", "powers of two"]
every_provider = pytest.mark.parametrize("absorb", [absorb_query_ref, _launch], ids=["reference", "triton"])


def arguments(T, H, N, V, C, R, kind, dtype=torch.float32, interleaved=True):
    q_nope, q_rope = torch.randn(T, H, N + R, dtype=dtype).split([N, R], -1)
    angle = torch.rand(T, R // 2) * 6
    weight, scale = sample_weight(H, N + V, C, kind, q_nope.device, dtype)
    return q_nope, q_rope, angle.cos(), angle.sin(), interleaved, weight, scale


@every_provider
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("interleaved", [True, False])
def test_is_what_the_ops_give_one_by_one(absorb, kind, interleaved):
    # 5 heads of 12 + 60 rows: one lies across a border of blocks
    T, H, N, V = 3, 5, 12, 60
    q_nope, q_rope, cos, sin, _, weight, scale = args = arguments(T, H, N, V, 200, 6, kind, interleaved=interleaved)
    if scale is not None:
        weight = dequantize(weight, scale, 128, 128, q_nope.dtype)
    q_latent, turned = absorb(*args)
    torch.testing.assert_close(q_latent, head_matmul(q_nope, weight.view(H, N + V, 200)[:, :N]))
    torch.testing.assert_close(turned, rotary(q_rope, cos, sin, interleaved))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 16, 33, 130])
def test_kernel_error_is_at_most_twice_that_of_the_reference(T, dtype, kind):
    args = arguments(T, 2, 72, 40, 144, 8, kind, dtype)
    # of the weight as the op says: rounded to the dtype of the queries
    weight, scale = args[5:]
    rounded = weight if scale is None else dequantize(weight, scale, 128, 128, dtype)
    exact = absorb_query_ref(*(t.double() for t in args[:4]), True, rounded.double(), None)
    for actual, expected, wide in zip(_launch(*args), absorb_query_ref(*args), exact, strict=True):
        assert actual.is_contiguous()
        assert_as_accurate(actual, expected, wide)


@every_provider
def test_a_scale_of_other_rows_does_not_matter(absorb):
    # heads of 100 rows, of which 20 are read: block 1, rows 128 to 255, has those of head 2 alone
    args = arguments(3, 5, 20, 80, 48, 4, "fp8")
    weight, scale = args[5:]
    scale = scale.clone()
    scale[1] = float("nan")
    q_latent, _ = absorb(*args[:5], weight, scale)
    expected, _ = absorb_query_ref(*args)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(q_latent[:, others], expected[:, others])
    assert q_latent[:, 2].isnan().all()


def test_kernel_reads_a_weight_whose_columns_lie_apart():
    *query, weight, scale = arguments(5, 2, 16, 24, 40, 4, "fp8")
    apart = weight.t().contiguous().t(), scale.t().contiguous().t()
    for actual, expected in zip(_launch(*query, *apart), _launch(*query, weight, scale), strict=True):
        assert torch.equal(actual, expected)


def test_kernel_rotates_where_there_is_no_nope_part():
    args = arguments(3, 2, 0, 8, 16, 4, "numbers")
    q_latent, turned = _launch(*args)
    assert torch.equal(q_latent, torch.zeros(3, 2, 16))
    torch.testing.assert_close(turned, rotary(*args[1:5]))


def test_refuses_what_does_not_fit():
    q_nope, q_rope, cos, sin, _, weight, scale = arguments(3, 2, 16, 8, 40, 4, "fp8")
    with pytest.raises(ValueError, match=r"absorb_query: want q_nope \[T, H, N\].*got .*\[3, 2, 3\]"):
        absorb_query(q_nope, q_rope[..., :3], cos, sin, True, weight, scale)
    with pytest.raises(ValueError, match="want 3 rows of everything, got 2"):
        absorb_query(q_nope, q_rope, cos[:2], sin, True, weight, scale)
    with pytest.raises(ValueError, match=r"of 2 heads, 16 or more rows each, got \[47, 40\]"):
        absorb_query(q_nope, q_rope, cos, sin, True, weight[:47], scale)
    with pytest.raises(ValueError, match=r"of 2 heads, 16 or more rows each, got \[30, 40\]"):
        absorb_query(q_nope, q_rope, cos, sin, True, weight[:30], scale)
    with pytest.raises(ValueError, match=r"want weight_scale \[1, 1\], got \[2, 1\]"):
        absorb_query(q_nope, q_rope, cos, sin, True, weight, scale.expand(2, 1))
    with pytest.raises(TypeError, match="of one dtype, got torch.float32 and torch.bfloat16"):
        absorb_query(q_nope, q_rope.bfloat16(), cos, sin, True, weight, scale)
    with pytest.raises(TypeError, match="in the dtype of the queries or with scales, got torch.float8_e4m3fn and"):
        absorb_query(q_nope, q_rope, cos, sin, True, weight, None)
    with pytest.raises(TypeError, match="float8_e5m2 where it has scales, got torch.float32"):
        absorb_query(q_nope, q_rope, cos, sin, True, weight.float(), scale)
