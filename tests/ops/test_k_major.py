"""Copies of FP8 matrices that lie as tensor cores want: the same values, and rows that begin at 16 bytes."""

import pytest
import torch

from accuracy import same_bits
from deepfuse.ops.k_major import k_major

E4M3 = torch.float8_e4m3fn
on_kernel_device = pytest.mark.usefixtures("kernel_device")


def _bytes(*shape):
    return torch.randint(1, 256, shape, dtype=torch.uint8).view(E4M3)


@on_kernel_device
@pytest.mark.parametrize(
    "x",
    [
        lambda: _bytes(70, 144).t(),
        lambda: _bytes(70, 200).t(),
        lambda: _bytes(3, 48, 130).mT,
        lambda: _bytes(5, 130),
        lambda: _bytes(2, 3, 5, 32)[..., 1:],
        # rows that begin anywhere
        lambda: _bytes(7, 140)[:, 4:132],
        lambda: _bytes(9, 33)[:, 1:],
        lambda: _bytes(0, 100),
        lambda: _bytes(100, 0).t(),
    ],
)
def test_copies_what_lies_otherwise(x):
    x = x()
    K = x.shape[-1]
    y = k_major(x)
    assert y.is_contiguous() and y.data_ptr() % 16 == 0
    assert y.shape == (*x.shape[:-1], K if K % 16 == 0 else -(-K // 128) * 128)
    assert same_bits(y[..., :K], x)
    assert not y.view(torch.uint8)[..., K:].any()


def test_leaves_alone_what_lies_so():
    x = _bytes(4, 6, 64)
    for view in (x, x[1:3], x[:, ::2], x[..., 16:48], x[0, 0].expand(6, 64)):
        assert k_major(view) is view
