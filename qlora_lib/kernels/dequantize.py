"""Dequantize on a GPU: codes and scales are decoded in one pass over the memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_lib.kernels.decoding import load_scales, round_to
from qlora_lib.kernels.device import on_device_of
from qlora_lib.kernels.storage import Storage

# Numbers that one program writes: a power of two, at least the largest block size.
NUMBERS_PER_PROGRAM = 4096
WARPS = 4
# Numbers whose codes fill 16 bytes, the most that a thread loads at once. They lie in
# one block, since block sizes are multiples of this.
RUN = tl.constexpr(32)


def dequantize_blocks(storage: Storage, count: int, dtype: torch.dtype) -> Tensor:
    """Return the numbers that the codes stand for.

    ``numbers[i] = values[codes[i]] * scale[i // block_size]``, multiplied in float32
    and rounded once, to ``dtype``. After double quantization ``scale[b] =
    scale_values[scales[b]] * nested_scales[b // 256] + offset`` (paper, section 3).
    The result has the bits of :meth:`qlora_lib.QuantizedTensor.dequantize`.

    Args:
        storage: The tensor, on a GPU, with a block size of 32, 64, 128 or 256.
        count: How many numbers there are.
        dtype: float16, bfloat16 or float32.

    Returns:
        ``dtype`` ``[count]``.
    """
    numbers = storage.packed.new_empty(count, dtype=dtype)
    if count:
        with on_device_of(numbers):
            dequantize_kernel[(triton.cdiv(count, NUMBERS_PER_PROGRAM),)](
                storage.packed,
                storage.scales,
                storage.nested_scales,
                storage.offset,
                storage.values,
                storage.scale_values,
                numbers,
                count,
                triton.cdiv(count, 2),
                BLOCK_SIZE=storage.block_size,
                RUNS=NUMBERS_PER_PROGRAM // int(RUN),
                NESTED=storage.nested_scales is not None,
                num_warps=WARPS,
                # The reference rounds product and sum of a nested scale separately.
                enable_fp_fusion=False,
            )
    return numbers


@triton.jit
def dequantize_kernel(
    packed,
    scales,
    nested_scales,
    offset,
    values,
    scale_values,
    numbers,
    count,
    byte_count,
    BLOCK_SIZE: tl.constexpr,
    RUNS: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Write the numbers of ``RUNS`` runs, each of which a thread reads in one load."""
    start = tl.program_id(0).to(tl.int64) * (RUNS * RUN)
    remaining = tl.minimum(count - start, RUNS * RUN).to(tl.int32)
    remaining_bytes = tl.minimum(byte_count - start // 2, RUNS * RUN // 2).to(tl.int32)

    run = tl.arange(0, RUNS)
    byte = run[:, None] * (RUN // 2) + tl.arange(0, RUN // 2)[None, :]
    pairs = tl.load(packed + start // 2 + byte, mask=byte < remaining_bytes, other=0)
    pairs = pairs.to(tl.int32)
    scale = load_scales(
        scales,
        nested_scales,
        offset,
        scale_values,
        start // BLOCK_SIZE + run * RUN // BLOCK_SIZE,
        run * RUN < remaining,
        NESTED,
    )[:, None]
    first = tl.load(values + (pairs >> 4)) * scale
    second = tl.load(values + (pairs & 15)) * scale
    products = tl.reshape(tl.join(first, second), (RUNS, RUN))
    index = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    tl.store(
        numbers + start + index,
        round_to(products, numbers.dtype.element_ty),
        mask=index < remaining,
    )
