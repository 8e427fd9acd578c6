"""Multiply a few rows by a 4-bit matrix, as a model does when it writes text.

With few rows the time is that of reading the weights, so everything else has to hide
behind it. Four decisions make that possible:

- Tensor cores from the first row on: ``Y^T = W X^T``, weights on the left, and up to
  eight rows take as many of their instructions as one.
- Every warp has its own slice of K, multiplies it by itself and never waits for
  another; the sums of the slices are added once, at the end. For :func:`tl.dot` a warp
  is an entry of a batch.
- A thread loads 16 bytes, 32 codes, of one row of W. Where a code stands along K does
  not matter as long as the same number of x stands there too, so the tile is relabeled:
  what a thread has loaded is what the tensor core wants from it, and nothing passes
  through shared memory.
- Codes are looked up in pairs (:mod:`qlora_lib.kernels.lookup`).

The slice of a warp is cut into chunks of 128 columns, one step of the loop, and chunks
are grouped into spans, for which the codes of the scales are loaded at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

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

# By rows of x, padded to a power of two; found on an H200, and such that the compiler
# spills nothing (experiments/results/kernel_tilings.json). For 16 rows, 32 outputs were
# up to a sixth faster with three of them on a multiprocessor, but spill there.
TILINGS = {
    8: (
        Tiling(16, 4, sharing=5, registers=96),
        Tiling(32, 4, sharing=3, registers=168),
        Tiling(16, 8, sharing=2, registers=96),
    ),
    16: (Tiling(16, 4, sharing=4),),
    32: (Tiling(16, 4, sharing=3),),
}
MAX_ROWS = max(TILINGS)
# From this many rows on it pays to lay x out beforehand.
ARRANGED_ROWS = 4


def matmul_few_rows(
    rows: Tensor, storage: Storage, n: int, bias: Tensor | None
) -> Tensor:
    """``y = x W^T + b`` for a few rows of x.

    ``y[i, j] = sum_k x[i, k] * round(values[code j k] * scale j k) + b[j]``

    The weight is rounded to the type of x as a dequantized one would be, but by way of
    a rounded scale; sums are float32 and rounded once.

    Args:
        rows: float16 or bfloat16 ``[m, k]``, m up to ``MAX_ROWS``, k a multiple of 128
            and of the block size.
        storage: The weight ``[n, k]``, quantized to at most 16 values in blocks of 32,
            64, 128 or 256.
        n: How many rows the weight has.
        bias: ``[n]`` or None.

    Returns:
        ``[m, n]`` of the type of ``rows``.
    """
    m, k = rows.shape
    padded = max(8, triton.next_power_of_2(m))
    tiling, _ = choose_tiling(TILINGS[padded], n, 1, rows.device)
    output = rows.new_empty(m, n)
    is_arranged = m >= ARRANGED_ROWS
    if is_arranged:
        rows = arrange(rows, padded, for_a_warp=True)
    elif rows.stride(1) != 1:
        rows = rows.contiguous()
    nested = storage.nested_scales is not None
    span = _chunks_of_a_span(k, storage.block_size) if nested else 1
    chunks = k // int(CHUNK)
    with on_device_of(rows):
        few_rows_kernel[(triton.cdiv(n, tiling.outputs),)](
            rows,
            *storage.in_words(),
            bias,
            output,
            m,
            n,
            k // 8,
            rows.stride(0),
            ROWS=padded,
            OUTPUTS=tiling.outputs,
            WARPS=tiling.warps,
            BLOCK_SIZE=storage.block_size,
            SPAN=span,
            SPANS=triton.cdiv(chunks, tiling.warps * span),
            NESTED=nested,
            ARRANGED=is_arranged,
            EVEN=chunks % (tiling.warps * span) == 0,
            SHARED=has_tables(rows.device),
            num_stages=1,
            num_warps=tiling.warps,
            maxnreg=tiling.registers,
        )
    return output


def _chunks_of_a_span(k: int, block_size: int) -> int:
    """For how many chunks the codes of the scales are loaded at once: 4, 2 or 1.

    They are whole blocks, and at most 8 bytes. A load begins at a multiple of its own
    width, so a row of W has to be a number of spans long.
    """
    for chunks in (4, 2):
        columns = chunks * int(CHUNK)
        codes, rest = divmod(columns, block_size)
        if codes <= 8 and rest == 0 and k % columns == 0:
            return chunks
    return 1


@triton.jit
def few_rows_kernel(
    rows,
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
    words_per_row,  # k / 8: that it is a multiple of 16 tells the compiler more than k
    row_stride,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
    NESTED: tl.constexpr,
    ARRANGED: tl.constexpr,
    EVEN: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Multiply ``OUTPUTS`` rows of W by all rows of x."""
    # Axes of the tile of W: 8 rows (one for each quarter of a warp), warps, groups of 8
    # rows, and 16 words of 8 codes (four for each thread of the quarter). Of x: 8 rows,
    # warps, groups of 8 rows, 4 words of a thread, 32 columns (8 for each thread).
    GROUPS: tl.constexpr = OUTPUTS // 8
    ROW_GROUPS: tl.constexpr = ROWS // 8
    dtype = rows.dtype.element_ty
    first_output = tl.program_id(0) * OUTPUTS
    k = words_per_row * 8
    chunks = k // CHUNK
    first_chunk = tl.arange(0, WARPS) * (SPANS * SPAN)

    w_row = tl.arange(0, GROUPS)[None, None, :, None] * 8
    w_row = first_output + w_row + tl.arange(0, 8)[:, None, None, None]
    w_row = tl.minimum(w_row, n - 1).to(tl.int64)
    w_first = first_chunk[None, :, None, None]
    w_pointers = words + w_row * words_per_row + w_first * (CHUNK // 8)
    w_pointers += tl.arange(0, 16)[None, None, None, :]
    w_left = chunks - w_first

    x_first = w_first[:, :, :, :, None]
    x_left = chunks - x_first
    x_group = tl.arange(0, ROW_GROUPS)[None, None, :, None, None]
    x_word = tl.arange(0, 4)[None, None, None, :, None]
    x_lane = tl.arange(0, 32)[None, None, None, None, :]
    x_row = tl.arange(0, 8)[:, None, None, None, None]
    X_STEP: tl.constexpr = ROWS * CHUNK if ARRANGED else CHUNK
    if ARRANGED:
        x_pointers = rows + x_first * X_STEP + x_group * 1024
        x_pointers += x_word * 256 + x_row * 32 + x_lane
        x_exists = x_row + x_group * 8 < m
    else:
        x_row += x_group * 8
        x_pointers = rows + x_row.to(tl.int64) * row_stride + x_first * CHUNK
        x_pointers += x_lane // 8 * 32 + x_word * 8 + x_lane % 8
        x_exists = x_row < m

    # Scales have the threads of a quarter as their first axis: all four load the same
    # codes, and take those of their own 32 columns.
    thread = tl.arange(0, 4)[:, None, None, None]
    s_row = tl.arange(0, GROUPS)[None, None, None, :] * 8
    s_row = first_output + s_row + tl.arange(0, 8)[None, :, None, None]
    s_row = tl.minimum(s_row, n - 1).to(tl.int64)
    s_first = first_chunk[None, None, :, None]
    s_left = chunks - s_first
    block = s_row * (k // BLOCK_SIZE) + s_first * CHUNK // BLOCK_SIZE

    # Weights are on their way two chunks ahead.
    w = _load_words(w_pointers, 0, w_left, SPANS * SPAN, EVEN)
    w_next = _load_words(w_pointers, 1, w_left, SPANS * SPAN, EVEN)
    if NESTED:
        mean = tl.load(offset)
        codes = _load_codes(scales, block + thread * 0, s_left > 0, BLOCK_SIZE, SPAN)
        nested_pointers = nested_scales + block // SCALE_BLOCK_SIZE
        nested = load_tile(nested_pointers, s_left > 0, False, False)
    tables = fill_tables(values, scale_values, dtype, NESTED, SHARED)

    sums = tl.zeros((WARPS, OUTPUTS, ROWS), tl.float32)
    for span in range(SPANS):
        if NESTED:
            next_block = block + (span + 1) * (SPAN * CHUNK // BLOCK_SIZE)
            exists = (s_left > (span + 1) * SPAN) & (span + 1 < SPANS)
            codes_next = _load_codes(
                scales, next_block + thread * 0, exists, BLOCK_SIZE, SPAN
            )
            nested_pointers = nested_scales + next_block // SCALE_BLOCK_SIZE
            nested_next = load_tile(nested_pointers, exists, False, False)
        for step in tl.static_range(SPAN):
            chunk = span * SPAN + step
            w_later = _load_words(w_pointers, chunk + 2, w_left, SPANS * SPAN, EVEN)
            exists = x_exists if EVEN else x_exists & (chunk < x_left)
            x = load_tile(x_pointers + chunk * X_STEP, exists, True, False)
            place = (step * CHUNK + thread * 32) // BLOCK_SIZE
            if NESTED:
                code = ((codes >> (place * 8)) & 255).to(tl.int32)
                s = look_up_scales(code, scale_values, tables, SHARED) * nested + mean
            else:
                # A block may be longer than a chunk and begin in the one before.
                s_place = (s_first + chunk) * CHUNK + thread * 32
                s_place = s_row * (k // BLOCK_SIZE) + s_place // BLOCK_SIZE
                s = load_tile(scales + s_place, chunk < s_left, False, False)
            s = spread_scales(s)
            c0, c1, c2, c3, c4, c5, c6, c7 = look_up_words(
                w, s, values, tables, dtype, SHARED
            )
            x_low, x_high = _right_operands(x, WARPS, ROWS)
            sums = add_product(_left_operand(c0, c1, c2, c3), x_low, sums)
            sums = add_product(_left_operand(c4, c5, c6, c7), x_high, sums)
            w = w_next
            w_next = w_later
        if NESTED:
            codes = codes_next
            nested = nested_next

    y = tl.sum(sums, 0)
    y_column = first_output + tl.arange(0, OUTPUTS)[:, None]
    y_row = tl.arange(0, ROWS)[None, :]
    if bias is not None:
        y += tl.load(bias + y_column, mask=y_column < n, other=0.0).to(tl.float32)
    tl.store(
        output + y_row.to(tl.int64) * n + y_column,
        round_to(y, dtype),
        mask=(y_row < m) & (y_column < n),
    )


@triton.jit
def _load_words(pointers, chunk, left, limit, EVEN: tl.constexpr):
    """The words of a chunk; zeros behind the end of the warp's slice."""
    exists = (chunk < limit) & (left >= 0)
    if not EVEN:
        exists = exists & (chunk < left)
    # They are read once: x is worth more room in the cache.
    return load_tile(pointers + chunk * (CHUNK // 8), exists, True, True)


@triton.jit
def _load_codes(scales, block, exists, BLOCK_SIZE: tl.constexpr, SPAN: tl.constexpr):
    """The codes of a span's scales in one integer, the first in the lowest byte."""
    BYTES: tl.constexpr = SPAN * CHUNK // BLOCK_SIZE
    if BYTES == 8:
        pointers = (scales + block).to(tl.pointer_type(tl.int64))
    elif BYTES == 4:
        pointers = (scales + block).to(tl.pointer_type(tl.int32))
    elif BYTES == 2:
        pointers = (scales + block).to(tl.pointer_type(tl.int16))
    else:
        pointers = scales + block
    return load_tile(pointers, exists, False, False)


@triton.jit
def _left_operand(c0, c1, c2, c3):
    """Four codes of each word -> ``[WARPS, OUTPUTS, 64]``.

    Of 32 columns a tensor core takes from each thread two pairs of neighbors of the
    first 16 and two of the others, and multiplies one of each at once. Labeled with two
    words, the pair in a word, the thread, which of the words and the place in the pair,
    that are the codes that the thread has; and the two pairs that are multiplied at
    once are neighbors in x, which spares it from being moved.
    """
    WARPS: tl.constexpr = c0.shape[1]
    GROUPS: tl.constexpr = c0.shape[2]
    codes = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    # row, ..., thread, two words, word, pair, place
    codes = tl.reshape(codes, (8, WARPS, GROUPS, 4, 2, 2, 2, 2))
    codes = tl.permute(codes, (1, 2, 0, 4, 6, 3, 5, 7))
    return tl.reshape(codes, (WARPS, GROUPS * 8, 64))


@triton.jit
def _right_operands(x, WARPS: tl.constexpr, ROWS: tl.constexpr):
    """The same order for x: ``[WARPS, 64, ROWS]`` for each half of a word."""
    # row, ..., two words, word, thread, half, pair, place
    x = tl.reshape(x, (8, WARPS, ROWS // 8, 2, 2, 4, 2, 2, 2))
    x = tl.permute(x, (1, 3, 7, 5, 4, 8, 2, 0, 6))
    low, high = tl.split(x)
    return tl.reshape(low, (WARPS, 64, ROWS)), tl.reshape(high, (WARPS, 64, ROWS))
