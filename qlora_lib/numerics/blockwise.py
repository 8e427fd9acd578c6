"""Block-wise quantization: one scale for each block, one code for each number.

The tensor is read row by row as one line of numbers and cut into blocks; the last block
may be shorter. Work goes piece by piece, so that temporary memory does not grow with
the tensor and indexes are Python integers, which do not overflow past 2**31 elements.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qlora_lib.numerics.codebooks import Codebook, lookup

# Numbers treated at a time: small enough for the cache, large enough for all threads.
PIECE = 2**20
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def absmax_scales(numbers: Tensor, block_size: int) -> Tensor:
    """The largest magnitude of each block.

    ``scales[b] = max(|numbers[b * block_size : (b + 1) * block_size]|)``, in float32.

    A block whose largest magnitude is subnormal in float32 (below ``2**-126``) gets the
    scale 0, so that it dequantizes to zeros: the reciprocal of such a scale can
    overflow, and processors differ in whether they keep subnormal numbers at all. The
    error is then the number itself, less than ``1.2e-38``.

    Args:
        numbers: float ``[count]`` of any width.
        block_size: How many consecutive numbers share a scale, at least 1.

    Returns:
        float32 ``[ceil(count / block_size)]``. A block that holds NaN or infinity, or a
        number beyond the range of float32, has a scale that is not finite.
    """
    count = numbers.numel()
    block_count = -(-count // block_size)
    scales = torch.zeros(block_count, dtype=torch.float32, device=numbers.device)
    for piece, blocks in pieces(count, block_size):
        rows = numbers[piece].float().view(blocks.stop - blocks.start, -1)
        # Two reductions instead of abs().amax(): no temporary of the size of the piece.
        absmax = torch.maximum(rows.amax(1), -rows.amin(1))
        scales[blocks] = torch.maximum(scales[blocks], absmax)
    return scales.masked_fill_(scales < SMALLEST_NORMAL, 0.0)


def quantize_blockwise(
    numbers: Tensor, scales: Tensor, codebook: Codebook, block_size: int
) -> Tensor:
    """The code of each number: the nearest value of the codebook after normalization.

    ``codes[i] = nearest(numbers[i] * (1 / scales[i // block_size]))``, in float32
    whatever the type of ``numbers``. In a block with scale 0 every number is taken for
    0.

    Args:
        numbers: float ``[count]``.
        scales: float32 ``[ceil(count / block_size)]``, finite.
        codebook: The values to choose from.
        block_size: How many consecutive numbers share a scale.

    Returns:
        uint8 ``[count]``.
    """
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    codes = torch.empty(numbers.numel(), dtype=torch.uint8, device=numbers.device)
    for piece, blocks in pieces(numbers.numel(), block_size):
        rows = numbers[piece].float().view(blocks.stop - blocks.start, -1)
        codes[piece] = codebook.nearest(rows * inverse[blocks, None]).view(-1)
    return codes


def dequantize_blockwise(
    codes: Tensor,
    scales: Tensor,
    values: Tensor,
    block_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The number that each code stands for.

    ``numbers[i] = values[codes[i]] * scales[i // block_size]``, multiplied in float32
    and then rounded to ``dtype``.

    Args:
        codes: uint8 ``[count]``.
        scales: float32 ``[ceil(count / block_size)]``.
        values: float32 ``[entries]``, the numbers that the codes stand for.
        block_size: How many consecutive codes share a scale.
        dtype: Type of the result.

    Returns:
        ``dtype`` ``[count]``.
    """
    numbers = torch.empty(codes.numel(), dtype=dtype, device=codes.device)
    for piece, blocks in pieces(codes.numel(), block_size):
        rows = lookup(values, codes[piece]).view(blocks.stop - blocks.start, -1)
        numbers[piece] = rows.mul_(scales[blocks, None]).view(-1)
    return numbers


def pieces(count: int, block_size: int) -> Iterator[tuple[slice, slice]]:
    """Cut ``count`` numbers into pieces of about ``PIECE``, with the blocks of each.

    A piece is either a number of whole blocks or lies within one block, so that it can
    be viewed as ``[blocks, numbers of each]``.
    """
    if block_size > PIECE:
        for block, start in enumerate(range(0, count, block_size)):
            end = min(start + block_size, count)
            for part in range(start, end, PIECE):
                yield slice(part, min(part + PIECE, end)), slice(block, block + 1)
        return
    whole = count - count % block_size
    step = PIECE - PIECE % block_size
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        yield slice(start, stop), slice(start // block_size, stop // block_size)
    if whole < count:
        last = whole // block_size
        yield slice(whole, count), slice(last, last + 1)
