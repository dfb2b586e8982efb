"""What is the gradient's alone; that it is PyTorch's is tested with the forward pass, in test_mla_attention.py."""

import pytest
import torch

from deepfuse.ir.interpreter import interpreted
from deepfuse.ops.mla_attention import mla_attention_ref
from deepfuse.ops.mla_attention_backward import _launch, mla_attention_backward

pytestmark = pytest.mark.usefixtures("kernel_device")


def _arguments(queries=40, keys=60, H=3, dtype=torch.float32):
    """Arguments for one sequence, as the forward pass leaves them."""
    N, R, V = 8, 4, 8
    forward = (
        torch.randn(queries, H, N + R, dtype=dtype),
        torch.randn(keys, H, N + V, dtype=dtype),
        torch.randn(keys, R, dtype=dtype),
        torch.tensor([0, queries], dtype=torch.int32),
        torch.tensor([0], dtype=torch.int32),
        torch.tensor([keys], dtype=torch.int32),
        (N + R) ** -0.5,
    )
    out, lse = mla_attention_ref(*forward)
    return torch.randn_like(out), *forward[:3], out, lse, *forward[3:]


def test_is_the_same_every_time():
    args = _arguments()
    assert all(torch.equal(a, b) for a, b in zip(_launch(*args), _launch(*args), strict=True))


def test_float64_goes_to_the_reference():
    assert mla_attention_backward.choose(_arguments()).provider.name == ("torch" if interpreted() else "triton")
    choice = mla_attention_backward.choose(_arguments(dtype=torch.float64))
    assert choice.provider.name == "reference"


def test_refuses_what_does_not_fit():
    dout, q, kv, k_rope, out, lse, *rest = _arguments(3, 3, 2)
    for wrong, *forward in [(dout[:2], out, lse), (dout, out[..., :7], lse), (dout, out, lse[:, 0])]:
        with pytest.raises(ValueError, match=r"want dout and out \[3, 2, 8\] and lse \[3, 2\], got \[\[[23], 2, 8\], "):
            mla_attention_backward(wrong, q, kv, k_rope, *forward, *rest)
    with pytest.raises(ValueError, match="mla_attention: want q"):
        mla_attention_backward(dout, q, kv[:2], k_rope, out, lse, *rest)
