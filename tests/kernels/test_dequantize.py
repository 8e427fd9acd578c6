"""dequantize_blocks gives the bits of the reference, and the numbers in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lib.kernels.dequantize import dequantize_blocks
from qlora_lib.kernels.storage import Storage
from qlora_lib.numerics import (
    FP4,
    FP4_BITSANDBYTES,
    FP4_E3M0,
    INT4,
    NF4,
    Codebook,
    QuantizedTensor,
    quantize,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "small_programs")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
COUNTS = [1, 2, 63, 64, 65, 1000, 1024]
BLOCK_SIZES = [32, 64, 128, 256]
CUSTOM = Codebook(
    "custom", [-1, -0.9, -0.5, -1e-6, 0, 1e-6, 0.5, 0.5001, 1], ties="upper"
)
CODEBOOKS = [NF4, INT4, FP4, FP4_E3M0, FP4_BITSANDBYTES, CUSTOM]

SCALES = [0.0, 1.0, -1.0, 1 / 3, 1e-3, 2.0**-126, 2.0**-24, 65504.0, 65519.9, 1e20]
SCALES += [3.4e38, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11]


def normal(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator)


def storage_of(q: QuantizedTensor, device: str) -> Storage:
    values = F.pad(q.codebook.values, (0, 16 - len(q.codebook)))
    if isinstance(q.scales, Tensor):
        parts = (q.packed, q.scales, None, None, values, None)
    else:
        scales = q.scales
        parts = (
            q.packed,
            scales.packed,
            scales.scales,
            scales.offset,
            values,
            scales.codebook.values,
        )
    on_device = (None if part is None else part.to(device) for part in parts)
    return Storage(*on_device, q.block_size)


def check_bits(q: QuantizedTensor, dtype: torch.dtype, device: str) -> Tensor:
    numbers = dequantize_blocks(storage_of(q, device), q.shape.numel(), dtype)
    assert numbers.device.type == device and numbers.dtype == dtype
    expected = q.dequantize(dtype).view(-1)
    # As integers: 0 and -0 differ.
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(numbers.cpu().view(bits), expected.view(bits))
    return numbers.cpu()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
def test_counts(count, dtype, double_quant, device):
    check_bits(quantize(normal(count), NF4, 64, double_quant), dtype, device)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("codebook", CODEBOOKS, ids=lambda codebook: codebook.name)
def test_codebooks_and_block_sizes(codebook, block_size, double_quant, device):
    q = quantize(normal(777), codebook, block_size, double_quant)
    check_bits(q, torch.bfloat16, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_float64(dtype, device):
    """More than 256 scales, decoded here from the stored codes in float64."""
    count, block_size = 10_001, 32
    q = quantize(normal(count, seed=1), NF4, block_size, double_quant=True)
    numbers = dequantize_blocks(storage_of(q, device), count, dtype).cpu().double()
    table = q.scales.codebook.values.double()
    nested = q.scales.scales.double().repeat_interleave(256)[: len(q.scales.packed)]
    scales = table[q.scales.packed.long()] * nested + q.scales.offset.double()
    scales = scales.repeat_interleave(block_size)[:count]
    codes = torch.stack([q.packed >> 4, q.packed & 15], 1).view(-1)[:count].long()
    expected = q.codebook.values.double()[codes] * scales
    tolerance = torch.finfo(dtype).eps / 2 + 2**-22
    assert bool(((numbers - expected).abs() <= tolerance * expected.abs()).all())


def test_nested_scales_round_product_and_sum_apart(device):
    """Fused into one rounding, some of these scales would be other floats."""
    q = quantize(normal(32 * 300, seed=2), NF4, 32, double_quant=True)
    values = q.scales.codebook.values[q.scales.packed.long()].double()
    nested = q.scales.scales.double().repeat_interleave(256)[:300]
    fused = (values * nested + q.scales.offset.double()).float()
    assert not torch.equal(fused, q.scales.dequantize())
    check_bits(q, torch.float32, device)


def every_code(scale: float, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    codes = torch.arange(16, dtype=torch.uint8)
    return QuantizedTensor(
        packed=(codes[0::2] << 4) | codes[1::2],
        scales=torch.tensor([scale], dtype=torch.float64).float(),
        codebook=NF4,
        block_size=32,
        shape=torch.Size([16]),
        dtype=dtype,
    )


# NumPy, which the interpreter computes with, warns where a product leaves float16.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_code(scale, dtype, device):
    """Up to the ends of each type, and midway between two of its numbers."""
    check_bits(every_code(scale), dtype, device)


def test_zero_blocks_and_outliers(device):
    numbers = torch.cat([torch.zeros(64), torch.full((64,), 1e-39), normal(64)])
    numbers[150] = 1e30
    for double_quant in (False, True):
        q = quantize(numbers, NF4, 64, double_quant)
        result = check_bits(q, torch.float32, device)
        if not double_quant:
            assert not result[:128].any()


def test_unaligned(device):
    """Parts cut out of larger tensors, as from a file read at once."""
    q = quantize(normal(1000), NF4, 64, double_quant=True)
    storage = storage_of(q, device)
    shifted = [
        torch.cat([part.new_zeros(1), part])[1:]
        if part is not None and part.dim()
        else part
        for part in storage[:6]
    ]
    result = dequantize_blocks(Storage(*shifted, 64), 1000, torch.float32)
    assert torch.equal(result.cpu(), q.dequantize())


def test_empty(device):
    q = quantize(torch.empty(0), NF4, 64)
    numbers = dequantize_blocks(storage_of(q, device), 0, torch.float16)
    assert numbers.shape == (0,) and numbers.dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096)])
def test_real_sizes(shape, dtype, double_quant, device):
    seed = torch.seed() % 2**32
    print(f"seed {seed}")
    q = quantize(normal(math.prod(shape), seed), NF4, 64, double_quant)
    numbers = check_bits(q, dtype, device)
    again = dequantize_blocks(storage_of(q, device), len(numbers), dtype)
    assert torch.equal(again.cpu(), numbers)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_with_many_scales(dtype, device):
    """Each code times two million scales of any magnitude: every way of rounding."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(
        0, 0x7F800000, (2**21,), generator=generator, dtype=torch.int32
    )
    codes = torch.arange(16, dtype=torch.uint8).repeat(2 * len(bits))
    q = QuantizedTensor(
        packed=(codes[0::2] << 4) | codes[1::2],
        scales=bits.view(torch.float32),
        codebook=NF4,
        block_size=32,
        shape=torch.Size([len(codes)]),
        dtype=dtype,
    )
    check_bits(q, dtype, device)


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_2_to_the_31_numbers(device):
    count = 2**31 + 65
    generator = torch.Generator(device).manual_seed(0)
    shape = {"generator": generator, "device": device, "dtype": torch.uint8}
    storage = Storage(
        packed=torch.randint(0, 256, (2**30 + 33,), **shape),
        scales=torch.randint(0, 256, (2**25 + 2,), **shape),
        nested_scales=torch.rand(2**17 + 1, generator=generator, device=device),
        offset=torch.tensor(1.5, device=device),
        values=NF4.values.to(device),
        scale_values=quantize(normal(64), NF4, 64, True).scales.codebook.values.to(
            device
        ),
        block_size=64,
    )
    numbers = dequantize_blocks(storage, count, torch.bfloat16)
    for start in (0, 2**30, 2**31 - 2**20, 2**31 - 2**14, 2**31):
        stop = min(start + 2**20, count)
        # A part that starts with a whole nested block is a tensor of its own.
        assert start % (64 * 256) == 0
        part = storage._replace(
            packed=storage.packed[start // 2 : -(-stop // 2)].clone(),
            scales=storage.scales[start // 64 : -(-stop // 64)].clone(),
            nested_scales=storage.nested_scales[
                start // 2**14 : -(-stop // 2**14)
            ].clone(),
        )
        expected = dequantize_blocks(part, stop - start, torch.bfloat16)
        assert torch.equal(numbers[start:stop], expected)
    assert not numbers.isnan().any()
