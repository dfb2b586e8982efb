"""How a model is trained: all that a trainer is told beside the model.

Source: DeepSeek-V3 (arXiv:2412.19437), section 4.2.
"""

import math
from dataclasses import dataclass
from typing import get_args

import torch

from deepfuse.blocks.fp8_training import Saved


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a model is trained."""

    steps: int
    batch_size: int = 16
    """Sequences a step."""
    seq_len: int = 512
    """Tokens a sequence; windows are drawn at random, across documents."""
    lr: float = 3e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    bias_update_speed: float = 1e-3
    aux_loss_alpha: float = 0.0
    """Weight of the sequence-wise balance loss, which is not in the loss that is told; 1e-4 for DeepSeek-V3."""
    mtp_steps: int = 0
    """Last steps, in which the multi-token-prediction module alone is trained, the rest of the model fixed."""
    dtype: torch.dtype = torch.bfloat16
    fp8_saved: Saved = "high"
    """Trained in FP8, what the weight gradient reads of a layer's input: it as it came, or its FP8 values."""
    seed: int = 0
    checkpoint_every: int = 200
    """Steps between checkpoints."""

    def check(self) -> None:
        """What ``build`` and a trainer do with it, so that of several processes one tells for all.

        Raises:
            ValueError: a setting is out of its range.
        """
        for name in ("steps", "batch_size", "seq_len", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"training: want {name} >= 1, got {getattr(self, name)}")
        if not 0 <= self.aux_loss_alpha < math.inf:
            raise ValueError(f"training: want a finite aux_loss_alpha >= 0, got {self.aux_loss_alpha}")
        if self.fp8_saved not in get_args(Saved):
            raise ValueError(f"training: want fp8_saved out of {get_args(Saved)}, got {self.fp8_saved!r}")

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then cosine down to ``min_lr_ratio`` of the peak; the same again for the last phase."""
        begin, end = (0, self.steps) if step < self.steps else (self.steps, self.steps + self.mtp_steps)
        done = step - begin
        if done < self.warmup_steps:
            return self.lr * (done + 1) / self.warmup_steps
        progress = (done - self.warmup_steps) / max(end - begin - self.warmup_steps - 1, 1)
        return self.lr * (
            self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
        )
