"""Multiply some hundred rows by a 4-bit matrix without writing the matrix out.

With more rows the tensor cores have more to do, and the decoding has to go on beside
them. As in :mod:`qlora_lib.kernels.matmul_few_rows`, ``Y^T = W X^T``, codes are looked
up in pairs, and what a thread has loaded is its own part of the tensor core's left
operand. But here the warps share K: each has its own rows of W, and all of them read
the same tile of x, which waits in shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_lib.kernels.adding import add_slices
from qlora_lib.kernels.arranging import arrange
from qlora_lib.kernels.decoding import SCALE_BLOCK_SIZE, round_to
from qlora_lib.kernels.device import on_device_of
from qlora_lib.kernels.lookup import fill_tables, look_up_scales, look_up_words
from qlora_lib.kernels.storage import Storage
from qlora_lib.kernels.tiles import (
    CHUNK,
    Tiling,
    add_product,
    choose_tiling,
    has_tables,
    load_tile,
    spread_scales,
)

# By rows of x in a tile, found on an H200 (experiments/results/kernel_tilings.json).
# The narrow ones are for matrices too small to fill the GPU with the wide ones. Both
# share a number of stages; for 32 rows it is the one with which the narrow one runs.
TILINGS = {
    32: (Tiling(128, 4, sharing=2), Tiling(64, 4, sharing=2)),
    64: (Tiling(128, 4, sharing=2), Tiling(64, 4, sharing=2)),
    128: (Tiling(128, 8, sharing=1), Tiling(64, 4, sharing=1)),
}
# Steps that loads from memory are ahead of their use, by rows of x in a tile.
STAGES = {32: 5, 64: 3, 128: 3}
# Into how many slices columns may be cut, and how many chunks a slice has at least:
# fewer, and the loads that go ahead are no longer worth their beginning.
SLICES = (1, 2, 4)
LEAST_CHUNKS = 8
# To read x costs a program as much as so many rows of W: with 64 outputs in place of
# 128 the product by 28672 x 8192 weights took 1.20 and 1.23 times as long, with tiles
# of 64 and of 128 rows (the same record).
OVERHEAD = 40


def matmul_many_rows(
    rows: Tensor, storage: Storage, n: int, bias: Tensor | None
) -> Tensor:
    """``y = x W^T + b``, as :func:`~.matmul_few_rows.matmul_few_rows` has it."""
    m, k = rows.shape
    chunks = k // int(CHUNK)
    # With a single chunk nothing is loaded ahead, and Triton asks for so little shared
    # memory that it leaves the limit at 48 KiB: beside the tables of lookup.py, of
    # which it does not know, only the narrowest tile fits.
    widest = max(TILINGS) if chunks > 1 else min(TILINGS)
    tile = min(max(32, triton.next_power_of_2(m)), widest)
    tiles = triton.cdiv(m, tile)
    tiling, slices = choose_tiling(
        TILINGS[tile],
        n,
        tiles,
        rows.device,
        _possible_slices(chunks, storage.block_size),
        OVERHEAD,
    )
    if slices == 1:
        output = rows.new_empty(m, n)
    else:
        output = rows.new_empty(slices, m, n, dtype=torch.float32)
    arranged = arrange(rows, tile, for_a_warp=False)
    with on_device_of(rows):
        many_rows_kernel[(tiles, triton.cdiv(n, tiling.outputs), slices)](
            arranged,
            *storage.in_words(),
            bias if slices == 1 else None,
            output,
            m,
            n,
            k // 8,
            ROWS=tile,
            OUTPUTS=tiling.outputs,
            WARPS=tiling.warps,
            BLOCK_SIZE=storage.block_size,
            CHUNKS=chunks // slices,
            NESTED=storage.nested_scales is not None,
            SHARED=has_tables(rows.device),
            num_stages=STAGES[tile],
            num_warps=tiling.warps,
            maxnreg=tiling.registers,
        )
    return output if slices == 1 else add_slices(output, bias, rows.dtype)


def _possible_slices(chunks: int, block_size: int) -> tuple[int, ...]:
    """Those that are equal, not too short, and do not begin inside of a block."""

    def is_possible(cut: int) -> bool:
        length, rest = divmod(chunks, cut)
        is_whole = rest == 0 and length * int(CHUNK) % block_size == 0
        return is_whole and length >= LEAST_CHUNKS

    return tuple(cut for cut in SLICES if cut == 1 or is_possible(cut))


@triton.jit
def many_rows_kernel(
    arranged,
    words,
    scales,
    nested_scales,
    offset,
    values,
    scale_values,
    bias,
    output,
    m,
    n,
    words_per_row,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNKS: tl.constexpr,
    NESTED: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Multiply ``OUTPUTS`` rows of W by ``ROWS`` rows of x, in ``CHUNKS`` chunks."""
    GROUPS: tl.constexpr = OUTPUTS // (8 * WARPS)
    dtype = arranged.dtype.element_ty
    tables = fill_tables(values, scale_values, dtype, NESTED, SHARED)
    first_output = tl.program_id(1) * OUTPUTS
    k = words_per_row * 8
    chunks = k // CHUNK
    first_chunk = tl.program_id(2) * CHUNKS
    output += tl.program_id(2).to(tl.int64) * m * n

    # Row of W that a thread loads: group of 8 WARPS rows, warp, row of a quarter warp.
    w_row = tl.arange(0, GROUPS)[None, None, :, None] * (8 * WARPS)
    w_row += tl.arange(0, WARPS)[None, :, None, None] * 8
    w_row = first_output + w_row + tl.arange(0, 8)[:, None, None, None]
    w_row = tl.minimum(w_row, n - 1).to(tl.int64)
    w_pointers = words + w_row * words_per_row + tl.arange(0, 16)[None, None, None, :]
    w_pointers += first_chunk * (CHUNK // 8)

    thread = tl.arange(0, 4)[:, None, None, None]
    s_row = tl.arange(0, GROUPS)[None, None, None, :] * (8 * WARPS)
    s_row += tl.arange(0, WARPS)[None, None, :, None] * 8
    s_row = first_output + s_row + tl.arange(0, 8)[None, :, None, None]
    s_row = tl.minimum(s_row, n - 1).to(tl.int64) + thread * 0
    block = s_row * (k // BLOCK_SIZE) + first_chunk * CHUNK // BLOCK_SIZE
    if NESTED:
        mean = tl.load(offset)

    x_row = tl.arange(0, ROWS)[:, None]
    x_chunk = tl.program_id(0).to(tl.int64) * chunks + first_chunk
    x_pointers = arranged + x_chunk * (ROWS * CHUNK)
    x_pointers += x_row * 64 + tl.arange(0, 64)[None, :]

    # Codes of scales are on their way one chunk ahead.
    s_block = block + thread * 32 // BLOCK_SIZE
    s_next = load_tile(scales + s_block, None, False, False)
    if NESTED:
        nested_pointers = nested_scales + s_block // SCALE_BLOCK_SIZE
        nested_next = load_tile(nested_pointers, None, False, False)

    sums = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for chunk in range(CHUNKS):
        w_now = w_pointers + chunk * (CHUNK // 8)
        w = load_tile(w_now, None, True, True)
        x_low = tl.load(x_pointers + chunk * (ROWS * CHUNK))
        x_high = tl.load(x_pointers + chunk * (ROWS * CHUNK) + ROWS * 64)
        s = s_next
        s_block = tl.minimum(chunk + 1, CHUNKS - 1) * CHUNK + thread * 32
        s_block = block + s_block // BLOCK_SIZE
        s_next = load_tile(scales + s_block, None, False, False)
        if NESTED:
            s = look_up_scales(s.to(tl.int32), scale_values, tables, SHARED)
            s = s * nested_next + mean
            nested_pointers = nested_scales + s_block // SCALE_BLOCK_SIZE
            nested_next = load_tile(nested_pointers, None, False, False)
        s = spread_scales(s)
        c0, c1, c2, c3, c4, c5, c6, c7 = look_up_words(
            w, s, values, tables, dtype, SHARED
        )
        sums = add_product(_left_operand(c0, c1, c2, c3), x_low.T, sums)
        sums = add_product(_left_operand(c4, c5, c6, c7), x_high.T, sums)

    # The rows of W in the order of the left operand.
    y_column = tl.arange(0, OUTPUTS)
    y_column = tl.reshape(y_column, (GROUPS // 2, 2, WARPS, 8))
    y_column = tl.reshape(tl.permute(y_column, (0, 2, 1, 3)), (OUTPUTS,))
    y_column = first_output + y_column[:, None]
    y_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    if bias is not None:
        sums += tl.load(bias + y_column, mask=y_column < n, other=0.0).to(tl.float32)
    tl.store(
        output + y_row.to(tl.int64) * n + y_column,
        round_to(sums, output.dtype.element_ty),
        mask=(y_row < m) & (y_column < n),
    )


@triton.jit
def _left_operand(c0, c1, c2, c3):
    """Four codes of each word -> ``[OUTPUTS, 64]``.

    Of each 16 neighbors along K the tensor core takes two and two from each thread, and
    of each 16 rows it gives a quarter warp the rows i and 8 + i.
    """
    WARPS: tl.constexpr = c0.shape[1]
    GROUPS: tl.constexpr = c0.shape[2]
    codes = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    codes = tl.reshape(codes, (8, WARPS, GROUPS // 2, 2, 4, 4, 2, 2))
    codes = tl.permute(codes, (2, 1, 3, 0, 5, 6, 4, 7))
    return tl.reshape(codes, (GROUPS * WARPS * 8, 64))
