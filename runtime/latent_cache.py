"""The paged latent cache: one tensor a layer, pages handed to sequences and taken back.

Dims: P pages, C latent rank, R rotary width, L layers.
Source: DeepSeek-V2 (arXiv:2405.04434), table 1 (what is cached); Kwon et al. 2023 (arXiv:2309.06180) (paging).
"""

from dataclasses import dataclass, field

import torch

from deepfuse.blocks.config import Config
from deepfuse.ops.append_latent import PAGE_SIZE


class CacheFullError(RuntimeError):
    """There are not enough free pages for a sequence."""


@dataclass(slots=True)
class Sequence:
    """One sequence's place in the cache."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    """Tokens written."""

    def slot(self, place: int) -> int:
        """Where the token at this place lies: ``page * 64 + offset``."""
        return self.pages[place // PAGE_SIZE] * PAGE_SIZE + place % PAGE_SIZE


class LatentCache:
    """``layers[i]`` is ``[P, 64, C + R]``; page 0 is nobody's (padding rows write there)."""

    def __init__(
        self, config: Config, *, max_batch_size: int, max_seq_len: int, dtype: torch.dtype, device: torch.device
    ):
        self.pages_per_sequence = -(-max_seq_len // PAGE_SIZE)
        num_pages = 1 + max_batch_size * self.pages_per_sequence
        shape = (num_pages, PAGE_SIZE, config.cache_width)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self._free = list(range(num_pages - 1, 0, -1))

    def allocate(self, tokens: int) -> Sequence:
        """Pages for a sequence of up to ``tokens`` tokens.

        Raises:
            CacheFullError: too few pages are free.
        """
        wanted = -(-tokens // PAGE_SIZE)
        if wanted > len(self._free):
            raise CacheFullError(
                f"latent cache: want {wanted} pages of {PAGE_SIZE} tokens, {len(self._free)} are free; finish running "
                "generations first, or build with a larger max_batch_size or max_seq_len"
            )
        return Sequence([self._free.pop() for _ in range(wanted)])

    def release(self, sequence: Sequence) -> None:
        """Take the pages back."""
        self._free.extend(reversed(sequence.pages))
        sequence.pages, sequence.length = [], 0

    @property
    def free_pages(self) -> int:
        return len(self._free)


def cache_bytes(config: Config, dtype: torch.dtype, *, max_batch_size: int, max_seq_len: int) -> int:
    """Bytes a :class:`LatentCache` takes."""
    pages = 1 + max_batch_size * -(-max_seq_len // PAGE_SIZE)
    return pages * PAGE_SIZE * latent_bytes_per_token(config, dtype)


def latent_bytes_per_token(config: Config, dtype: torch.dtype) -> int:
    """Bytes MLA caches per token, over all layers: ``L * (C + R)`` numbers."""
    return config.num_hidden_layers * config.cache_width * dtype.itemsize


def mha_bytes_per_token(config: Config, dtype: torch.dtype) -> int:
    """What multi-head attention of the same shape would cache: a key and a value for each head."""
    per_layer = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return config.num_hidden_layers * per_layer * dtype.itemsize


def gqa_bytes_per_token(config: Config, dtype: torch.dtype, groups: int = 8) -> int:
    """What grouped-query attention with ``groups`` heads as wide as the values would cache."""
    return config.num_hidden_layers * groups * 2 * config.v_head_dim * dtype.itemsize
