"""The gradient of a 4-bit matmul to its input, without a dense copy of the weight.

Here the sum runs over the rows of W, while codes are packed and scaled along its
columns. So the decoded tile goes through shared memory, as tiles of a matmul usually
do, and the kernel needs no other order of the numbers than their own: unpack, look up,
scale, multiply and add.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_lib.kernels.adding import add_slices
from qlora_lib.kernels.decoding import load_scales
from qlora_lib.kernels.device import on_device_of
from qlora_lib.kernels.lookup import fill_tables, look_up_words
from qlora_lib.kernels.storage import Storage
from qlora_lib.kernels.tiles import CHUNK, add_product, has_tables

MAX_ROWS = 64
# Rows of W of one step.
STEP = tl.constexpr(64)
WARPS = 4
# Steps that loads are ahead of their use, by rows of dY: such that Triton asks for more
# than 48 KiB of shared memory. Below, it leaves the limit there, and the tables of
# lookup.py, of which it does not know, would exceed it.
STAGES = {16: 6, 32: 5, 64: 3}
# Only what is read in pieces of at least 4 bytes is loaded ahead. So dY begins at a
# multiple of so many bytes and has rows of a multiple of so many numbers, from which
# Triton concludes that it may read 16 bytes at once.
ALIGNMENT = 16
# A single step is no loop: nothing is loaded ahead, and shared memory is as small.
MIN_STEPS = 2
# Programs beside one another that share the rows of W, so that few columns fill the
# GPU.
SLICES = 8


def matmul_gradient(grad_rows: Tensor, storage: Storage, k: int) -> Tensor:
    """``dX = dY W`` for a few rows.

    ``dx[i, k] = sum_j dy[i, j] * round(values[code j k] * scale j k)``, with the weight
    rounded as in :func:`~.matmul_few_rows.matmul_few_rows` and sums in float32 (paper,
    section 3: the gradient passes through the dequantized weight).

    Args:
        grad_rows: float16 or bfloat16 ``[m, n]``, m up to ``MAX_ROWS``.
        storage: The weight ``[n, k]``, quantized to at most 16 values in blocks of 32,
            64, 128 or 256.
        k: How many columns the weight has, a multiple of 128 and of the block size.

    Returns:
        ``[m, k]`` of the type of ``grad_rows``.
    """
    m, n = grad_rows.shape
    grad_rows = _align(grad_rows)
    slices = min(SLICES, triton.cdiv(n, MIN_STEPS * int(STEP)))
    sums = grad_rows.new_empty(slices, m, k, dtype=torch.float32)
    padded = max(16, triton.next_power_of_2(m))
    with on_device_of(grad_rows):
        gradient_kernel[(k // int(CHUNK), slices)](
            grad_rows,
            *storage.in_words(),
            sums,
            m,
            n,
            grad_rows.shape[1],
            k // 8,
            ROWS=padded,
            STEPS=max(MIN_STEPS, triton.cdiv(n, slices * int(STEP))),
            BLOCK_SIZE=storage.block_size,
            NESTED=storage.nested_scales is not None,
            SHARED=has_tables(grad_rows.device),
            num_warps=WARPS,
            num_stages=STAGES[padded],
        )
    return add_slices(sums, None, grad_rows.dtype)


def _align(rows: Tensor) -> Tensor:
    """The same numbers in contiguous rows, filled up with zeros where need be."""
    m, n = rows.shape
    is_aligned = n % ALIGNMENT == 0 and rows.data_ptr() % ALIGNMENT == 0
    if is_aligned and rows.is_contiguous():
        return rows
    aligned = rows.new_zeros(m, triton.cdiv(n, ALIGNMENT) * ALIGNMENT)
    aligned[:, :n] = rows
    return aligned


@triton.jit
def gradient_kernel(
    grad_rows,
    words,
    scales,
    nested_scales,
    offset,
    values,
    scale_values,
    sums,
    m,
    n,
    width,  # of dY: n, and the zeros behind
    words_per_row,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Add up a slice of the rows of W for ``CHUNK`` columns."""
    WORDS: tl.constexpr = CHUNK // 8
    dtype = grad_rows.dtype.element_ty
    tables = fill_tables(values, scale_values, dtype, False, SHARED)
    chunk = tl.program_id(0)
    first = tl.program_id(1) * STEPS * STEP
    k = words_per_row * 8
    x_row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, CHUNK), tl.float32)
    for step in range(STEPS):
        w_row = first + step * STEP + tl.arange(0, STEP)
        w_row = tl.minimum(w_row, n - 1).to(tl.int64)[:, None]
        word = chunk * WORDS + tl.arange(0, WORDS)[None, :]
        w = tl.load(words + w_row * words_per_row + word)
        # One scale for each 32 columns, four words.
        column = chunk * CHUNK + tl.arange(0, 4)[None, :] * 32
        block = (w_row * k + column) // BLOCK_SIZE
        s = load_scales(
            scales, nested_scales, offset, scale_values, block, block >= 0, NESTED
        )
        s = tl.reshape(tl.broadcast_to(s[:, :, None], (STEP, 4, 4)), (STEP, WORDS))
        c0, c1, c2, c3, c4, c5, c6, c7 = look_up_words(
            w, s, values, tables, dtype, SHARED
        )
        even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
        odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
        weight = tl.reshape(tl.join(even, odd), (STEP, CHUNK))
        y_column = first + step * STEP + tl.arange(0, STEP)[None, :]
        grad = tl.load(
            grad_rows + x_row.to(tl.int64) * width + y_column,
            mask=(x_row < m) & (y_column < width),
            other=0.0,
        )
        total = add_product(grad, weight, total)
    x_column = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
    row = tl.program_id(1).to(tl.int64) * m + x_row
    tl.store(sums + row * k + x_column, total, mask=x_row < m)
