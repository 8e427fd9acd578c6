"""Quantize on a GPU: the scales and the packed codes in one pass over the numbers.

A codebook of up to 16 values has up to 15 boundaries. Comparing a number with each of
them takes more instructions than the memory leaves time for, so the interval [-1, 1] is
cut into buckets narrow enough to hold one boundary at most: a first table says which
boundary a bucket holds, a second how many boundaries lower buckets hold, and one
comparison remains.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_lib.kernels.device import on_device_of
from qlora_lib.numerics import Codebook, blockwise

# Numbers that one program quantizes: a power of two, at least the largest block size.
# With its warps, 32 numbers a thread: more of them run out of registers.
NUMBERS_PER_PROGRAM = 4096
WARPS = 4
# Pieces of a block that one thread treats, of 16 bytes each in a 16-bit type: more of
# them share a reciprocal, fewer read longer runs of memory at once.
PIECES = 2

SMALLEST_NORMAL = tl.constexpr(blockwise.SMALLEST_NORMAL)
# Codes that fill one int32 word of the output.
CODES_PER_WORD = tl.constexpr(8)


def quantize_blocks(
    numbers: Tensor, codebook: Codebook, block_size: int
) -> tuple[Tensor, Tensor]:
    """Quantize numbers block by block, as :func:`qlora_lib.numerics.quantize` does.

    ``scales[b] = max(|numbers[b * block_size : (b + 1) * block_size]|)``, or 0 where
    that is below ``2**-126``, and

    ``codes[i] = nearest(numbers[i] * (1 / scales[i // block_size]))``,

    in float32, with the reciprocal and the product each rounded to nearest (paper,
    equations 1 and 2). Both results have the bits of the reference.

    Args:
        numbers: float16, bfloat16 or float32 ``[count]`` on a GPU.
        codebook: Of 4 bits, that is of 9 to 16 values.
        block_size: 32, 64, 128 or 256.

    Returns:
        uint8 ``[ceil(count / 2)]``, two codes a byte, the first in the high half; an
        odd count is filled up with the code of zero. And float32
        ``[ceil(count / block_size)]``, the scales: those of blocks that hold NaN or
        infinity are not finite, and the codes of such blocks mean nothing.
    """
    count = numbers.numel()
    # Whole words, of which the last may hold more codes than there are.
    words = numbers.new_empty(triton.cdiv(count, 8), dtype=torch.int32)
    scales = numbers.new_empty(triton.cdiv(count, block_size), dtype=torch.float32)
    if count:
        buckets = buckets_of(codebook, numbers.device)
        with on_device_of(numbers):
            quantize_kernel[(triton.cdiv(count, NUMBERS_PER_PROGRAM),)](
                numbers.contiguous(),
                words,
                scales,
                buckets.tables,
                count,
                words.numel(),
                BLOCK_SIZE=block_size,
                BLOCKS=NUMBERS_PER_PROGRAM // block_size,
                RUN=run_length(block_size),
                BUCKETS=buckets.number,
                num_warps=WARPS,
                # A product and a sum fused into one rounding would change codes.
                enable_fp_fusion=False,
            )
    return words.view(torch.uint8)[: triton.cdiv(count, 2)], scales


def run_length(block_size: int) -> int:
    """Numbers of a block that lie side by side in one load of a warp, at least 16."""
    return max(16, block_size // PIECES)


class Buckets(NamedTuple):
    """Where the boundaries of a codebook lie among the buckets of [-1, 1].

    Attributes:
        number: How many buckets [-1, 1] has, a power of two; 0 if no number of them up
            to ``MAX_BUCKETS`` separates the boundaries.
        tables: int32 ``[2, 2 * number]``: for each bucket the bits of the boundary that
            it holds, or of infinity; and how many boundaries lower buckets hold. With
            no buckets ``[15]``, the bits of all boundaries, filled up with infinity.
    """

    number: int
    tables: Tensor


MIN_BUCKETS = 32
MAX_BUCKETS = 1024


@functools.cache
def buckets_of(codebook: Codebook, device: torch.device) -> Buckets:
    """Cut [-1, 1] into the fewest buckets with at most one boundary each.

    A number is above exactly the boundaries of lower buckets, and perhaps above that of
    its own bucket, because :func:`bucket_of` never decreases: a boundary in a lower
    bucket is below the number, one in a higher bucket is above it. No bucket edge
    enters the argument, so rounding in :func:`bucket_of` cannot make it wrong.
    """
    boundaries = codebook.boundaries
    if codebook.ties == "upper":
        # x >= b for the next float below b in place of b is x > b.
        boundaries = boundaries.nextafter(torch.full_like(boundaries, -math.inf))
    # The kernel compares by the sign of a difference, for which -0 is below 0.
    boundaries = boundaries.masked_fill(boundaries == 0, 0.0)
    count = MIN_BUCKETS
    while count <= MAX_BUCKETS:
        holders = bucket_of(boundaries, count)
        if len(holders.unique()) == len(holders):
            held = boundaries.new_full((2 * count,), math.inf)
            held[holders] = boundaries
            every = torch.arange(2 * count, device="cpu")
            lower = (holders < every[:, None]).sum(1, dtype=torch.int32)
            return Buckets(
                count, torch.stack([held.view(torch.int32), lower]).to(device)
            )
        count *= 2
    padding = boundaries.new_full((15 - len(boundaries),), math.inf)
    return Buckets(0, torch.cat([boundaries, padding]).view(torch.int32).to(device))


def bucket_of(normalized: Tensor, count: int) -> Tensor:
    """The bucket of each number in [-1, 1], as the kernel computes it.

    Adding ``1.5 * 2**22 / count + 1`` rounds the number to a quarter of a bucket and
    leaves the number of quarters from -1 in the lowest bits of the sum.

    Returns:
        int64, ``0 .. count``: 1 itself lies in a bucket of its own.
    """
    shifted = normalized + (1.5 * 2**22 / count + 1)
    return (shifted.view(torch.int32) & (8 * count - 4)).long() >> 2


@triton.jit
def quantize_kernel(
    numbers,
    words,
    scales,
    tables,
    count,
    word_count,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    RUN: tl.constexpr,
    BUCKETS: tl.constexpr,
):
    """One pass over ``BLOCKS`` blocks, each read as runs of ``RUN`` numbers."""
    COUNT: tl.constexpr = BLOCKS * BLOCK_SIZE
    RUNS: tl.constexpr = BLOCK_SIZE // RUN
    start = tl.program_id(0).to(tl.int64) * COUNT
    remaining = tl.minimum(count - start, COUNT).to(tl.int32)

    # The first run of every block, then the second of every block, and so on: a thread
    # gets its share of each, all from one block, and the lookups treat one flat line.
    place = tl.arange(0, COUNT)
    run = place // (BLOCKS * RUN)
    index = place // RUN % BLOCKS * BLOCK_SIZE + run * RUN + place % RUN
    x = tl.load(numbers + start + index, mask=index < remaining, other=0.0)
    blocks = tl.reshape(x.to(tl.float32), (RUNS, BLOCKS, RUN))
    absmax = tl.reduce(tl.reduce(tl.abs(blocks), 0, _maximum), 1, _maximum)
    is_zero = absmax < SMALLEST_NORMAL
    inverse = tl.div_rn(1.0, tl.where(is_zero, float("inf"), absmax))
    normalized = tl.reshape(blocks * inverse[None, :, None], (COUNT,))

    codes = _nearest_codes(normalized, tables, BUCKETS)
    packed = tl.reshape(_pack_words(codes), (RUNS, BLOCKS, RUN // CODES_PER_WORD))
    packed = tl.reshape(tl.permute(packed, (1, 0, 2)), (COUNT // CODES_PER_WORD,))

    program_words: tl.constexpr = COUNT // CODES_PER_WORD
    word_index = start // CODES_PER_WORD + tl.arange(0, program_words)
    tl.store(words + word_index, packed, mask=word_index < word_count)
    block_index = tl.arange(0, BLOCKS)
    tl.store(
        scales + start // BLOCK_SIZE + block_index,
        tl.where(is_zero, 0.0, absmax),
        mask=block_index * BLOCK_SIZE < remaining,
    )


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _nearest_codes(normalized, tables, BUCKETS: tl.constexpr):
    """int32 code of each number: how many boundaries it is above."""
    if BUCKETS == 0:
        codes = tl.zeros_like(normalized).to(tl.int32)
        for i in tl.static_range(15):
            boundary = tl.load(tables + i).to(tl.float32, bitcast=True)
            codes += (normalized > boundary).to(tl.int32)
    else:
        # As in bucket_of. The mask keeps even NaN within the tables.
        shifted = normalized + (1.5 * 2.0**22 / BUCKETS + 1.0)
        bucket = (shifted.to(tl.uint32, bitcast=True) & (8 * BUCKETS - 4)) >> 2
        bucket = bucket.to(tl.int32)
        # One lookup for both tables: the programs share them once, not twice.
        count: tl.constexpr = normalized.shape[0]
        places = tl.reshape(tl.join(bucket, bucket + 2 * BUCKETS), (2 * count,))
        entries = tl.load(tables + tl.arange(0, 4 * BUCKETS))
        found = tl.reshape(tl.gather(entries, places, 0), (count, 2))
        boundary, below = tl.split(found)
        # The sign of the difference is the comparison, in one instruction less.
        difference = boundary.to(tl.float32, bitcast=True) - normalized
        codes = below + (difference.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
    return codes


@triton.jit
def _pack_words(codes):
    """int32 codes ``[count]`` -> int32 words ``[count / 8]``, bytes in memory order."""
    count: tl.constexpr = codes.shape[0]
    first, second = tl.split(tl.reshape(codes, (count // 2, 2)))
    first, second = tl.split(tl.reshape(first * 16 + second, (count // 4, 2)))
    first, second = tl.split(tl.reshape(first + second * 2**8, (count // 8, 2)))
    return first + second * 2**16
