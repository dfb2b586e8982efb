"""``fp8_grouped_matmul`` for many rows a group on Hopper: the tiles of `ops/fp8_matmul_gluon.py`, each within a group.

Where groups end is known on the device alone. So a small kernel first writes a table of the rows of tiles there are, and
the product reads it: their number, and of each the expert, the first row and the end of the group.

Dims: M rows, E groups (experts), K inputs, N outputs.
Source: as there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ops.fp8_matmul_gluon import launch_tiles, processors_of
from deepfuse.ops.k_major import k_major


@triton.jit
def _tiles_kernel(
    offsets_ptr, table_ptr, M, E, room, HEIGHT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr
):
    """``table[0]`` is how many rows of tiles there are; three numbers for each follow."""
    e = tl.arange(0, BLOCK_E)
    end_E = tl.minimum(tl.load(offsets_ptr + e, mask=e < E, other=0), M)
    begin_E = tl.maximum(tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e < E), other=0), 0)
    tiles_E = tl.cdiv(tl.maximum(end_E - begin_E, 0), HEIGHT)
    after_E = tl.cumsum(tiles_E, 0)
    if tl.program_id(0) == 0:
        # wrong offsets must not lead past the table
        tl.store(table_ptr, tl.minimum(tl.sum(tiles_E, 0), room))
    tile = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.sum((after_E[None, :] <= tile[:, None]).to(tl.int32), 1)
    own = expert[:, None] == e[None, :]
    before = tl.sum(tl.where(own, (after_E - tiles_E)[None, :], 0), 1)
    begin = tl.sum(tl.where(own, begin_E[None, :], 0), 1)
    end = tl.sum(tl.where(own, end_E[None, :], 0), 1)
    entry, mask = table_ptr + 1 + tile * 3, (tile < room) & (expert < E)
    tl.store(entry, expert, mask=mask)
    tl.store(entry + 1, begin + (tile - before) * HEIGHT, mask=mask)
    tl.store(entry + 2, end, mask=mask)


def launch(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    """Arguments of ``fp8_grouped_matmul``."""
    M, (E, N, K) = x.shape[0], weight.shape
    y = torch.empty((M, N), dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    if K == 0:
        return y.zero_()
    # a descriptor has one stride for the rows of all experts
    x, weight = k_major(x), k_major(weight).contiguous()
    # half of a high tile is empty where a group has few rows
    turns = 2 if M >= 512 * E else 1
    # a group wastes less than one tile
    room = M // (128 * turns) + min(E, M)
    table = torch.empty((1 + 3 * room,), dtype=torch.int32, device=x.device)
    _tiles_kernel[(triton.cdiv(room, 32),)](
        offsets.contiguous(),
        table,
        M,
        E,
        room,
        HEIGHT=128 * turns,
        BLOCK_E=triton.next_power_of_2(E),
        BLOCK_T=32,
        num_warps=4,
    )
    programs = min(room * triton.cdiv(N, 128), processors_of(x.device))
    launch_tiles(x, x_scale, weight, weight_scale, y, table, turns=turns, programs=programs)
    return y
