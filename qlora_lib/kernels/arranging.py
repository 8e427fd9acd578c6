"""Laying x out beforehand, in the order in which a matmul kernel reads it.

The matmuls relabel the columns of W so that a thread multiplies what it has loaded: of
each chunk of 128 columns, thread i of four has the columns 32 i to 32 i + 31, as four
words of eight codes. The same columns of x then lie apart in memory. Moving them
together costs one pass over x, and saves each program from collecting them again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qlora_lib.kernels.device import on_device_of
from qlora_lib.kernels.tiles import CHUNK


def arrange(rows: Tensor, tile: int, for_a_warp: bool) -> Tensor:
    """Cut x into tiles of rows and chunks of columns, and put each in order.

    Args:
        rows: float16 or bfloat16 ``[m, k]``, k a multiple of 128.
        tile: Rows of a tile, a power of two; missing rows are zeros.
        for_a_warp: For a warp that reads eight rows by itself: eight rows, word, row,
            thread, 8 columns, so that its 32 threads read 512 consecutive bytes. Else
            for the tensor cores, which read a tile from shared memory: half of a word,
            row, word, pair, thread, 2 columns.

    Returns:
        ``[ceil(m / tile), k / 128, tile * 128]`` of the type of ``rows``.
    """
    m, k = rows.shape
    chunks, tiles = k // int(CHUNK), triton.cdiv(m, tile)
    arranged = rows.new_empty(tiles, chunks, tile * int(CHUNK))
    with on_device_of(rows):
        arrange_kernel[(chunks, tiles)](
            rows,
            arranged,
            m,
            k,
            rows.stride(0),
            rows.stride(1),
            ROWS=tile,
            FOR_A_WARP=for_a_warp,
            # Few warps, so that a thread reads many bytes at once.
            num_warps=max(1 if for_a_warp else 4, tile // 16),
        )
    return arranged


@triton.jit
def arrange_kernel(
    rows,
    arranged,
    m,
    k,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    FOR_A_WARP: tl.constexpr,
):
    """Write one chunk of one tile."""
    chunk = tl.program_id(0)
    tile = tl.program_id(1)
    index = tl.arange(0, ROWS * CHUNK)
    if FOR_A_WARP:
        row = index // 1024 * 8 + index // 32 % 8
        word = index // 256 % 4
        thread = index // 8 % 4
        place = index % 8
    else:
        row = index // 64 % ROWS
        word = index // 16 % 4
        thread = index // 2 % 4
        place = index // (64 * ROWS) * 4 + index // 8 % 2 * 2 + index % 2
    row = (tile * ROWS + row).to(tl.int64)
    column = (chunk * CHUNK + thread * 32 + word * 8 + place).to(tl.int64)
    source = row * row_stride + column * column_stride
    x = tl.load(rows + source, mask=row < m, other=0.0)
    first = (tile * (k // CHUNK) + chunk).to(tl.int64) * (ROWS * CHUNK)
    tl.store(arranged + first + index, x)
