"""``fp8_matmul`` for many rows on Hopper: one program a multiprocessor, of which each warp has one task.

One warp fetches (TMA). Two groups of four warps multiply, each its own half of a tile's rows, and add every 128 of K to
float32 registers. Neither waits for the other: while one adds, the tensor cores work for the other, which is what the
short sums of this recipe cost elsewhere. Tiles are 128 columns wide and 128 or 256 rows high; of the higher, a group
takes the two halves of its rows in turn, so that what tensor cores have just summed needs 64 registers, not 128.

Of grouped rows (`ops/fp8_grouped_matmul_gluon.py`) a table says which expert's a row of tiles is, and where it ends.

    fetch:     wait empty[stage]; expect bytes on ready[stage]; copy a and b
    multiply:  wait ready[stage]; multiply; arrive at empty[stage] (two arrivals free it); add

Dims: M rows, N outputs, K inputs.
Source: DeepGEMM (github.com/deepseek-ai/DeepGEMM), `sm90_fp8_gemm_1d2d.cuh`: the division of labour; lmdeploy's
`blocked_fp8_gemm_gluon.py`: that Gluon can do it, and 256 x 128 in two turns.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from deepfuse.ops.k_major import k_major

# names of triton 3.9, and of 3.6
fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
write = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _tile(index, tiles_m, tiles_n, RASTER: gl.constexpr):
    """Row and column of a tile. RASTER rows go through the columns together: a and b are then read again from L2."""
    band = index // (RASTER * tiles_n) * RASTER
    in_band = index % (RASTER * tiles_n)
    rows = gl.minimum(tiles_m - band, RASTER)
    return band + in_band % rows, in_band // rows


@gluon.jit
def _rows(table_ptr, tile_m, M, HEIGHT: gl.constexpr, GROUPED: gl.constexpr):
    """Expert, first row, and end of the rows that a row of tiles has."""
    if GROUPED:
        entry = table_ptr + 1 + tile_m * 3
        return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2)
    else:  # noqa: RET505 - behind an if with a return Triton would compile both
        return tile_m * 0, tile_m * HEIGHT, M


@gluon.jit
def _fetch_tiles(
    a_desc, b_desc, table_ptr, a_tiles, b_tiles, ready, empty, M, N, tiles_m, tiles_n, blocks, GROUPED: gl.constexpr,
    TURNS: gl.constexpr, STAGES: gl.constexpr, RASTER: gl.constexpr,
):  # fmt: skip
    step = 0
    for index in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = _tile(index, tiles_m, tiles_n, RASTER)
        expert, first, _ = _rows(table_ptr, tile_m, M, 128 * TURNS, GROUPED)
        for block in range(blocks):
            stage = step % STAGES
            # the phase before the first counts as complete: nobody uses the buffers yet
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(stage), (2 * TURNS * 64 + 128) * 128)
            for part in gl.static_range(2 * TURNS):
                fetch(
                    a_desc,
                    [first + part * 64, block * 128],
                    ready.index(stage),
                    a_tiles.index(stage * 2 * TURNS + part),
                )
            fetch(b_desc, [expert * N + tile_n * 128, block * 128], ready.index(stage), b_tiles.index(stage))
            step += 1


@gluon.jit
def _here(x):
    """``x``, computed before what comes next: else the compiler adds both turns' sums last, and keeps them until then."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _multiply_tiles(
    y_desc, y_ptr, a_scale_ptr, b_scale_ptr, table_ptr, a_tiles, b_tiles, y_tiles, ready, empty, a_scale_stride,
    b_scale_stride_e, b_scale_stride_n, b_scale_stride_k, M, N, tiles_m, tiles_n, blocks, GROUP: gl.constexpr,
    GROUPED: gl.constexpr, TURNS: gl.constexpr, STAGES: gl.constexpr, RASTER: gl.constexpr,
):  # fmt: skip
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    ROWS: gl.constexpr = gl.SliceLayout(1, SUMS)
    y_tile = y_tiles.index(GROUP)
    partial = gl.zeros([64, 128], gl.float32, layout=SUMS)
    step = 0
    for index in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = _tile(index, tiles_m, tiles_n, RASTER)
        expert, first, end = _rows(table_ptr, tile_m, M, 128 * TURNS, GROUPED)
        first += GROUP * TURNS * 64
        # rows beyond the last have the last one's scale; they are not written
        m = gl.minimum(first + gl.arange(0, 64, layout=ROWS), M - 1)
        m_next = gl.minimum(first + 64 + gl.arange(0, 64, layout=ROWS), M - 1)
        a_scales = a_scale_ptr
        b_scales = b_scale_ptr + expert.to(gl.int64) * b_scale_stride_e + tile_n.to(gl.int64) * b_scale_stride_n
        scale = gl.load(a_scales + m) * gl.load(b_scales)
        scale_next = scale
        if TURNS == 2:
            scale_next = gl.load(a_scales + m_next) * gl.load(b_scales)
        sums = gl.zeros([64, 128], gl.float32, layout=SUMS)
        sums_next = sums
        for block in range(blocks):
            stage = step % STAGES
            b_tile = b_tiles.index(stage).permute((1, 0))
            part = stage * 2 * TURNS + GROUP * TURNS
            mbarrier.wait(ready.index(stage), step // STAGES & 1)
            # a sum of its own for every block: it begins at zero, and ends in float32. Both turns' in the same registers
            partial = warpgroup_mma(a_tiles.index(part), b_tile, partial, use_acc=False, is_async=True)
            # those of the next block, on their way while tensor cores work; the last are read twice
            more = gl.where(block + 1 < blocks, 1, 0)
            a_scales += more.to(gl.int64) * a_scale_stride
            b_scales += more.to(gl.int64) * b_scale_stride_k
            a_scale, a_scale_next, b_scale = gl.load(a_scales + m), gl.load(a_scales + m_next), gl.load(b_scales)
            partial = warpgroup_mma_wait(0, deps=[partial])
            if TURNS == 1:
                mbarrier.arrive(empty.index(stage), count=1)
            sums += partial * scale[:, None]
            scale = a_scale * b_scale
            if TURNS == 2:
                sums = _here(sums)
                partial = warpgroup_mma(a_tiles.index(part + 1), b_tile, partial, use_acc=False, is_async=True)
                partial = warpgroup_mma_wait(0, deps=[partial])
                mbarrier.arrive(empty.index(stage), count=1)
                sums_next += partial * scale_next[:, None]
                scale_next = a_scale_next * b_scale
            step += 1
        for turn in gl.static_range(TURNS):
            row = first + turn * 64
            y = (sums if turn == 0 else sums_next).to(y_desc.dtype)
            # rows past M are cut off, but not those of the next group
            whole = True
            if GROUPED:
                whole = row + 64 <= end
            if whole:
                # until the write before has read its tile
                tma.store_wait(0)
                y_tile.store(y)
                fence_async_shared()
                write(y_desc, [row, tile_n * 128], y_tile)
            elif row < end:
                m = row + gl.arange(0, 64, layout=ROWS)
                n = tile_n * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, SUMS))
                rows = y_ptr + m.to(gl.int64) * N
                gl.store(rows[:, None] + n[None, :], y, mask=(m < end)[:, None] & (n < N)[None, :])
    tma.store_wait(0)


@gluon.jit
def _fp8_matmul_gluon_kernel(
    a_desc, b_desc, y_desc, y_ptr, a_scale_ptr, b_scale_ptr, table_ptr, a_scale_stride, b_scale_stride_e,
    b_scale_stride_n, b_scale_stride_k, M, N, K, GROUPED: gl.constexpr, TURNS: gl.constexpr, STAGES: gl.constexpr,
    RASTER: gl.constexpr,
):  # fmt: skip
    a_tiles = gl.allocate_shared_memory(a_desc.dtype, [STAGES * 2 * TURNS, 64, 128], a_desc.layout)
    b_tiles = gl.allocate_shared_memory(b_desc.dtype, [STAGES, 128, 128], b_desc.layout)
    y_tiles = gl.allocate_shared_memory(y_desc.dtype, [2, 64, 128], y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    tiles_n, blocks = gl.cdiv(N, 128), gl.cdiv(K, 128)
    # there it is known only on the device
    tiles_m = gl.load(table_ptr) if GROUPED else gl.cdiv(M, 128 * TURNS)
    gl.warp_specialize(
        [
            (
                _multiply_tiles,
                (
                    y_desc, y_ptr, a_scale_ptr, b_scale_ptr, table_ptr, a_tiles, b_tiles, y_tiles, ready, empty,
                    a_scale_stride, b_scale_stride_e, b_scale_stride_n, b_scale_stride_k, M, N, tiles_m, tiles_n, blocks,
                    0, GROUPED, TURNS, STAGES, RASTER,
                ),
            ),
            (
                _multiply_tiles,
                (
                    y_desc, y_ptr, a_scale_ptr, b_scale_ptr, table_ptr, a_tiles, b_tiles, y_tiles, ready, empty,
                    a_scale_stride, b_scale_stride_e, b_scale_stride_n, b_scale_stride_k, M, N, tiles_m, tiles_n, blocks,
                    1, GROUPED, TURNS, STAGES, RASTER,
                ),
            ),
            (
                _fetch_tiles,
                (
                    a_desc, b_desc, table_ptr, a_tiles, b_tiles, ready, empty, M, N, tiles_m, tiles_n, blocks, GROUPED,
                    TURNS, STAGES, RASTER,
                ),
            ),
        ],
        # warps and registers of the second and third; the first gets what the others leave of MAX_REGISTERS each: 240
        [4, 1],
        [240, 24],
    )  # fmt: skip


MAX_REGISTERS = 168
"""A thread's share of 65536, of twelve warps: the one that fetches counts as four."""


def launch(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``a [M, K] @ b [N, K].T`` with float32 scales of 1x128 and 128x128. Arguments of ``fp8_matmul``."""
    M, N = a.shape[0], b.shape[0]
    y = torch.empty((M, N), dtype=dtype, device=a.device)
    if y.numel() == 0:
        return y
    a, b = k_major(a), k_major(b)
    K = a.shape[1]
    if K == 0:
        return y.zero_()
    processors = processors_of(a.device)
    turns = turns_of(M, N, processors)
    tiles = triton.cdiv(M, 128 * turns) * triton.cdiv(N, 128)
    launch_tiles(a, a_scale, b[None], b_scale[None], y, None, turns=turns, programs=min(tiles, processors))
    return y


def launch_tiles(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    y: Tensor,
    table: Tensor | None,
    *,
    turns: int,
    programs: int,
) -> None:
    """Fill ``y [M, N]`` from ``a [M, K]`` and ``b [E, N, K]``, contiguous, by the tiles of the table, or all of them."""
    (M, K), N = a.shape, b.shape[1]
    if a_scale.stride(0) != 1:
        # rows side by side, as quantize writes them: 32 bits then do for their offsets
        a_scale = a_scale.t().contiguous().t()
    # as many as 227 KiB hold, beside the two tiles of 64 x 128 that are written
    stages = 6 if turns == 1 else 4
    if y.dtype == torch.float32:
        stages = stages * 3 // 4
    _fp8_matmul_gluon_kernel[(programs,)](
        _descriptor(a, 64),
        _descriptor(b.flatten(0, 1), 128),
        _descriptor(y, 64),
        y,
        a_scale,
        b_scale,
        y if table is None else table,
        a_scale.stride(1),
        *b_scale.stride(),
        M,
        N,
        K,
        GROUPED=table is not None,
        TURNS=turns,
        STAGES=stages,
        RASTER=8,
        num_warps=4,
        maxnreg=MAX_REGISTERS,
    )


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    block = [rows, 128]
    kinds = {torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
    return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, kinds[x.dtype]))


def processors_of(device: torch.device) -> int:
    """How many programs run at a time; without a GPU, those of an H100 and an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def turns_of(M: int, N: int, processors: int) -> int:
    """Tiles 256 rows high where the processors are then done no later than with 128, which read b twice as often."""
    columns = triton.cdiv(N, 128)
    rounds = {turns: triton.cdiv(triton.cdiv(M, 128 * turns) * columns, processors) * turns for turns in (1, 2)}
    return 2 if rounds[2] <= rounds[1] else 1
