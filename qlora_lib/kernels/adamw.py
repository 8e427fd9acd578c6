"""AdamW on a GPU: one pass over parameters, gradients and pages of optimizer state.

A launch updates any number of pages, wherever they lie. Nothing in it depends on how
many there are: the same machine code treats a page alone or with others, so that what
is updated does not depend on how much of the state fits on the GPU.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora_lib.kernels.decoding import round_to
from qlora_lib.kernels.device import on_device_of
from qlora_lib.kernels.parameter_table import (
    PROGRAM,
    STATE_BLOCK_SIZE,
    STATE_CODEBOOKS,
    ParameterTable,
)
from qlora_lib.kernels.quantize import SMALLEST_NORMAL
from qlora_lib.numerics import Codebook

# With these, a thread updates 16 of a program's numbers.
WARPS = 4
BLOCK_SIZE = tl.constexpr(STATE_BLOCK_SIZE)
# Neighbors that a thread moves at once, be they state or parameters: 16 bytes of
# float32. With more of a narrower type, numbers would have to change threads.
RUN = tl.constexpr(4)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def update_pages(
    page_numbers: Tensor,
    page_addresses: Tensor,
    table: ParameterTable,
    dtype: torch.dtype,
    page_size: int,
    state_bits: int,
    aligned: bool,
) -> None:
    """Update the parameters and the state of some pages in place, in one launch.

    ::

        p = p - (1 - decay) p
        m = m + (1 - beta1) (g - m)
        v = beta2 v + (1 - beta2) g^2
        p = p - step_size * m / (sqrt(v) / root_correction + eps)

    in float32, each line's last multiplication and addition rounded once, division and
    square root rounded correctly; the parameter is rounded once to its own type.
    A parameter without a gradient is left as it is, and so is its state.

    Numbers of state lie in programs of ``PROGRAM``, and each parameter begins with a
    program of its own. A page holds both moments one after the other, with 8 bits first
    the codes of both and then their scales (signed and unsigned dynamic map, blocks of
    256). A second moment above zero is not rounded to zero. NaN in a gradient makes its
    number NaN, or with 8 bits the scale of its block.

    Args:
        page_numbers: int32 ``[pages]``, which of all pages to update.
        page_addresses: int64 ``[pages]``, where the bytes of each lie now, divisible by
            16.
        table: Of all pages.
        dtype: float32, bfloat16 or float16, of the parameters and their gradients.
        page_size: How many numbers of each moment a page holds, a multiple of
            ``PROGRAM``.
        state_bits: 32 or 8.
        aligned: Whether all addresses in the table are divisible by 16 and all counts
            by 8, so that numbers can be moved four at a time.
    """
    page_programs = page_size // PROGRAM
    device = page_addresses.device
    with on_device_of(page_addresses):
        adamw_kernel[(len(page_numbers) * page_programs,)](
            page_numbers,
            page_addresses,
            *table,
            None if state_bits == 32 else state_tables(device),
            len(table.counts),
            page_programs,
            NUMBERS=PROGRAM,
            DTYPE=TYPES[dtype],
            STATE_BITS=state_bits,
            ALIGNED=aligned,
            num_warps=WARPS,
            # Which sum shares its rounding with a product is written out.
            enable_fp_fusion=False,
        )


@functools.cache
def state_tables(device: torch.device) -> Tensor:
    """The values and the search trees of both codebooks: float32 ``[2, 2, 256]``."""
    tables = [
        torch.stack([codebook.values, search_tree(codebook)])
        for codebook in STATE_CODEBOOKS.values()
    ]
    return torch.stack(tables).to(device)


def search_tree(codebook: Codebook) -> Tensor:
    """The 255 boundaries of a codebook in the order of a binary search.

    The middle one stands at place 1, and from place ``i`` the search goes on at ``2 i``
    or ``2 i + 1``. What threads ask for in one step lies side by side, which is faster
    to read than what is spread over the sorted line.
    """
    tree = codebook.boundaries.new_zeros(256)
    for level in range(8):
        nodes, step = 2**level, 2 ** (8 - level)
        tree[nodes : 2 * nodes] = codebook.boundaries[step // 2 - 1 :: step]
    return tree


# Every argument at run time: launches are to run the same machine code, whatever the
# numbers are and however the tables lie in memory.
VARYING = range(10)


@triton.jit(do_not_specialize=VARYING)
def adamw_kernel(
    page_numbers,
    page_addresses,
    parameter_of,
    first_program,
    counts,
    addresses,
    factors,
    tables,
    parameter_count,
    page_programs,
    NUMBERS: tl.constexpr,
    DTYPE: tl.constexpr,
    STATE_BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update ``NUMBERS`` numbers of one parameter and of its moments."""
    page = tl.program_id(0) // page_programs
    place = tl.program_id(0) % page_programs
    program = tl.load(page_numbers + page) * page_programs + place
    parameter = tl.load(parameter_of + program)
    is_used = parameter >= 0
    gradient = tl.load(addresses + parameter_count + parameter, mask=is_used, other=0)
    if gradient != 0:
        start = (program - tl.load(first_program + parameter)) * NUMBERS
        remaining = tl.minimum(tl.load(counts + parameter) - start, NUMBERS)
        remaining = remaining.to(tl.int32)
        if ALIGNED:
            remaining = tl.multiple_of(remaining, RUN)
        index = tl.arange(0, NUMBERS // BLOCK_SIZE)[:, None] * BLOCK_SIZE
        index += tl.arange(0, BLOCK_SIZE)[None, :]
        exists = index < remaining

        p_at = _pointer(tl.load(addresses + parameter), start, DTYPE, ALIGNED) + index
        g_at = _pointer(gradient, start, DTYPE, ALIGNED) + index
        p = tl.load(p_at, mask=exists, other=0.0).to(tl.float32)
        g = tl.load(g_at, mask=exists, other=0.0).to(tl.float32)
        state = tl.load(page_addresses + page)
        size = page_programs.to(tl.int64) * NUMBERS
        first = place.to(tl.int64) * NUMBERS
        if STATE_BITS == 32:
            m_at = _pointer(state, first, tl.float32) + index
            v_at = _pointer(state, size + first, tl.float32) + index
            m, v = tl.load(m_at), tl.load(v_at)
        else:
            m_at = _pointer(state, first, tl.uint8) + index
            v_at = _pointer(state, size + first, tl.uint8) + index
            block = tl.arange(0, NUMBERS // BLOCK_SIZE)
            scales = state + 2 * size
            m_scale_at = _pointer(scales, first // BLOCK_SIZE, tl.float32) + block
            v_scale_at = _pointer(scales, (size + first) // BLOCK_SIZE, tl.float32)
            v_scale_at += block
            # What lies behind the last number must not reach the scale of a block.
            m = _dequantize(tl.load(m_at), tl.load(m_scale_at), exists, tables)
            v = _dequantize(tl.load(v_at), tl.load(v_scale_at), exists, tables + 512)

        p, m, v = _adamw(p, g, m, v, factors + parameter, parameter_count)

        tl.store(p_at, round_to(p, DTYPE), mask=exists)
        if STATE_BITS == 8:
            m, m_scale = _quantize(m, tables + 256)
            v, v_scale = _quantize(v, tables + 768)
            tl.store(m_scale_at, m_scale)
            tl.store(v_scale_at, v_scale)
        tl.store(m_at, m)
        tl.store(v_at, v)


@triton.jit
def _pointer(address, offset, DTYPE: tl.constexpr, ALIGNED: tl.constexpr = True):
    """Pointer to a number of an array; ALIGNED: to one of those that a RUN begins."""
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    pointer = (address + offset * SIZE).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, RUN * SIZE)
    return pointer


@triton.jit
def _adamw(p, g, m, v, factors, stride):
    """The new parameters and moments, in float32."""
    # 1 - decay is small: as a float32 it keeps digits that decay has no room for.
    shrinking = (1.0 - tl.load(factors).to(tl.float64)).to(tl.float32)
    beta1_complement = tl.load(factors + stride).to(tl.float32)
    # So does beta2 less its float32. Without the rest, v would drift: beta2 and its
    # complement, each rounded, do not add up to 1.
    beta2_exact = tl.load(factors + 2 * stride).to(tl.float64)
    beta2 = beta2_exact.to(tl.float32)
    beta2_rest = (beta2_exact - beta2.to(tl.float64)).to(tl.float32)
    beta2_complement = tl.load(factors + 3 * stride).to(tl.float32)
    root_correction = tl.load(factors + 4 * stride).to(tl.float32)
    eps = tl.load(factors + 5 * stride).to(tl.float32)
    step_size = tl.load(factors + 6 * stride).to(tl.float32)

    p = tl.fma(p, -shrinking, p)
    m = tl.fma(g - m, beta1_complement, m)
    # Bounded, since an infinite v times a rest below 0 would turn the sum into NaN.
    rest = tl.minimum(v, LARGEST) * beta2_rest
    v = tl.fma(v, beta2, rest + beta2_complement * g * g)
    denominator = tl.div_rn(tl.sqrt_rn(v), root_correction) + eps
    return tl.fma(tl.div_rn(m, denominator), -step_size, p), m, v


@triton.jit
def _dequantize(codes, scales, exists, values):
    # The pages flow through the cache; the tables are to stay in it.
    found = tl.load(values + codes.to(tl.int32), eviction_policy="evict_last")
    return tl.where(exists, found * scales[:, None], 0.0)


@triton.jit
def _quantize(x, tree):
    """uint8 codes, and the scale of each row: the bits of qlora_lib.numerics.

    Where a scale is not finite, the codes mean nothing.
    """
    # Compared as integers, magnitudes have the same order, and NaN is above infinity.
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    absmax = tl.max(magnitude, 1).to(tl.float32, bitcast=True)
    is_zero = absmax < SMALLEST_NORMAL
    inverse = tl.div_rn(1.0, tl.where(is_zero, float("inf"), absmax))
    normalized = x * inverse[:, None]
    node = tl.full(x.shape, 1, tl.uint32)
    for _ in tl.static_range(8):
        boundary = tl.load(tree + node, eviction_policy="evict_last")
        # Its sign bit is the comparison, and one instruction shifts it into the node.
        difference = (boundary - normalized).to(tl.uint32, bitcast=True)
        node = node << 1 | difference >> 31
    return (node - 256).to(tl.uint8), tl.where(is_zero, 0.0, absmax)
