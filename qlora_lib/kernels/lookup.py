"""Looking codes up inside a matmul: two at once, in a table in shared memory.

Choosing one of 16 values by arithmetic takes many instructions, and a table in the
cache makes threads wait for one another when they read different lines of it. A byte
holds two codes, so a table of all 256 bytes gives a pair of values for one read. Shared
memory has 32 banks, each of which serves one thread at a time. The table has a column
for each of the 32 threads of a warp, every column in another bank, so that no thread
waits for another: ``256 * 32 * 4 = 32768`` bytes. The table of the 256 values that
scales can take after double quantization stands behind it.

Triton has no name for shared memory, so this is assembly for NVIDIA GPUs. Where
``SHARED`` is false (in the interpreter, on other GPUs) the same functions read the
tables of 16 and of 256 values from global memory, and give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qlora_lib.kernels.decoding import round_to

# Declared outside of braces, so that the table lives as long as the kernel. Triton's
# own shared memory comes behind it, and has to begin at a multiple of 1024 bytes: the
# tensor cores of an H100 take the order within a tile from the bits of its address.
DECLARE = tl.constexpr("""
.shared .align 1024 .b8 tables[33792];
mov.u32 $0, tables;
""")

# Entry $1 holds the pair $2 in eight pieces of 16 bytes, four columns each. Neighboring
# threads begin with different pieces, so that they write to different banks.
STORE_PAIR = tl.constexpr(
    "{ .reg .b32 entry, piece; mad.lo.u32 entry, $1, 128, $3;"
    + "".join(
        f"add.u32 piece, $1, {i}; and.b32 piece, piece, 7;"
        "mad.lo.u32 piece, piece, 16, entry;"
        "st.shared.v4.b32 [piece], {$2, $2, $2, $2};"
        for i in range(8)
    )
    + "mov.b32 $0, 0; }"
)
STORE_SCALE_VALUE = tl.constexpr("""{
.reg .b32 address;
mad.lo.u32 address, $1, 4, $3;
st.shared.b32 [address + 32768], $2;
mov.b32 $0, 0;
}""")

# The address of this thread's column.
COLUMN = tl.constexpr("""{
.reg .b32 lane;
mov.u32 lane, %laneid;
mad.lo.u32 $0, lane, 4, $1;
}""")

LOOK_UP_SCALE = tl.constexpr("""{
.reg .b32 address;
mad.lo.u32 address, $1, 4, $2;
ld.shared.b32 $0, [address + 32768];
}""")


def _look_up_word(fused_multiply_add: str) -> str:
    """Word $8, column $9 and the scale twice in $10 -> eight scaled values.

    Each of the four bytes becomes an address, the address a pair, and the pair is
    multiplied by the scale and taken apart. To multiply and add minus zero is to
    multiply, which GPUs before Hopper cannot do alone with bfloat16.
    """
    pairs = "".join(
        f"prmt.b32 pair, $8, 0, 0x444{byte};"
        "mad.lo.u32 pair, pair, 128, $9;"
        "ld.shared.b32 pair, [pair];"
        f"{fused_multiply_add} pair, pair, $10, zero;"
        f"mov.b32 {{${2 * byte}, ${2 * byte + 1}}}, pair;"
        for byte in range(4)
    )
    return f"{{ .reg .b32 pair, zero; mov.b32 zero, 0x80008000; {pairs} }}"


LOOK_UP_BFLOAT16 = tl.constexpr(_look_up_word("fma.rn.bf16x2"))
LOOK_UP_FLOAT16 = tl.constexpr(_look_up_word("fma.rn.f16x2"))
# A scale, rounded, in both halves of a register.
TWICE_BFLOAT16 = tl.constexpr("cvt.rn.bf16x2.f32 $0, $1, $1;")
TWICE_FLOAT16 = tl.constexpr("cvt.rn.f16x2.f32 $0, $1, $1;")
LOOK_UP_OPERANDS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r")


@triton.jit
def fill_tables(
    values,
    scale_values,
    dtype: tl.constexpr,
    NESTED: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Fill the tables and wait for them.

    Args:
        values: Pointer to the float32 codebook ``[16]``.
        scale_values: Pointer to the float32 codebook of the scales ``[256]``.
        dtype: float16 or bfloat16, the type of the looked-up values.
        NESTED: Whether there are codes of scales to look up.
        SHARED: Whether the tables are in shared memory.

    Returns:
        int32, the shared-memory address of the tables, for the functions below.
    """
    if SHARED:
        byte = tl.arange(0, 256)
        first = _bits(tl.load(values + byte // 16).to(dtype))
        second = _bits(tl.load(values + byte % 16).to(dtype))
        pair = first | (second << 16)
        tables = tl.inline_asm_elementwise(DECLARE, "=r,r", [0], tl.int32, False, 1)
        tl.inline_asm_elementwise(
            STORE_PAIR, "=r,r,r,r", [byte, pair, tables], tl.int32, False, 1
        )
        if NESTED:
            value = tl.load(scale_values + byte)
            tl.inline_asm_elementwise(
                STORE_SCALE_VALUE, "=r,r,r,r", [byte, value, tables], tl.int32, False, 1
            )
        tl.debug_barrier()
        # Lookups count as free of side effects, so the compiler may move them: only
        # behind what they depend on, which from here on is behind the barrier.
        tables = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [tables], tl.int32, False, 1
        )
    else:
        tables = 0
    return tables


@triton.jit
def look_up_scales(codes, scale_values, tables, SHARED: tl.constexpr):
    """float32 value of each code of a scale, int32 in ``[0, 256)``."""
    if SHARED:
        scales = tl.inline_asm_elementwise(
            LOOK_UP_SCALE, "=r,r,r", [codes, tables], tl.float32, True, 1
        )
    else:
        scales = tl.load(scale_values + codes)
    return scales


@triton.jit
def look_up_words(
    words, scales, values, tables, dtype: tl.constexpr, SHARED: tl.constexpr
):
    """The eight numbers that each word stands for.

    ``numbers[j] = values[code j] * scale``, with value, scale and product each rounded
    to ``dtype``.

    Args:
        words: int32, four bytes of two codes each.
        scales: float32, broadcast to the shape of ``words``.
        values: Pointer to the float32 codebook ``[16]``.
        tables: What :func:`fill_tables` has returned.
        dtype: float16 or bfloat16, as there.
        SHARED: As there.

    Returns:
        Eight tensors of ``dtype`` in the shape of ``words``, in the order of the codes.
    """
    if SHARED:
        column = tl.inline_asm_elementwise(COLUMN, "=r,r", [tables], tl.int32, True, 1)
        TWICE: tl.constexpr = TWICE_BFLOAT16 if dtype == tl.bfloat16 else TWICE_FLOAT16
        twice = tl.inline_asm_elementwise(TWICE, "=r,f", [scales], tl.int32, True, 1)
        operands = [words, column, twice]
        if dtype == tl.bfloat16:
            numbers = tl.inline_asm_elementwise(
                LOOK_UP_BFLOAT16,
                LOOK_UP_OPERANDS,
                operands,
                (tl.bfloat16,) * 8,
                True,
                1,
            )
        else:
            numbers = tl.inline_asm_elementwise(
                LOOK_UP_FLOAT16, LOOK_UP_OPERANDS, operands, (tl.float16,) * 8, True, 1
            )
    else:
        scales = round_to(scales, dtype)
        numbers = (
            _scaled_value(words, 4, scales, values, dtype),
            _scaled_value(words, 0, scales, values, dtype),
            _scaled_value(words, 12, scales, values, dtype),
            _scaled_value(words, 8, scales, values, dtype),
            _scaled_value(words, 20, scales, values, dtype),
            _scaled_value(words, 16, scales, values, dtype),
            _scaled_value(words, 28, scales, values, dtype),
            _scaled_value(words, 24, scales, values, dtype),
        )
    return numbers


@triton.jit
def _scaled_value(words, shift: tl.constexpr, scales, values, dtype: tl.constexpr):
    value = round_to(tl.load(values + ((words >> shift) & 15)), dtype)
    return round_to(value.to(tl.float32) * scales.to(tl.float32), dtype)


@triton.jit
def _bits(numbers):
    """The 16 bits of each number in the lower half of an int32."""
    return numbers.to(tl.uint16, bitcast=True).to(tl.int32)
