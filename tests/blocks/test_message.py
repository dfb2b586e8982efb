"""Rows as bytes, and back; steps of several processes are in test_expert_parallel.py."""

import pytest
import torch

from deepfuse.blocks.message import E4M3, Message, pack, unpack
from deepfuse.blocks.moe import Experts
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.expert_permute import expert_permute, expert_permute_ref
from deepfuse.ops.quantize import quantize


@pytest.mark.parametrize("width", [1, 7, 128, 200, 7168])
@pytest.mark.parametrize("rows", [0, 3])
def test_bytes_are_those_of_values_and_scales(rows, width):
    x = torch.randn(rows, width, dtype=torch.bfloat16)
    packed = pack(x)
    assert packed.dtype == torch.uint8 and packed.shape[1] % 16 == 0
    for actual, expected in zip(unpack(packed, width), quantize(x, E4M3, 1, 128, False), strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual.float(), expected.float())


def test_a_row_of_deepseek_v3_has_half_the_bytes():
    x = torch.zeros(1, 7168, dtype=torch.bfloat16)
    # a byte a value, and four for each 128 of them
    assert pack(x).shape[1] == 7168 + 56 * 4 == 7392
    assert pack(x).nbytes < 0.52 * x.nbytes


def test_rounding_what_was_rounded_changes_it():
    """Why experts are given the numbers that travelled: the float32 scale of rounded values may be another."""
    x = torch.randn(500, 128)
    values, scale = quantize(x, E4M3, 1, 128, False)
    again = quantize(dequantize(values, scale, 1, 128, torch.bfloat16), E4M3, 1, 128, False)
    assert not torch.equal(again[1], scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_step_moves_bytes_as_it_moves_rows_and_gives_the_gradient_of_a_move(dtype):
    ffn, experts = Experts(4, 200, 8), torch.tensor([[2, 0], [2, 3], [0, 1]])
    x = torch.randn(3, 200, dtype=dtype)
    results = []
    for dispatch in ("auto", "fp8"):
        leaf = x.clone().requires_grad_()
        rows = Message.of(leaf, dispatch, ffn).permuted(experts, 4)[0]
        # two rows change places, and one slot stays empty
        rows = rows.reordered(lambda part: part.view(3, 2, -1).transpose(0, 1).flatten(0, 1))
        slot = torch.tensor([[4, 1], [-1, 6], [0, 2], [3, -1], [-1, -1], [5, -1]])
        source = torch.tensor([4, 1, 5, 6, 0, 10, 3])
        opened, quantized = rows.in_slots(source, slot).opened()
        (opened * torch.arange(7.0)[:, None].to(dtype)).sum().backward()
        results.append((opened.detach(), leaf.grad))
        assert (quantized is None) == (dispatch == "auto")
    (plain, plain_gradient), (rounded, gradient) = results
    values, scale = quantize(x, E4M3, 1, 128, False)
    expected = dequantize(values, scale, 1, 128, dtype)
    # the same rows, each rounded: found by the row of x that it is closest to
    nearest = torch.cdist(plain.float(), x.float()).argmin(1)
    assert torch.equal(rounded, expected[nearest])
    assert torch.equal(gradient, plain_gradient) and gradient.dtype == dtype


def test_bytes_are_sorted_by_the_kernel_too():
    packed, experts = pack(torch.randn(5, 200)), torch.tensor([[1, 0], [2, 1], [0, 2], [1, 2], [0, 1]])
    kernel = next(p.fn for p in expert_permute.providers if p.name == "triton")
    found = kernel(packed, experts, 3), expert_permute_ref(packed, experts, 3)
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual, expected)
