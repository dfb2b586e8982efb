"""Rows of tokens on their way to experts: as they are, or as FP8 with their scales in one tensor of bytes.

    plain   rows [n, D]
    FP8     bytes [n, 16 ceil(D / 16) + 16 ceil(B / 4)]: E4M3 values, float32 scales of blocks of 1x128, each filled up

A token is quantized once, before it is copied for its experts. Experts that compute in FP8 read these very numbers, so
that nothing is rounded twice; others get them dequantized. Half the bytes of bfloat16 travel: 7392 for 14336 at D = 7168.
Bytes because Gloo does not take float8. Gradients of what travelled as FP8 come back as they are, in the dtype of the
rows, and results of experts always travel so. Beside the bytes goes a carrier, zeros of the shape of the rows that lie in
no memory: autograd sees it take each step, and takes the steps back with the gradient.
Dims: n rows, D width, B = ceil(D / 128) blocks.
Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.3 (dispatch in FP8, combine in BF16).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.collectives import all_to_all
from deepfuse.blocks.slots import fill, gradient_of_slots, to_slots
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.expert_permute import expert_permute
from deepfuse.ops.quantize import quantize

Dispatch = Literal["auto", "fp8"]
"""``fp8``, or ``auto``: FP8 to experts that would quantize the rows as well, which changes no number of theirs."""
E4M3 = torch.float8_e4m3fn
ALIGNED = 16
"""Bytes that values and scales are filled up to, so that both begin where a GPU reads widest."""


def _carrier(like: Tensor, rows: int) -> Tensor:
    return like.new_zeros(()).expand(rows, like.shape[1])


class _Sent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], axis: Axis) -> Tensor:
        ctx.way = received, sent, axis
        return _carrier(x, sum(received))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        received, sent, axis = ctx.way
        return all_to_all(grads[0], sent, received, axis), None, None, None


class _InSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(slot)
        return _carrier(x, slots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return gradient_of_slots(grads[0], *ctx.saved_tensors), None, None


class _Opened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        return dequantize(values, scale, 1, 128, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None


class Message:
    """Rows, and the steps that they take."""

    def __init__(self, x: Tensor, packed: Tensor | None):
        self.x, self.packed = x, packed

    @classmethod
    def of(cls, x: Tensor, dispatch: Dispatch, ffn: nn.Module) -> Self:
        """``x [n, D]`` for these experts."""
        return cls(x, pack(x) if dispatch == "fp8" or ffn.reads_fp8 else None)

    def permuted(self, experts: Tensor, num_experts: int) -> tuple[Self, Tensor, Tensor, Tensor]:
        """By expert; with order, inverse and offsets, as of ``expert_permute``."""
        if self.packed is None:
            rows, *places = expert_permute(self.x, experts, num_experts)
            return type(self)(rows, None), *places
        rows, order, inverse, offsets = expert_permute(self.packed, experts, num_experts)
        carrier = _InSlots.apply(self.x, inverse.view_as(experts), rows.shape[0])  # type: ignore[no-untyped-call]
        return type(self)(carrier, rows), order, inverse, offsets

    def in_slots(self, source: Tensor, slot: Tensor) -> Self:
        """See ``slots.py``; empty slots are rows of zeros."""
        if self.packed is None:
            return type(self)(to_slots(self.x, source, slot), None)
        carrier = _InSlots.apply(self.x, slot, source.shape[0])  # type: ignore[no-untyped-call]
        return type(self)(carrier, fill(self.packed, source, slot.shape[1]))

    def sent(self, received: Sequence[int], sent: Sequence[int], axis: Axis) -> Self:
        """To the processes of an axis: see :func:`~deepfuse.blocks.collectives.all_to_all`."""
        if self.packed is None:
            return type(self)(all_to_all(self.x, received, sent, axis), None)
        carrier = _Sent.apply(self.x, list(received), list(sent), axis)  # type: ignore[no-untyped-call]
        return type(self)(carrier, all_to_all(self.packed, received, sent, axis))

    def reordered(self, step: Callable[[Tensor], Tensor]) -> Self:
        """By a step that is but a view or a copy of the rows."""
        return type(self)(step(self.x), None if self.packed is None else step(self.packed))

    def opened(self) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """``[n, D]`` in the dtype they had; and the FP8 values and scales of these, where they came so."""
        if self.packed is None:
            return self.x, None
        values, scale = unpack(self.packed, self.x.shape[1])
        return _Opened.apply(self.x, values, scale), (values, scale)  # type: ignore[no-untyped-call]


def pack(x: Tensor) -> Tensor:
    """``x [n, D]`` as bytes."""
    values, scale = quantize(x, E4M3, 1, 128, False)
    # contiguous() would leave the strides of a single column of scales as they are
    scale = scale.clone(memory_format=torch.contiguous_format)
    return torch.cat([_filled(part.view(torch.uint8)) for part in (values, scale)], 1)


def unpack(packed: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Values ``[n, D]``, a view, and scales ``[n, B]`` of bytes."""
    begin = -(-width // ALIGNED) * ALIGNED
    scale = packed[:, begin : begin + 4 * -(-width // 128)]
    return packed[:, :width].view(E4M3), scale.contiguous().view(torch.float32)


def _filled(part: Tensor) -> Tensor:
    return functional.pad(part, (0, -part.shape[1] % ALIGNED)) if part.shape[1] % ALIGNED else part
