"""Adding up what several programs have summed, each over a slice of the columns.

A small product has too few tiles to keep a GPU busy. Then the programs of a tile share
its columns, and each writes its own sum. To add them afterwards, in an order that is
always the same, gives the same bits every time, which atomic additions would not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_lib.kernels.decoding import round_to
from qlora_lib.kernels.device import on_device_of

NUMBERS_PER_PROGRAM = 1024


def add_slices(sums: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``y[i, j] = sum_s sums[s, i, j] + bias[j]``, rounded once.

    Args:
        sums: float32 ``[slices, m, n]``, contiguous.
        bias: ``[n]`` or None.
        dtype: Type of the result, float16 or bfloat16.

    Returns:
        ``dtype`` ``[m, n]``.
    """
    slices, m, n = sums.shape
    output = sums.new_empty(m, n, dtype=dtype)
    with on_device_of(sums):
        add_kernel[(triton.cdiv(m * n, NUMBERS_PER_PROGRAM),)](
            sums,
            bias,
            output,
            m * n,
            n,
            SLICES=slices,
            NUMBERS=NUMBERS_PER_PROGRAM,
            num_warps=4,
        )
    return output


@triton.jit
def add_kernel(
    sums,
    bias,
    output,
    count,
    n,
    SLICES: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """Add ``NUMBERS`` numbers of each slice."""
    index = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    exists = index < count
    total = tl.load(sums + index, mask=exists, other=0.0)
    for number in tl.static_range(1, SLICES):
        # As 64 bits: all slices together may be longer than 2**31.
        slice_start = count.to(tl.int64) * number
        total += tl.load(sums + slice_start + index, mask=exists, other=0.0)
    if bias is not None:
        total += tl.load(bias + index % n, mask=exists, other=0.0).to(tl.float32)
    tl.store(output + index, round_to(total, output.dtype.element_ty), mask=exists)
