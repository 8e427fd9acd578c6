"""Packing against one large integer that holds the same bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_lib.numerics import pack, packing, unpack
from qlora_lib.numerics.packing import packed_size

WIDTHS = range(1, 9)


def pack_into_integer(codes: list[int], bits: int, padding: int) -> bytes:
    """Write every code in binary, one after the other, and read the digits as bytes."""
    size = (len(codes) * bits + 7) // 8
    digits = "".join(f"{code:0{bits}b}" for code in codes)
    digits += f"{padding:0{bits}b}" * 8
    return int("0" + digits[: 8 * size], 2).to_bytes(size)


@st.composite
def codes_and_width(draw: st.DrawFn) -> tuple[list[int], int, int]:
    bits = draw(st.integers(1, 8))
    code = st.integers(0, 2**bits - 1)
    return draw(st.lists(code, max_size=40)), bits, draw(code)


@given(codes_and_width())
def test_layout_and_round_trip(case):
    codes, bits, padding = case
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits, padding)
    assert bytes(packed.tolist()) == pack_into_integer(codes, bits, padding)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_size(len(codes), bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_count_in_pieces(bits, monkeypatch):
    monkeypatch.setattr(packing, "PIECE", 16)
    generator = torch.Generator().manual_seed(bits)
    for count in range(67):
        codes = torch.randint(2**bits, (count,), dtype=torch.uint8, generator=generator)
        packed = pack(codes, bits)
        assert bytes(packed.tolist()) == pack_into_integer(codes.tolist(), bits, 0)
        assert torch.equal(unpack(packed, bits, count), codes)


def test_pieces_of_their_real_size():
    count = packing.PIECE + 5
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(8, (count,), dtype=torch.uint8, generator=generator)
    packed = pack(codes, 3)
    assert bytes(packed.tolist()) == pack_into_integer(codes.tolist(), 3, 0)
    assert torch.equal(unpack(packed, 3, count), codes)


def test_toy_codes_by_hand():
    # 3, 1, 2, 2 in two bits each: 11 01 10 10.
    assert pack(torch.tensor([3, 1, 2, 2], dtype=torch.uint8), 2).tolist() == [
        0b11011010
    ]


def test_4_bits_high_half_first():
    codes = torch.tensor([0xA, 0x3, 0xF], dtype=torch.uint8)
    assert pack(codes, 4, padding=7).tolist() == [0xA3, 0xF7]


def test_a_strided_input_is_packed_in_order():
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(pack(codes[::3], 4), pack(codes[::3].clone(), 4))
    packed = pack(codes, 4)
    assert torch.equal(unpack(packed.repeat_interleave(2)[::2], 4, 16), codes)


@pytest.mark.parametrize("bits", [0, 9, -1, 4.0, "4"])
def test_bad_width(bits):
    codes = torch.zeros(8, dtype=torch.uint8)
    message = f"bits must be an integer from 1 to 8, got {bits!r}"
    with pytest.raises(ValueError, match=message):
        pack(codes, bits)
    with pytest.raises(ValueError, match=message):
        unpack(codes, bits, 8)


@pytest.mark.parametrize("length", [0, 2, 4])
def test_wrong_number_of_bytes(length):
    with pytest.raises(
        ValueError, match=f"packed must have 3 bytes to hold 5 codes .* got {length}"
    ):
        unpack(torch.zeros(length, dtype=torch.uint8), 4, 5)


@pytest.mark.parametrize("bits", WIDTHS)
def test_any_shape_is_read_row_by_row(bits):
    codes = torch.arange(15, dtype=torch.uint8) & (2**bits - 1)
    packed = pack(codes, bits)
    assert torch.equal(pack(codes.view(3, 5), bits), packed)
    assert torch.equal(unpack(packed.view(-1, 1), bits, 15), codes)


def test_only_bytes_are_packed_and_unpacked():
    # Wider integers would keep the bits that a shift pushes out of a byte.
    codes = torch.tensor([7, 1, 6])
    message = r"must be uint8, got torch\.int64: convert it"
    with pytest.raises(TypeError, match="codes " + message):
        pack(codes, 3)
    with pytest.raises(TypeError, match="packed " + message):
        unpack(codes, 8, 3)
