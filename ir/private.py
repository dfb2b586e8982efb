"""Every private PyTorch API the project uses below the compiler's hooks: torch may change these without notice.

``docs`` and tests call nothing else that starts with an underscore; a new torch is tried here first.
"""

import torch
from torch import Tensor


def flash_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """PyTorch's fused attention on a CPU, with its statistics (the public function keeps them to itself).

    Args:
        q, k, v: ``[B, H, Q, D]``, ``[B, H, K, D]`` and ``[B, H, K, D]`` of one dtype; only the last dimension must be
            contiguous.
        causal: masks by ``row >= column``, which is bottom-right aligned only where Q is K.
        mask: ``[Q, K]`` in the dtype of ``q``, added to the scores; excludes ``causal``.

    Returns:
        ``out [B, H, Q, D]`` and ``lse [B, H, Q]``, float32 or wider.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )


def flash_attention_cpu_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    causal: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``flash_attention_cpu`` with respect to ``q``, ``k`` and ``v``."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
