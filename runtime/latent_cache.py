"""The paged latent cache: one tensor a layer, pages handed to sequences and taken back.

A dtype of ``float8_e4m3fn`` stands for the format of ``append_latent_fp8``: bytes of E4M3 values, their float32 scales
and rotary keys in bfloat16.
Dims: P pages, C latent rank, R rotary width, L layers, W bytes of a row in FP8.
Source: DeepSeek-V2 (arXiv:2405.04434), table 1 (what is cached); Kwon et al. 2023 (arXiv:2309.06180) (paging).
"""

from dataclasses import dataclass, field

import torch

from deepfuse.blocks.config import Config
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.ops.append_latent_fp8 import row_bytes

FP8 = torch.float8_e4m3fn
"""The dtype that names the format of ``append_latent_fp8``."""


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
    """``layers[i]`` is ``[P, 64, C + R]``, or ``[P, 64, W]`` uint8; page 0 is nobody's (padding rows write there)."""

    def __init__(
        self, config: Config, *, max_batch_size: int, max_seq_len: int, dtype: torch.dtype, device: torch.device
    ):
        self.pages_per_sequence = -(-max_seq_len // PAGE_SIZE)
        num_pages = 1 + max_batch_size * self.pages_per_sequence
        width, stored = row_of(config, dtype)
        shape = (num_pages, PAGE_SIZE, width)
        self.layers = [torch.zeros(shape, dtype=stored, device=device) for _ in range(config.num_hidden_layers)]
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


def cached_dtype(asked: str, config: Config, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The cache's dtype, ``float8_e4m3fn`` for its format in FP8, from what ``build`` takes.

    Raises:
        ValueError: there is no such format, or it does not fit the model or the device.
    """
    if asked not in ("auto", "fp8"):
        raise ValueError(f"build: want cache_dtype 'auto' or 'fp8', got {asked!r}")
    if asked == "auto":
        return dtype
    C, R = config.kv_lora_rank, config.qk_rope_head_dim
    if C % 4 or R % 2:
        raise ValueError(
            f"build: want kv_lora_rank a multiple of 4 and qk_rope_head_dim of 2 for cache_dtype 'fp8', got {C} and {R}"
        )
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 9)
    if capability < (8, 9):
        raise ValueError(
            "build: want a GPU that computes with FP8, of compute capability 8.9 or later, for cache_dtype 'fp8', got "
            f"{capability[0]}.{capability[1]}"
        )
    return FP8


def row_of(config: Config, dtype: torch.dtype) -> tuple[int, torch.dtype]:
    """Width and dtype of a row of the cache."""
    if dtype == FP8:
        return row_bytes(config.kv_lora_rank, config.qk_rope_head_dim), torch.uint8
    return config.cache_width, dtype


def cache_bytes(config: Config, dtype: torch.dtype, *, max_batch_size: int, max_seq_len: int) -> int:
    """Bytes a :class:`LatentCache` takes."""
    pages = 1 + max_batch_size * -(-max_seq_len // PAGE_SIZE)
    return pages * PAGE_SIZE * latent_bytes_per_token(config, dtype)


def latent_bytes_per_token(config: Config, dtype: torch.dtype) -> int:
    """Bytes MLA caches per token, over all layers: ``L * (C + R)`` numbers, or ``L * W`` bytes."""
    width, stored = row_of(config, dtype)
    return config.num_hidden_layers * width * stored.itemsize


def mha_bytes_per_token(config: Config, dtype: torch.dtype) -> int:
    """What multi-head attention of the same shape would cache: a key and a value for each head."""
    per_layer = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return config.num_hidden_layers * per_layer * dtype.itemsize


def gqa_bytes_per_token(config: Config, dtype: torch.dtype, groups: int = 8) -> int:
    """What grouped-query attention with ``groups`` heads as wide as the values would cache."""
    return config.num_hidden_layers * groups * 2 * config.v_head_dim * dtype.itemsize
