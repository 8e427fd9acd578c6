"""Decoding inside a kernel: the parts that dequantize and the matmuls share."""

from __future__ import annotations

import triton
import triton.language as tl

from qlora_lib.numerics import quantized_tensor

SCALE_BLOCK_SIZE = tl.constexpr(quantized_tensor.SCALE_BLOCK_SIZE)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def load_scales(
    scales, nested_scales, offset, scale_values, block, mask, NESTED: tl.constexpr
):
    """float32 scale of each block, decoded if the scales are quantized (``NESTED``).

    ``scale = scale_values[scales[block]] * nested_scales[block // 256] + offset``
    (paper, section 3). The reference rounds the product and the sum each on its own:
    for its bits, launch the kernel with ``enable_fp_fusion=False``.
    """
    scale = tl.load(scales + block, mask=mask, other=0)
    if NESTED:
        nested_block = block // SCALE_BLOCK_SIZE
        nested_scale = tl.load(nested_scales + nested_block, mask=mask, other=0.0)
        value = tl.load(scale_values + scale.to(tl.int32))
        scale = value * nested_scale + tl.load(offset)
    return scale


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 ``x`` rounded to nearest, ties to even, as ``dtype``.

    A GPU does that in one instruction. Triton's interpreter cuts bits off instead where
    it should round to bfloat16, so for the interpreter it is written out.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(dtype)
    return rounded
