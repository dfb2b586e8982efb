"""Rotary tables: the cosines and sines of the angles of some positions, with YaRN's frequencies.

    inv_freq[i] = theta ** (-2 i / R);  YaRN divides it by ``factor`` for slow pairs, leaves fast pairs, and blends
    linearly between the pairs that turn beta_fast and beta_slow times over the original context.

Dims: T tokens, R rotary width.
Source: Su et al. 2021 (arXiv:2104.09864); Peng et al. 2023 (arXiv:2309.00071), eq. 17-23.
"""

import math

import torch
from torch import Tensor, nn

from deepfuse.blocks.config import Config, RopeScaling, yarn_mscale


def inverse_frequencies(width: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """``[R/2]`` float32, in radians per position."""
    freq = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
    if scaling is None:
        return freq

    def pair_that_turns(rotations: float) -> float:
        context = scaling.original_max_position_embeddings
        return width * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    # equal ends would divide by zero; any small width makes the ramp a step
    ramp = (torch.arange(width // 2, dtype=torch.float32, device="cpu") - low) / (max(high - low, 0.001))
    slow = ramp.clamp(0, 1)
    return freq / scaling.factor * slow + freq * (1 - slow)


class Rotary(nn.Module):
    """``positions [T] -> (cos, sin)``, each ``[T, R/2]`` float32."""

    inv_freq: Tensor

    def __init__(self, config: Config):
        super().__init__()
        scaling = config.rope_scaling
        inv_freq = inverse_frequencies(config.qk_rope_head_dim, config.rope_theta, scaling)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        # 1 for the released models, whose mscale and mscale_all_dim are equal: the temperature is in the softmax scale
        self.mscale = 1.0
        if scaling is not None:
            self.mscale = yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(
                scaling.factor, scaling.mscale_all_dim
            )

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle_TP = positions.to(torch.float32)[:, None] * self.inv_freq
        return angle_TP.cos() * self.mscale, angle_TP.sin() * self.mscale
