"""Pages are handed out once and come back; bytes per token are those of the papers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepfuse.blocks.presets import PRESETS
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.runtime.latent_cache import (
    CacheFullError,
    LatentCache,
    Sequence,
    cache_bytes,
    gqa_bytes_per_token,
    latent_bytes_per_token,
    mha_bytes_per_token,
)
from tiny_checkpoint import TINY

CPU = torch.device("cpu")
V3 = PRESETS["v3-671b"]()


def cache_of(max_batch_size: int, max_seq_len: int) -> LatentCache:
    return LatentCache(TINY, max_batch_size=max_batch_size, max_seq_len=max_seq_len, dtype=torch.float32, device=CPU)


@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 400)), max_size=40),
    max_batch_size=st.integers(1, 4),
    max_seq_len=st.integers(1, 200),
)
def test_a_page_belongs_to_one_sequence(steps: list[tuple[bool, int]], max_batch_size: int, max_seq_len: int) -> None:
    cache = cache_of(max_batch_size, max_seq_len)
    pages = cache.free_pages
    assert pages == max_batch_size * -(-max_seq_len // PAGE_SIZE) == len(cache.layers[0]) - 1
    held: list[Sequence] = []
    for takes, number in steps:
        if takes:
            wanted = -(-number // PAGE_SIZE)
            if wanted > cache.free_pages:
                before = cache.free_pages
                with pytest.raises(CacheFullError):
                    cache.allocate(number)
                assert cache.free_pages == before
                continue
            held.append(cache.allocate(number))
            assert len(held[-1].pages) == wanted and held[-1].length == 0
        elif held:
            released = held.pop(number % len(held))
            cache.release(released)
            cache.release(released)  # twice gives nothing back twice
        out = [page for sequence in held for page in sequence.pages]
        assert len(set(out)) == len(out)
        assert set(out) <= set(range(1, pages + 1))
        assert cache.free_pages == pages - len(out)
    for sequence in held:
        cache.release(sequence)
    assert cache.free_pages == pages
    assert sorted(cache.allocate(pages * PAGE_SIZE).pages) == list(range(1, pages + 1))


def test_a_full_cache_says_what_is_free() -> None:
    cache = cache_of(2, 100)
    cache.allocate(3 * PAGE_SIZE)
    with pytest.raises(CacheFullError, match="want 2 pages of 64 tokens, 1 are free; finish running generations first"):
        cache.allocate(PAGE_SIZE + 1)
    cache.allocate(PAGE_SIZE)
    with pytest.raises(CacheFullError, match="want 1 pages of 64 tokens, 0 are free"):
        cache.allocate(1)


@given(pages=st.lists(st.integers(1, 99), min_size=1, max_size=5, unique=True))
def test_slots_number_the_tokens_of_all_pages(pages: list[int]) -> None:
    slots = [Sequence(pages).slot(i) for i in range(len(pages) * PAGE_SIZE)]
    assert slots == [PAGE_SIZE * page + i for page in pages for i in range(PAGE_SIZE)]


def test_a_cache_takes_the_bytes_it_was_said_to() -> None:
    for batch, length in ((1, 1), (2, 64), (3, 65)):
        cache = cache_of(batch, length)
        taken = sum(layer.numel() * layer.element_size() for layer in cache.layers)
        assert taken == cache_bytes(TINY, torch.float32, max_batch_size=batch, max_seq_len=length)
        assert len(cache.layers) == TINY.num_hidden_layers


def test_bytes_per_token_of_deepseek_v3() -> None:
    """70 KB in bfloat16: Zhao et al. 2025 (arXiv:2505.09343), table 1."""
    mla = latent_bytes_per_token(V3, torch.bfloat16)
    assert mla == 61 * (512 + 64) * 2 == 70272
    # grouped-query attention with 8 groups of 128
    assert round(gqa_bytes_per_token(V3, torch.bfloat16) / mla, 2) == 3.56
    # keys of 128 + 64 and values of 128 for 128 heads
    assert round(mha_bytes_per_token(V3, torch.bfloat16) / mla, 1) == 71.1
    # keys without the rotary part
    assert round(61 * 128 * (128 + 128) * 2 / mla, 1) == 56.9
    assert latent_bytes_per_token(V3, torch.float32) == 2 * mla


def test_bytes_per_token_follow_the_layers() -> None:
    for count in (latent_bytes_per_token, mha_bytes_per_token, gqa_bytes_per_token):
        one = count(replace(TINY, num_hidden_layers=1), torch.float16)
        assert count(replace(TINY, num_hidden_layers=5), torch.float16) == 5 * one
