"""Reading pages out of the latent cache, in the order of the table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfuse.ops.append_latent import PAGE_SIZE, append_latent
from deepfuse.ops.gather_latent import _launch, gather_latent, gather_latent_ref

pytestmark = pytest.mark.usefixtures("kernel_device")

every_provider = pytest.mark.parametrize("gather", [gather_latent_ref, _launch], ids=["reference", "triton"])


@every_provider
@settings(max_examples=10)
@given(B=st.integers(0, 3), P=st.integers(0, 3), D=st.integers(1, 70), seed=st.integers(0, 99))
def test_rows_follow_the_table(gather, B, P, D, seed):
    torch.manual_seed(seed)
    cache, table = torch.randn(4, PAGE_SIZE, D), torch.randint(0, 4, (B, P))
    rows, starts = gather(cache, table)
    assert rows.shape == (B * P * PAGE_SIZE, D) and starts.tolist() == [b * P * PAGE_SIZE for b in range(B)]
    assert starts.dtype == torch.int32
    for entry, page in enumerate(table.flatten().tolist()):
        assert torch.equal(rows[entry * PAGE_SIZE : (entry + 1) * PAGE_SIZE], cache[page])


@every_provider
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_was_appended_is_gathered(gather, dtype):
    table = torch.tensor([[3, 1], [2, 0]])
    cache = torch.zeros(4, PAGE_SIZE, 24, dtype=dtype)
    latent, k_rope = torch.randn(100, 16, dtype=dtype), torch.randn(100, 8, dtype=dtype)
    place = torch.arange(100)
    append_latent(cache, latent, k_rope, table[0, place // PAGE_SIZE] * PAGE_SIZE + place % PAGE_SIZE)
    rows, _ = gather(cache, table)
    assert torch.equal(rows[:100], torch.cat((latent, k_rope), -1)) and not rows[100:].any()


@every_provider
def test_reads_one_layer_of_a_cache_of_many_and_any_strides(gather):
    layers, table = torch.randn(4, 2, PAGE_SIZE, 24), torch.tensor([[1, 3], [0, 2]])
    expected, _ = gather_latent_ref(layers[:, 1].contiguous(), table)
    for cache in (layers[:, 1], layers[:, 1].mT.contiguous().mT):
        rows, _ = gather(cache, table)
        assert torch.equal(rows, expected) and rows.is_contiguous()
    assert torch.equal(gather(layers[:, 1], table.T.contiguous().T)[0], expected)


def test_refuses_what_does_not_fit():
    with pytest.raises(
        ValueError, match=r"gather_latent: want cache \[pages, 64, C \+ R\] .*got \[4, 32, 24\] and \[1"
    ):
        gather_latent(torch.ones(4, 32, 24), torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"block_table \[B, P\], got \[4, 64, 24\] and \[3\]"):
        gather_latent(torch.ones(4, 64, 24), torch.zeros(3, dtype=torch.int64))
