"""quantize_blocks gives the bits of the reference, and the nearest codes in float64."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from qlora_lib.kernels.quantize import bucket_of, buckets_of, quantize_blocks
from qlora_lib.numerics import (
    FP4,
    FP4_BITSANDBYTES,
    FP4_E3M0,
    INT4,
    NF4,
    Codebook,
    lloyd_max,
    quantize,
    unpack,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "small_programs")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
COUNTS = [1, 2, 63, 64, 65, 1000, 1024]
BLOCK_SIZES = [32, 64, 128, 256]
EVEN = [-1, -0.75, -0.5, -0.25, 0, 0.125, 0.25, 0.5, 0.75, 1]
NF4_UPPER = Codebook("nf4_upper", NF4.values, ties="upper")
TIES_UPPER = Codebook("ties_upper", EVEN, ties="upper")
# Boundaries too close for any bucket.
CLOSE = Codebook("close", [-1, -0.5, -2e-6, -1e-6, 0, 1e-6, 2e-6, 0.5, 0.5001, 1])
# Its boundary -2**-150 is -0 in float32.
TINY = Codebook("tiny", [-1, -0.5, -0.25, -(2.0**-149), 0, 0.25, 0.5, 0.75, 1])
CODEBOOKS = [
    NF4,
    INT4,
    FP4,
    FP4_E3M0,
    FP4_BITSANDBYTES,
    lloyd_max(4),
    NF4_UPPER,
    TIES_UPPER,
    CLOSE,
    TINY,
]
LARGEST = torch.finfo(torch.float32).max
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def normal(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator).to(dtype)


def check_bits(
    numbers: Tensor, codebook: Codebook, block_size: int, device: str
) -> tuple[Tensor, Tensor]:
    packed, scales = quantize_blocks(numbers.to(device), codebook, block_size)
    expected = quantize(numbers, codebook, block_size)
    assert packed.device.type == scales.device.type == device
    assert packed.dtype == torch.uint8 and scales.dtype == torch.float32
    assert torch.equal(scales.cpu(), expected.scales)
    assert torch.equal(packed.cpu(), expected.packed)
    return packed.cpu(), scales.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
def test_counts(count, dtype, device):
    check_bits(normal(count, dtype), NF4, 64, device)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("codebook", CODEBOOKS, ids=lambda codebook: codebook.name)
def test_codebooks_and_block_sizes(codebook, block_size, device):
    check_bits(normal(777), codebook, block_size, device)


@pytest.mark.parametrize("codebook", CODEBOOKS, ids=lambda codebook: codebook.name)
def test_nearest_in_float64(codebook, device):
    """No other value of the codebook is nearer, up to the rounding of the product."""
    numbers = normal(640, seed=1)
    packed, scales = quantize_blocks(numbers.to(device), codebook, 64)
    codes = unpack(packed.cpu(), 4, 640).long()
    rows = numbers.double().view(-1, 64)
    absmax = rows.abs().amax(1, keepdim=True)
    assert torch.equal(scales.cpu().double(), absmax[:, 0])
    normalized = (rows / absmax).view(-1)
    values = codebook.values.double()
    distance = (normalized[:, None] - values).abs()
    chosen = distance.gather(1, codes[:, None])[:, 0]
    assert bool((chosen <= distance.amin(1) + 2**-22).all())


def neighbors(points: Tensor) -> Tensor:
    """Each float32 with the two floats below it and the two above."""
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    below, above = points.nextafter(down), points.nextafter(up)
    return torch.cat(
        [points, below, above, below.nextafter(down), above.nextafter(up)]
    ).clamp(-1, 1)


@pytest.mark.parametrize("codebook", CODEBOOKS, ids=lambda codebook: codebook.name)
def test_around_boundaries_and_values(codebook, device):
    """With 1 as the largest magnitude the numbers are normalized as they are."""
    points = neighbors(torch.cat([codebook.boundaries, codebook.values]))
    blocks = torch.zeros(-(-len(points) // 63), 64)
    blocks[:, 0] = 1
    blocks[:, 1:] = torch.cat([points, points.new_zeros(-len(points) % 63)]).view(
        -1, 63
    )
    check_bits(blocks.view(-1), codebook, 64, device)


@pytest.mark.parametrize(
    "codebook", [NF4, FP4_E3M0], ids=lambda codebook: codebook.name
)
def test_around_edges_of_buckets(codebook, device):
    buckets = buckets_of(codebook, torch.device("cpu")).number
    edges = neighbors(torch.arange(-4 * buckets, 4 * buckets + 1) / (4 * buckets))
    # Every edge in the finest buckets is too much for the interpreter.
    edges = edges if device == "cuda" else edges[:: max(1, buckets // 32)]
    points = torch.cat([edges, edges.new_zeros(-len(edges) % 63)]).view(-1, 63)
    blocks = torch.cat([torch.ones(len(points), 1), points], 1)
    check_bits(blocks.reshape(-1), codebook, 64, device)


@pytest.mark.parametrize("codebook", CODEBOOKS, ids=lambda codebook: codebook.name)
def test_buckets_separate_boundaries(codebook):
    """The tables answer as comparing with every boundary does, all over [-1, 1]."""
    buckets, tables = buckets_of(codebook, torch.device("cpu"))
    if codebook is CLOSE:
        assert buckets == 0
        return
    grid = torch.linspace(-1, 1, 100_001)
    bucket_edges = torch.arange(-4 * buckets, 4 * buckets + 1) / (4 * buckets)
    points = torch.cat([grid, *map(neighbors, (codebook.boundaries, bucket_edges))])
    points = points.sort().values
    bucket = bucket_of(points, buckets)
    assert int(bucket[0]) == 0 and int(bucket[-1]) == buckets
    assert bool((bucket.diff() >= 0).all())
    held, lower = tables[0].view(torch.float32), tables[1]
    codes = lower[bucket] + (points > held[bucket])
    assert torch.equal(codes.to(torch.uint8), codebook.nearest(points))


HARD_BLOCKS = {
    "zeros": [0.0] * 64,
    "negative zeros": [-0.0] * 64,
    "subnormal": [1e-39, -3e-40, 0.0, 5e-39] * 16,
    "largest subnormal": [math.nextafter(SMALLEST_NORMAL, 0), -1e-40] * 32,
    "smallest normal": [SMALLEST_NORMAL, -SMALLEST_NORMAL / 2] * 32,
    "subnormal beside normal": [SMALLEST_NORMAL * 3, 1e-40, -1e-40, 0.0] * 16,
    "one huge outlier": [1e30, *[1e-3, -1e-3, 1.0] * 21],
    "outlier and subnormal": [1e30, *[1e-40, -1e-40, 0.0] * 21],
    "largest float": [LARGEST, -LARGEST, LARGEST / 3, -LARGEST / 7] * 16,
    "reciprocal is subnormal": [2.0**127, -(2.0**126), 2.0**125.5, 2.0**-100] * 16,
    "signs of zero": [-0.0, 0.0, 1.0, -1.0] * 16,
    "mantissa of ones": [1.9999999, -1.7, 0.1, 0.9999999] * 16,
    "one number": [-7.0],
}


@pytest.mark.parametrize("block", HARD_BLOCKS.values(), ids=HARD_BLOCKS.keys())
@pytest.mark.parametrize("codebook", [NF4, NF4_UPPER, CLOSE], ids=lambda c: c.name)
def test_hard_blocks(codebook, block, device):
    numbers = torch.tensor(block, dtype=torch.float64).float()
    packed, scales = check_bits(numbers, codebook, 64, device)
    if float(numbers.abs().max()) < SMALLEST_NORMAL:
        zero = int(codebook.nearest(torch.zeros(1)))
        assert scales.tolist() == [0]
        assert packed.tolist() == [zero * 17] * 32


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_of_each_type(dtype, device):
    info = torch.finfo(dtype)
    block = [info.max, info.min, info.tiny, info.smallest_normal, info.eps, -0.0] * 16
    check_bits(torch.tensor(block, dtype=dtype), NF4, 32, device)
    subnormal = torch.tensor([info.smallest_normal / 2, 0, -info.smallest_normal / 4])
    check_bits(subnormal.to(dtype), NF4, 32, device)


@pytest.mark.parametrize("count", [1, 63, 65])
@pytest.mark.parametrize("codebook", [NF4, INT4, TIES_UPPER], ids=lambda c: c.name)
def test_odd_count_is_filled_with_the_code_of_zero(codebook, count, device):
    packed, _ = check_bits(normal(count), codebook, 64, device)
    assert int(packed[-1]) & 15 == int(codebook.nearest(torch.zeros(1)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_bad_blocks_are_not_finite(dtype, bad, device):
    numbers = normal(256, dtype)
    numbers[100] = bad
    with warnings.catch_warnings():
        # NumPy, which the interpreter computes with, warns of inf * 0.
        warnings.simplefilter("ignore", RuntimeWarning)
        packed, scales = quantize_blocks(numbers.to(device), NF4, 64)
    expected = quantize(numbers[:64], NF4, 64)
    assert scales.isfinite().tolist() == [True, False, True, True]
    assert torch.equal(packed[:32].cpu(), expected.packed)


def test_strided_and_unaligned(device):
    numbers = normal(301).to(device)
    for view in (numbers[::2], numbers[1:], numbers[3:100]):
        packed, scales = quantize_blocks(view, NF4, 64)
        expected = quantize(view.cpu(), NF4, 64)
        assert torch.equal(packed.cpu(), expected.packed)
        assert torch.equal(scales.cpu(), expected.scales)


def test_empty(device):
    packed, scales = quantize_blocks(torch.empty(0, device=device), NF4, 64)
    assert packed.shape == scales.shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("codebook", CODEBOOKS, ids=lambda codebook: codebook.name)
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096)])
def test_real_sizes(shape, codebook, device):
    seed = torch.seed() % 2**32
    print(f"seed {seed}")
    numbers = normal(math.prod(shape), torch.bfloat16, seed)
    packed, scales = check_bits(numbers, codebook, 64, device)
    again, scales_again = quantize_blocks(numbers.to(device), codebook, 64)
    assert torch.equal(again.cpu(), packed)
    assert torch.equal(scales_again.cpu(), scales)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_many_numbers(block_size, dtype, device):
    """Scales of 60 magnitudes: enough reciprocals to meet every way of rounding."""
    seed = torch.seed() % 2**32
    print(f"seed {seed}")
    count = 10_000_019
    spread = normal(-(-count // block_size), seed=seed + 1).mul(20)
    spread = spread.exp2().clamp(2.0**-20, 2.0**12).repeat_interleave(block_size)
    check_bits(
        (normal(count, seed=seed) * spread[:count]).to(dtype), NF4, block_size, device
    )


@pytest.mark.gpu
def test_every_magnitude_of_scale(device):
    """The reciprocal is rounded correctly for every exponent, mantissas at random."""
    exponents = torch.arange(-126, 128).repeat_interleave(4096)
    mantissas = 1 + torch.rand(
        len(exponents), generator=torch.Generator().manual_seed(0)
    )
    largest = (
        mantissas.clamp(max=1.9999999).double() * 2.0 ** exponents.double()
    ).float()
    blocks = normal(32 * len(largest)).view(-1, 32)
    blocks = (blocks / blocks.abs().amax(1, keepdim=True)).double() * largest[:, None]
    check_bits(blocks.float().view(-1), NF4, 32, device)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_number_at_every_place(dtype, bad, device):
    """No thread drops it; unlike a GPU, the interpreter could not."""
    numbers = torch.ones(256, 256, dtype=dtype)
    numbers.fill_diagonal_(bad)
    for block_size in BLOCK_SIZES:
        _, scales = quantize_blocks(numbers.view(-1).to(device), NF4, block_size)
        expected = (~numbers.isfinite()).view(-1, block_size).any(1)
        assert torch.equal(~scales.isfinite().cpu(), expected)


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_2_to_the_31_numbers(device):
    count = 2**31 + 65
    pattern = normal(1_000_003, torch.bfloat16).to(device)
    numbers = torch.empty(count, dtype=torch.bfloat16, device=device)
    whole = count - count % len(pattern)
    numbers[:whole].view(-1, len(pattern)).copy_(pattern)
    numbers[whole:] = pattern[: count - whole]
    numbers[2**31 + 3] = 100
    packed, scales = quantize_blocks(numbers, NF4, 64)
    assert len(packed) == 2**30 + 33 and len(scales) == 2**25 + 2
    for start in (0, 2**30, 2**31 - 2**20, 2**31 - 64, 2**31):
        stop = min(start + 2**20, count)
        expected = quantize(numbers[start:stop].cpu(), NF4, 64)
        part = packed[start // 2 : -(-stop // 2)]
        assert torch.equal(part.cpu(), expected.packed)
        part = scales[start // 64 : -(-stop // 64)]
        assert torch.equal(part.cpu(), expected.scales)
    assert float(scales[2**25]) == 100
