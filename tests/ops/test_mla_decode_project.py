"""A decode step with its values' projection: mla_decode, head_matmul and quantize at once."""

import pytest
import torch

from accuracy import assert_as_accurate, same_bits
from decode_arguments import decode_arguments, decode_arguments_fp8
from deepfuse.ops import mla_decode_splits
from deepfuse.ops.absorbed_weight import sample_weight
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.head_matmul import head_matmul
from deepfuse.ops.mla_decode import mla_decode
from deepfuse.ops.mla_decode_fp8 import mla_decode_fp8
from deepfuse.ops.mla_decode_project import _launch, mla_decode_project, mla_decode_project_ref
from deepfuse.ops.quantize import quantize
from uninitialized import uninitialized_memory_is_nan

pytestmark = pytest.mark.usefixtures("kernel_device")

E4M3 = torch.float8_e4m3fn
KINDS = ["numbers", "fp8", "powers of two"]
PLAIN = (None, False, True)
"""No quantize."""
every_provider = pytest.mark.parametrize("project", [mla_decode_project_ref, _launch], ids=["reference", "triton"])
every_cache = pytest.mark.parametrize("arguments", [decode_arguments, decode_arguments_fp8], ids=["numbers", "fp8"])


def weight_for(args, rows, kind):
    q_latent = args[0]
    return sample_weight(q_latent.shape[1], rows, q_latent.shape[2], kind, q_latent.device, q_latent.dtype)


@every_provider
@every_cache
@pytest.mark.parametrize("kind", KINDS)
def test_is_what_the_ops_give_one_by_one(project, arguments, kind):
    # 3 heads of 30 + 50 rows: one lies across a border of blocks
    args = arguments([70, 130, 0, 1], 3, 3, 160, 8)
    weight, scale = weight_for(args, 80, kind)
    y, values, y_scale = project(*args, weight, scale, 50, *PLAIN)
    mixed = (mla_decode_fp8 if arguments is decode_arguments_fp8 else mla_decode)(*args)
    if scale is not None:
        weight = dequantize(weight, scale, 128, 128, torch.float32)
    torch.testing.assert_close(y, head_matmul(mixed, weight.view(3, 80, 160)[:, 30:].transpose(1, 2)))
    assert values.numel() == y_scale.numel() == 0


@every_cache
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# all sequences in one product; a product of many heads, with two blocks of values
@pytest.mark.parametrize(("seqlens", "H", "C", "V"), [([150, 3], 5, 100, 24), ([65] * 17, 2, 128, 136)])
def test_kernel_error_is_at_most_twice_that_of_the_reference(seqlens, H, C, V, dtype, kind, arguments):
    args = arguments(seqlens, 3, H, C, 8, dtype)
    weight, scale = weight_for(args, V + 8, kind)
    # of the weight and the cache as the op says: rounded to the dtype of the queries
    rounded = weight if scale is None else dequantize(weight, scale, 128, 128, dtype)
    wide = (t.double() if t.is_floating_point() else t for t in args[:5])
    exact, *_ = mla_decode_project_ref(*wide, args[5], rounded.double(), None, V, *PLAIN)
    actual, expected = (fn(*args, weight, scale, V, *PLAIN)[0] for fn in (_launch, mla_decode_project_ref))
    assert_as_accurate(actual, expected, exact)


@pytest.mark.parametrize("num_splits", [1, 2, 5, 7])
@pytest.mark.parametrize("kind", ["numbers", "fp8"])
def test_any_number_of_splits_gives_the_same(monkeypatch, num_splits, kind):
    # more splits than pages, so that some are empty
    args = decode_arguments([300, 64, 1, 0], 5, 3, 16, 8)
    weight = weight_for(args, 40, kind)
    monkeypatch.setattr(mla_decode_splits, "num_splits_for", lambda num_programs, P: num_splits)
    with uninitialized_memory_is_nan():
        y, *_ = _launch(*args, *weight, 24, *PLAIN)
    torch.testing.assert_close(y, mla_decode_project_ref(*args, *weight, 24, *PLAIN)[0])


@every_provider
@every_cache
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("to", "power_of_two"), [(E4M3, False), (E4M3, True), (torch.float8_e5m2, False)])
def test_what_is_quantized_is_the_result_bit_by_bit(project, arguments, dtype, to, power_of_two):
    # a tail of sequences, and two blocks of each head
    args = arguments([70, 3, 0], 2, 2, 64, 8, dtype)
    weight = weight_for(args, 264, "fp8")
    y, values, scale = project(*args, *weight, 256, to, power_of_two, True)
    assert y.shape == (3, 2, 256) and y.isfinite().all()
    expected = quantize(y.flatten(1), to, 1, 128, power_of_two)
    nothing, *alone = project(*args, *weight, 256, to, power_of_two, False)
    assert nothing.numel() == 0
    for found in ((values, scale), alone):
        for actual, wanted in zip(found, expected, strict=True):
            assert same_bits(actual, wanted) and actual.stride() == wanted.stride()


@every_provider
@every_cache
def test_a_padding_row_and_a_table_without_pages_give_zeros(project, arguments):
    args = arguments([0, 0], 2, 3, 16, 8)
    weight = weight_for(args, 136, "fp8")
    for table in (args[3], args[3][:, :0]):
        y, values, scale = project(*args[:3], table, *args[4:], *weight, 128, E4M3, False, True)
        assert not y.any() and not values.float().any()
        torch.testing.assert_close(scale, torch.full((2, 3), 1e-4 / 448))


@every_provider
def test_nothing_in_gives_nothing_out(project):
    q_latent, q_rope, cache, table, seqlens, scale = decode_arguments([3], 1, 2, 16, 8)
    weight = weight_for((q_latent,), 136, "numbers")
    empty = q_latent[:0], q_rope[:0], cache, table[:0], seqlens[:0], scale
    y, values, y_scale = project(*empty, *weight, 128, E4M3, False, True)
    assert (y.shape, values.shape, y_scale.shape) == ((0, 2, 128), (0, 256), (0, 2))


@every_provider
def test_a_scale_of_other_rows_does_not_matter(project):
    # heads of 100 rows, of which the last 20 are read: block 1, rows 128 to 255, has those of head 1 alone
    args = decode_arguments([70, 3], 2, 4, 48, 4)
    weight, scale = weight_for(args, 100, "fp8")
    expected, *_ = mla_decode_project_ref(*args, weight, scale, 20, *PLAIN)
    scale = scale.clone()
    scale[1] = float("nan")
    y, *_ = project(*args, weight, scale, 20, *PLAIN)
    others = [0, 2, 3]
    torch.testing.assert_close(y[:, others], expected[:, others])
    assert y[:, 1].isnan().all()


def test_refuses_what_does_not_fit():
    args = decode_arguments([3, 4], 1, 2, 16, 8)
    weight, scale = weight_for(args, 136, "fp8")
    with pytest.raises(ValueError, match=r"mla_decode: want .*got .*\[1\]\]"):
        mla_decode_project(*args[:4], args[4][:1], args[5], weight, scale, 128, *PLAIN)
    with pytest.raises(
        ValueError, match=r"mla_decode_project: want weight .* of 2 heads, 137 or more rows each, got \[272"
    ):
        mla_decode_project(*args, weight, scale, 137, *PLAIN)
    with pytest.raises(ValueError, match=r"with C = 16 and V at least 1, got \[272, 15\] and V = 128"):
        mla_decode_project(*args, weight[:, :15], scale, 128, *PLAIN)
    with pytest.raises(ValueError, match=r"with C = 16 and V at least 1, got \[272, 16\] and V = 0"):
        mla_decode_project(*args, weight, scale, 0, *PLAIN)
    with pytest.raises(ValueError, match="whole blocks of 128 values to quantize, got V = 64"):
        mla_decode_project(*args, weight, scale, 64, E4M3, False, True)
    with pytest.raises(TypeError, match="mla_decode_project: want dtype float8_e4m3fn or float8_e5m2, got torch.int8"):
        mla_decode_project(*args, weight, scale, 128, torch.int8, False, True)
    with pytest.raises(
        TypeError, match="in the dtype of the queries or with scales, got torch.bfloat16 and torch.float32"
    ):
        mla_decode_project(*args, weight.bfloat16(), None, 128, *PLAIN)
