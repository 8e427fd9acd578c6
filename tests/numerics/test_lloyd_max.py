"""Lloyd-Max codebooks: the conditions of an optimum, and the error they lead to."""

import math

import pytest
import torch
from torch import Tensor

from qlora_lib.numerics import NF4, Codebook, lloyd_max, quantize

BLOCK_SIZE = 64


@pytest.fixture(scope="module")
def blocks() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2**15, BLOCK_SIZE, generator=generator)


@pytest.fixture(scope="module")
def codebook() -> Codebook:
    return lloyd_max(4, BLOCK_SIZE)


@pytest.fixture(scope="module")
def sorted_sample(blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized numbers in order; running sums of weights and of weighted values."""
    absmax = blocks.abs().amax(1, keepdim=True)
    normalized, order = (blocks / absmax).double().flatten().sort()
    weight = (absmax**2).double().expand_as(blocks).flatten()[order]
    zero = torch.zeros(1, dtype=torch.float64)
    mass = torch.cat([zero, weight.cumsum(0)])
    moment = torch.cat([zero, (weight * normalized).cumsum(0)])
    return normalized, mass, moment


def centroids(values: Tensor, sample: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The weighted mean of the numbers that are nearest to each value."""
    normalized, mass, moment = sample
    cuts = torch.searchsorted(normalized, (values[:-1] + values[1:]) / 2)
    cuts = torch.cat([torch.zeros(1).long(), cuts, torch.tensor([len(normalized)])])
    return moment[cuts].diff() / mass[cuts].diff()


def test_each_value_is_the_centroid_of_its_numbers(codebook, sorted_sample):
    values = codebook.values.double()
    # The rarest code is used by about 20,000 numbers, so a mean is known to about 3e-4.
    torch.testing.assert_close(
        values, centroids(values, sorted_sample), rtol=0, atol=1e-3
    )
    nf4 = NF4.values.double()
    assert float((nf4 - centroids(nf4, sorted_sample)).abs().max()) > 6e-3


def test_each_boundary_is_midway(codebook):
    midpoints = (codebook.values[:-1] + codebook.values[1:]) / 2
    assert torch.equal(codebook.boundaries, midpoints)


def test_lloyds_iteration_on_a_sample_ends_at_the_same_values(codebook, sorted_sample):
    values = NF4.values.double()
    for _ in range(1500):
        values = centroids(values, sorted_sample)
    torch.testing.assert_close(values, codebook.values.double(), rtol=0, atol=4e-3)


def test_less_error_than_nf4_for_normal_blocks(codebook, blocks):
    def rmse(codebook: Codebook) -> float:
        error = quantize(blocks, codebook, BLOCK_SIZE).dequantize() - blocks
        return math.sqrt(error.square().mean())

    assert 0.03 < 1 - rmse(codebook) / rmse(NF4) < 0.06


def test_other_blocks_have_other_values(codebook):
    assert float(lloyd_max(4, 16).values[-1]) > float(codebook.values[-1]) + 0.01


# The more values, the slower the iteration: 8 bits show that it gets to its end.
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths(bits):
    values = lloyd_max(bits).values
    assert len(values) == 2**bits
    assert 0.5 < float(values[-1]) < 1
    torch.testing.assert_close(values, -values.flip(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("block_size", [1, 0, -64, 64.0, "64"])
def test_bad_block_size(block_size):
    with pytest.raises(
        ValueError, match=f"block_size must be .* at least 2, got {block_size!r}"
    ):
        lloyd_max(4, block_size)
