"""The arguments of attention over expanded keys and values: whose rows they are, and what of them fits.

Sequence b owns queries ``q_start[b] .. q_start[b+1]`` and keys ``k_start[b] .. k_start[b] + k_len[b]``; its queries are
the last tokens of its keys. A row of ``kv`` is, per head, the keys' nope part and then the values; the rotary key is one
head, shared by all. ``mla_attention`` and its gradient take them so.
Dims: T queries, S keys, B sequences, H heads, N nope width, R rotary width, V value width; of a sequence Q queries and
K keys.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.interpreter import interpreted
from deepfuse.ir.provider import float32_at_most
from deepfuse.ir.sizes import differ


def sequences(q_start: Tensor, k_start: Tensor, k_len: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of the queries and of the keys of each sequence that has queries."""
    starts = q_start.tolist()
    for begin, end, key, length in zip(starts[:-1], starts[1:], k_start.tolist(), k_len.tolist(), strict=True):
        if end > begin:
            yield slice(begin, end), slice(key, key + length)


def rows_of(q: Tensor, kv: Tensor, k_rope: Tensor, queries: slice, keys: slice) -> tuple[Tensor, Tensor, Tensor]:
    N = q.shape[-1] - k_rope.shape[-1]
    kv_KHD = kv[keys]
    k_rope_KHR = k_rope[keys].unsqueeze(1).expand(-1, kv.shape[1], -1)
    return q[queries], torch.cat((kv_KHD[..., :N], k_rope_KHR), -1), kv_KHD[..., N:]


def visible(scores: Tensor) -> Tensor:
    """``[Q, K]`` mask of the keys a query sees: those up to its own place, the queries being the last keys."""
    Q, K = scores.shape[-2:]
    return torch.ones(Q, K, dtype=torch.bool, device=scores.device).tril(K - Q)


def value_width(q: Tensor, kv: Tensor, k_rope: Tensor) -> int:
    return kv.shape[-1] - (q.shape[-1] - k_rope.shape[-1])


@triton.jit
def query_block(q_start_ptr, k_start_ptr, k_len_ptr, T, B, BLOCK_B: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Sequence and block of queries of this program: ``begin, Q`` its queries, ``key, K`` its keys, ``i0`` the block.

    Sequence b is served from program ``q_start[b] // BLOCK_Q + b`` on, which leaves each at least as many programs as
    it has blocks; programs to spare find ``i0 >= Q``. Rows behind the last sequence are one more, without keys.
    """
    # blocks of late queries see the most keys: they start first
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    bs = tl.arange(0, BLOCK_B)
    starts = tl.load(q_start_ptr + bs, mask=bs <= B, other=0)
    b = tl.sum(((starts // BLOCK_Q + bs <= program) & (bs <= B)).to(tl.int32), 0) - 1
    begin = tl.load(q_start_ptr + b).to(tl.int32)
    end = tl.load(q_start_ptr + b + 1, mask=b < B, other=T).to(tl.int32)
    key = tl.load(k_start_ptr + b, mask=b < B, other=0).to(tl.int64)
    K = tl.load(k_len_ptr + b, mask=b < B, other=0).to(tl.int32)
    return begin.to(tl.int64), end - begin, key, K, (program - begin // BLOCK_Q - b) * BLOCK_Q


def tile_constants(q: Tensor, kv: Tensor, k_rope: Tensor, B: int, block_q: int, block_k: int) -> dict[str, Any]:
    """What kernels over these arguments are compiled for."""
    constants: dict[str, Any] = {
        "N": q.shape[2] - k_rope.shape[1],
        "R": k_rope.shape[1],
        "V": value_width(q, kv, k_rope),
    }
    return {
        **constants,
        **{f"PAD_{name}": _padded_size(width) for name, width in constants.items()},
        "BLOCK_B": triton.next_power_of_2(B + 1),
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "DOT_FLOAT32": interpreted(),
    }


def padded_width(q: Tensor, kv: Tensor, k_rope: Tensor) -> int:
    """Numbers a head holds of a key and its value: ``PAD_N + PAD_R + PAD_V``."""
    V, R = value_width(q, kv, k_rope), k_rope.shape[1]
    return sum(map(_padded_size, (q.shape[2] - R, R, V)))


def _padded_size(width: int) -> int:
    # tl.dot wants powers of two, 16 at least
    return max(triton.next_power_of_2(width), 16)


def batches(
    q: Tensor, q_start: Tensor, k_start: Tensor, k_len: Tensor
) -> Iterator[tuple[tuple[list[int], int], tuple[list[int], int], dict[str, Any]]]:
    """First rows and length of the queries, those of the keys, and the masking, of all sequences of equal lengths."""
    alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for queries, keys in sequences(q_start, k_start, k_len):
        if keys.stop > keys.start:
            lengths = queries.stop - queries.start, keys.stop - keys.start
            alike.setdefault(lengths, []).append((queries.start, keys.start))
    for (Q, K), firsts in alike.items():
        mask = None
        if 1 < Q < K:
            mask = q.new_zeros(Q, K)
            mask.masked_fill_(~visible(mask), float("-inf"))
        yield ([f for f, _ in firsts], Q), ([f for _, f in firsts], K), {"causal": 1 < Q == K, "mask": mask}


def keys_and_values(
    kv: Tensor, k_rope: Tensor, keys: tuple[list[int], int], D: int, width: int
) -> tuple[Tensor, Tensor]:
    """``[B, H, K, width]`` keys and values, padded with zeros: the fused attention wants both equally wide."""
    kv_BKHX, k_rope_BKR = take(kv, *keys), take(k_rope, *keys)
    N = D - k_rope.shape[1]
    k_rope_BKHR = k_rope_BKR.unsqueeze(2).expand(-1, -1, kv.shape[1], -1)
    k_BKHD = padded(torch.cat((kv_BKHX[..., :N], k_rope_BKHR), -1), width)
    return k_BKHD.transpose(1, 2), padded(kv_BKHX[..., N:], width).transpose(1, 2)


def take(x: Tensor, firsts: list[int], length: int) -> Tensor:
    """Rows ``first .. first + length`` of ``x`` for each of ``firsts``, stacked; a view where they are neighbours."""
    if _neighbours(firsts, length):
        return x[firsts[0] : firsts[0] + len(firsts) * length].unflatten(0, (-1, length))
    return torch.stack([x[first : first + length] for first in firsts])


def put(x: Tensor, firsts: list[int], length: int, rows: Tensor) -> None:
    if _neighbours(firsts, length):
        take(x, firsts, length).copy_(rows)
        return
    for first, part in zip(firsts, rows, strict=True):
        x[first : first + length] = part


def _neighbours(firsts: list[int], length: int) -> bool:
    return firsts == list(range(firsts[0], firsts[0] + len(firsts) * length, length))


def padded(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


def stats_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def tiles_fit(q: Tensor, kv: Tensor, k_rope: Tensor, *rest: Any) -> str | None:
    width = padded_width(q, kv, k_rope) * q.element_size()
    if width > 2560:
        return f"32 queries and keys must fit shared memory: at most 2560 bytes a head (padded), not {width}"
    return float32_at_most(q)


def check_arguments(
    q: Tensor, kv: Tensor, k_rope: Tensor, q_start: Tensor, k_start: Tensor, k_len: Tensor, scale: float
) -> None:
    if (
        q.ndim != 3
        or kv.ndim != 3
        or k_rope.ndim != 2
        or q.shape[1] != kv.shape[1]
        or not k_rope.shape[1] < q.shape[2]
        or not q.shape[2] - k_rope.shape[1] < kv.shape[2]
        or any(t.ndim != 1 for t in (q_start, k_start, k_len))
        or differ(kv.shape[0], k_rope.shape[0])
        or differ(k_start.shape[0], k_len.shape[0])
        or differ(q_start.shape[0], k_len.shape[0] + 1)
    ):
        raise ValueError(
            "mla_attention: want q [T, H, N + R], kv [S, H, N + V], k_rope [S, R], q_start [B + 1], k_start [B] and "
            f"k_len [B], got {[list(t.shape) for t in (q, kv, k_rope, q_start, k_start, k_len)]}"
        )
    if not q.dtype == kv.dtype == k_rope.dtype:
        raise TypeError(
            f"mla_attention: want q, kv and k_rope of one dtype, got {q.dtype}, {kv.dtype} and {k_rope.dtype}"
        )


def attention_flops(q: Tensor, kv: Tensor, k_len: Tensor, width: Any) -> Any:
    """Of products that take ``width`` multiply-adds for each head, query and key that it sees.

    Lengths are values, which a cost may not read: queries and keys are taken as spread evenly over the sequences.
    """
    (T, H), S, B = q.shape[:2], kv.shape[0], k_len.shape[0]
    pairs = T * S // max(B, 1) if isinstance(B, int) else T * S // B
    causal = 2 if T is S or T == S else 1
    return 2 * pairs * H * width // causal


def sample_arguments(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    # (queries, keys) of each sequence; H, N, R, V
    for lengths, H, N, R, V in [
        ([(3, 3)], 2, 8, 4, 8),
        ([(1, 1), (5, 5), (0, 0), (17, 17)], 3, 16, 8, 12),  # uneven, one of them empty
        ([(1, 9), (4, 20)], 1, 8, 8, 16),  # fewer queries than keys; values wider than keys' nope part
        ([(40, 40), (70, 70)], 2, 32, 16, 32),
    ]:
        queries, keys = [q for q, _ in lengths], [k for _, k in lengths]
        T, S = sum(queries), sum(keys)
        starts = torch.tensor([0, *keys], device=device).cumsum(0)[:-1].to(torch.int32)
        yield (
            torch.randn(T, H, N + R, device=device, dtype=dtype),
            torch.randn(S, H, N + V, device=device, dtype=dtype),
            torch.randn(S, R, device=device, dtype=dtype),
            torch.tensor([0, *queries], device=device).cumsum(0).to(torch.int32),
            starts,
            torch.tensor(keys, device=device, dtype=torch.int32),
            (N + R) ** -0.5,
        )
