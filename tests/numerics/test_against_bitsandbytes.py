"""Codes, scales and numbers bit for bit against bitsandbytes on the CPU, in one run.

Its own back ends differ in two places, and each is compared as it is:

- in a last block that is shorter than the others its CPU path divides by the scale,
  where everywhere else, as in its CUDA kernels and here, the reciprocal is multiplied;
- its CPU path finds the codes of the scales in a table of 65,536 bins, its CUDA kernels
  by comparing with the midpoints, as it is done here.
"""

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from torch import Tensor

from qlora_lib.numerics import (
    FP4_BITSANDBYTES,
    NF4,
    QuantizedTensor,
    pack,
    quantize,
    unpack,
)

CODEBOOKS = {"nf4": NF4, "fp4": FP4_BITSANDBYTES}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
COUNTS = [1, 2, 3, 63, 64, 65, 127, 1000, 10_001, 1_000_000]


def normal(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return (0.02 * torch.randn(count, generator=generator)).to(dtype)


def nearest(normalized: np.ndarray, table: Tensor) -> np.ndarray:
    """Codes by comparison with the float32 midpoints, a tie going to the lower code."""
    values = table.numpy()
    return np.searchsorted((values[:-1] + values[1:]) / np.float32(2), normalized)


def check_codes(x: Tensor, quant_type: str, block_size: int) -> None:
    """Compare scales, codes and padding, the last short block by both of its rules."""
    codebook = CODEBOOKS[quant_type]
    count = x.numel()
    packed, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type=quant_type)
    their_codes = unpack(packed.view(-1), 4, count).numpy()
    # FP4: their codes are in another order, so the values are compared.
    their_values = state.code.numpy()[their_codes]

    q = quantize(x, codebook, block_size)
    assert isinstance(q.scales, Tensor)
    assert torch.equal(q.scales, state.absmax)
    whole = count - count % block_size
    values = codebook.lookup(q.codes).numpy()
    np.testing.assert_array_equal(values[:whole], their_values[:whole])
    if whole < count:
        short, scale = x[whole:].float().numpy(), state.absmax[-1].numpy()
        table = codebook.values.numpy()
        by_division = table[nearest(short / scale, codebook.values)]
        by_product = table[nearest(short * (1 / scale), codebook.values)]
        np.testing.assert_array_equal(their_values[whole:], by_division)
        np.testing.assert_array_equal(values[whole:], by_product)
    if quant_type == "nf4":
        padding = int(packed[-1]) & 15 if count % 2 else 0
        assert torch.equal(q.packed, pack(q.codes, 4, padding))
        same = np.array_equal(their_values, values)
        assert torch.equal(q.packed, packed.view(-1)) == same


class TestFlat:
    @pytest.mark.parametrize("count", COUNTS)
    @pytest.mark.parametrize("quant_type", CODEBOOKS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_size(self, dtype, quant_type, count):
        check_codes(normal(count, dtype), quant_type, block_size=64)

    @pytest.mark.parametrize("block_size", BLOCK_SIZES)
    @pytest.mark.parametrize("quant_type", CODEBOOKS)
    def test_every_block_size(self, quant_type, block_size):
        check_codes(normal(10_001), quant_type, block_size)

    @pytest.mark.parametrize("quant_type", CODEBOOKS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_numbers_on_the_boundaries_and_beside_them(self, dtype, quant_type):
        boundaries = CODEBOOKS[quant_type].boundaries
        steps = torch.arange(-3, 4) * 2.0**-24
        near = (boundaries[:, None] + steps).view(-1)
        blocks = torch.ones(len(near), 2)
        blocks[:, 1] = near
        # A block of 32 with 1 in it is normalized by 1, and by other scales below.
        x = torch.zeros(len(near), 32)
        x[:, :2] = blocks
        for scale in (1.0, 0.75, 1.1, 1e-6, 1e4):
            check_codes((x * scale).view(-1).to(dtype), quant_type, block_size=32)

    def test_the_last_short_block_by_division_and_by_product(self):
        differences = 0
        for scale in torch.linspace(0.5, 1, 11):
            steps = 1 + torch.arange(-3, 4) * 2.0**-24
            near = (NF4.boundaries * scale)[:, None] * steps
            x = torch.cat([normal(4096), scale[None], near.view(-1)])
            check_codes(x, "nf4", block_size=4096)
            packed, _ = bnb.quantize_4bit(x, blocksize=4096, quant_type="nf4")
            differences += not torch.equal(
                quantize(x, NF4, 4096).packed, packed.view(-1)
            )
        # The two rules do differ here, so the comparison is not an empty one.
        assert differences > 0

    @pytest.mark.parametrize(
        "shape", [(64, 64), (128, 96), (3, 5, 7), (17, 1), (1, 200)]
    )
    def test_shapes(self, shape):
        x = normal(int(np.prod(shape))).view(shape)
        packed, state = bnb.quantize_4bit(x, quant_type="nf4")
        q = quantize(x, NF4, 64)
        assert q.shape == shape
        assert torch.equal(q.packed, packed.view(-1))
        # Its AVX-512 kernel mistakes the scale of a block that goes on in the next row,
        # so it is given one long row.
        state.shape = torch.Size([x.numel()])
        theirs = bnb.dequantize_4bit(packed, state)
        assert torch.equal(q.dequantize(), theirs.view(shape))

    @pytest.mark.parametrize("block_size", [64, 4096])
    @pytest.mark.parametrize("count", COUNTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dequantized_numbers(self, dtype, count, block_size):
        x = normal(count, dtype)
        packed, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type="nf4")
        theirs = bnb.dequantize_4bit(packed, state)
        q = QuantizedTensor(
            packed=packed.view(-1),
            scales=state.absmax,
            codebook=NF4,
            block_size=block_size,
            shape=x.shape,
            dtype=dtype,
        )
        assert theirs.dtype == dtype
        assert torch.equal(q.dequantize(), theirs.view(-1))

    def test_zeros(self):
        x = normal(256)
        x[64:128] = 0
        check_codes(x, "nf4", block_size=64)
        # A last short block of zeros has the scale 1e-38 there and 0 here: both are 0.
        x = torch.cat([x, torch.zeros(10)])
        packed, state = bnb.quantize_4bit(x, quant_type="nf4")
        q = quantize(x, NF4, 64)
        assert torch.equal(q.packed, packed.view(-1))
        theirs = bnb.dequantize_4bit(packed, state)
        assert torch.equal(q.dequantize(), theirs.view(-1))


class TestDoubleQuantization:
    @pytest.mark.parametrize("count", COUNTS)
    @pytest.mark.parametrize("quant_type", CODEBOOKS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_scales(self, dtype, quant_type, count):
        x = normal(count, dtype)
        _, state = bnb.quantize_4bit(x, quant_type=quant_type, compress_statistics=True)
        q = quantize(x, CODEBOOKS[quant_type], 64, double_quant=True)
        scales = q.scales
        assert isinstance(scales, QuantizedTensor)
        assert torch.equal(scales.offset, state.offset)
        assert torch.equal(scales.scales, state.state2.absmax)
        assert torch.equal(scales.codebook.values, state.state2.code)

        flat = quantize(x, CODEBOOKS[quant_type], 64)
        assert torch.equal(flat.packed, q.packed)
        centered = (flat.scales - state.offset).numpy()
        if not centered.any():  # one scale is its own mean, and any code will do
            assert torch.equal(scales.dequantize(), flat.scales)
            return
        inverse = (1 / state.state2.absmax.numpy()).repeat(256)[: len(centered)]
        by_midpoints = nearest(centered * inverse, state.state2.code)
        np.testing.assert_array_equal(scales.codes.numpy(), by_midpoints)
        # Their CPU codes: a bin is 2**-15 wide, so a value can be that much farther,
        # and about one code in 600 differs.
        their_codes = state.absmax.numpy()
        table = state.state2.code.numpy()
        distance = np.abs(table[by_midpoints] - centered * inverse)
        their_distance = np.abs(table[their_codes] - centered * inverse)
        assert (their_distance <= distance + 2**-15).all()
        assert (their_codes != by_midpoints).sum() <= 1 + 0.003 * len(their_codes)

    @pytest.mark.parametrize("count", COUNTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dequantized_numbers(self, dtype, count):
        x = normal(count, dtype)
        packed, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
        q = quantize(x, NF4, 64, double_quant=True)
        ours, theirs = q.dequantize(), bnb.dequantize_4bit(packed, state).view(-1)
        if len(state.absmax) == 1:  # one scale is its own mean, and any code will do
            assert torch.equal(ours, theirs)
            return
        same_scale = q.scales.codes == state.absmax
        assert int((~same_scale).sum()) <= 1 + 0.003 * len(same_scale)
        of_same_scale = same_scale.repeat_interleave(64)[:count]
        assert torch.equal(ours[of_same_scale], theirs[of_same_scale])
