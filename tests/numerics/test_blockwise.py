"""Scales and codes block by block, and the cutting of a tensor into pieces."""

import pytest
import torch

from qlora_lib.numerics import DYNAMIC8, NF4, TOY, blockwise, packing, quantize
from qlora_lib.numerics.blockwise import (
    absmax_scales,
    dequantize_blockwise,
    pieces,
    quantize_blockwise,
)
from qlora_lib.numerics.packing import pack, packed_size

SMALLEST_NORMAL = 2.0**-126


class TestScales:
    def test_by_hand(self):
        numbers = torch.tensor([10.0, -3.0, 5.0, 4.0, -7.0, 0.0, 0.0, 2.0, -1.0])
        assert absmax_scales(numbers, 4).tolist() == [10, 7, 1]
        assert absmax_scales(numbers, 100).tolist() == [10]
        assert absmax_scales(numbers, 1).tolist() == numbers.abs().tolist()
        assert absmax_scales(torch.zeros(0), 4).tolist() == []

    @pytest.mark.parametrize("piece", [1, 5, 8, 64, 100])
    @pytest.mark.parametrize("block_size", [1, 3, 8, 64, 1000])
    def test_against_a_loop(self, block_size, piece, monkeypatch):
        monkeypatch.setattr(blockwise, "PIECE", piece)
        numbers = torch.randn(333, generator=torch.Generator().manual_seed(0))
        expected = [float(block.abs().max()) for block in numbers.split(block_size)]
        assert absmax_scales(numbers, block_size).tolist() == expected

    def test_subnormal_absmax_is_zero(self):
        below = torch.nextafter(torch.tensor(SMALLEST_NORMAL), torch.tensor(0.0))
        blocks = torch.tensor(
            [
                [0.0, -SMALLEST_NORMAL],
                [0.0, float(below)],
                [2.0**-149, -(2.0**-149)],
                [-1.0, 2.0**-149],
                [0.0, -0.0],
            ]
        )
        scales = absmax_scales(blocks.view(-1), 2)
        assert scales.tolist() == [SMALLEST_NORMAL, 0, 0, 1, 0]
        assert not scales.signbit().any()

    @pytest.mark.parametrize("codebook", [NF4, TOY, DYNAMIC8], ids=lambda c: c.name)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_subnormal_blocks_dequantize_to_zeros(self, codebook, dtype):
        subnormal = torch.tensor([1e-39, -1e-40, 0.0, 5e-39] * 16).to(dtype)
        tensor = torch.cat([torch.ones(64, dtype=dtype), subnormal])
        q = quantize(tensor, codebook, 64)
        assert q.scales.tolist() == [1, 0]
        assert torch.equal(q.dequantize()[64:], torch.zeros(64, dtype=dtype))

    def test_subnormal_blocks_do_not_depend_on_the_processors_mode(self):
        tensor = torch.tensor([1e-39, -3e-40, 0.0, 5e-39] * 16)
        expected = quantize(tensor, NF4, 64)
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush subnormal numbers to zero")
        try:
            flushed = quantize(tensor, NF4, 64)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(flushed.packed, expected.packed)
        assert torch.equal(flushed.scales, expected.scales)

    def test_largest_scales(self):
        # Above 2**126 the reciprocal is itself subnormal, but still good to 22 bits.
        largest = torch.finfo(torch.float32).max
        tensor = NF4.values * largest
        q = quantize(tensor, NF4, 16)
        assert q.codes.tolist() == list(range(16))
        assert torch.equal(q.dequantize(), tensor)


class TestPieces:
    @pytest.mark.parametrize("piece", [1, 2, 7, 64, 1000])
    @pytest.mark.parametrize("block_size", [1, 2, 3, 64, 65, 500])
    @pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 333])
    def test_cover_everything_in_order(self, count, block_size, piece, monkeypatch):
        monkeypatch.setattr(blockwise, "PIECE", piece)
        check_pieces(count, block_size, largest=piece)

    @pytest.mark.parametrize("block_size", [1, 64, 100, 4096, 2**20 + 1, 2**31 + 65])
    def test_more_than_2_to_the_31_numbers(self, block_size):
        check_pieces(2**31 + 65, block_size, largest=blockwise.PIECE)

    @pytest.mark.parametrize("block_size", [1, 3, 64, 333])
    @pytest.mark.parametrize("codebook", [NF4, TOY, DYNAMIC8], ids=lambda c: c.name)
    def test_piece_by_piece_is_the_same_as_at_once(
        self, codebook, block_size, monkeypatch
    ):
        tensor = torch.randn(333, generator=torch.Generator().manual_seed(0))
        at_once = quantize(tensor, codebook, block_size)
        numbers = at_once.dequantize()
        for piece in (1, 5, 8, 64, 100):
            monkeypatch.setattr(blockwise, "PIECE", piece)
            monkeypatch.setattr(packing, "PIECE", 8 * piece)
            q = quantize(tensor, codebook, block_size)
            assert torch.equal(q.packed, at_once.packed)
            assert torch.equal(q.scales, at_once.scales)
            assert torch.equal(q.dequantize(), numbers)

    def test_every_step_takes_more_than_2_to_the_31_numbers(self, monkeypatch):
        # A meta tensor has a shape and no memory: only the index arithmetic runs.
        monkeypatch.setattr(blockwise, "PIECE", 2**25)
        monkeypatch.setattr(packing, "PIECE", 2**25)
        count, blocks = 2**31 + 65, 2**25 + 2
        numbers = torch.empty(count, dtype=torch.bfloat16, device="meta")
        scales = absmax_scales(numbers, 64)
        assert scales.shape == (blocks,)
        codes = quantize_blockwise(numbers, scales, NF4, 64)
        assert codes.shape == (count,)
        packed = pack(codes, NF4.bits)
        assert packed.shape == (2**30 + 33,)
        assert packing.unpack(packed, NF4.bits, count).shape == (count,)
        values = NF4.table(codes.device)
        assert dequantize_blockwise(codes, scales, values, 64).shape == (count,)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_size_beyond_2_to_the_31(bits):
    assert packed_size(2**31 + 65, bits) == bits * 2**28 + -(-65 * bits // 8)


def check_pieces(count: int, block_size: int, largest: int) -> None:
    """Pieces follow each other, none is too large, and each knows its blocks."""
    position = 0
    for piece, blocks in pieces(count, block_size):
        length = piece.stop - piece.start
        assert piece.start == position
        assert 0 < length <= largest
        assert blocks.start == piece.start // block_size
        assert blocks.stop == (piece.stop - 1) // block_size + 1
        assert length % (blocks.stop - blocks.start) == 0
        if blocks.stop - blocks.start > 1:
            assert length == (blocks.stop - blocks.start) * block_size
        position = piece.stop
    assert position == count
