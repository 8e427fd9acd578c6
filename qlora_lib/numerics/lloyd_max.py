"""The codebook with the least squared error for normal weights in blocks.

NormalFloat spreads its values by probability; Lloyd and Max ask instead for the least
mean squared error. What a codebook sees is not the normal distribution itself but
normal numbers divided by the largest magnitude of their block, so that is the density
to optimize for (Yoshida, NF4 Isn't Information Theoretically Optimal, arXiv
2306.06965).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qlora_lib.numerics.codebooks import Codebook, _check_bits

CELLS = 4096
MAX_ITERATIONS = 20_000


def lloyd_max(bits: int, block_size: int = 64) -> Codebook:
    """Return the ``2**bits`` values of least mean squared error for normal blocks.

    With ``u = x / m`` a number divided by the largest magnitude ``m`` of its block,
    Lloyd's iteration alternates between the two conditions of an optimum until the
    values stop moving:

    - a boundary lies midway between its two values;
    - a value is the mean of ``u`` between its boundaries, weighted by the squared error
      that a miss costs after multiplying back, ``E[m**2 | u] p(u)``.

    The end values lie inside (-1, 1), so unlike NF4 this codebook does not represent a
    block's largest number exactly. For even counts it has no exact zero either.

    Args:
        bits: Width of a code, 2 to 8.
        block_size: Number of normal variables that share one scale, at least 2.

    Raises:
        ValueError: If ``bits`` is not in 2..8 or ``block_size`` is below 2.
    """
    _check_bits(bits)
    if not isinstance(block_size, int) or block_size < 2:
        raise ValueError(
            f"block_size must be an integer of at least 2, got {block_size!r}"
        )
    weight = _weighted_density(block_size)
    edges = torch.linspace(-1, 1, CELLS + 1, dtype=torch.float64)
    centers = (edges[:-1] + edges[1:]) / 2
    mass_below = _cumulative(weight)
    moment_below = _cumulative(weight * centers)
    end_mass, end_moment = mass_below[-1], moment_below[-1]

    values = _starting_values(weight, edges, 2**bits)
    for _ in range(MAX_ITERATIONS):
        boundaries = (values[:-1] + values[1:]) / 2
        masses = _between(mass_below, boundaries, end_mass)
        moments = _between(moment_below, boundaries, end_moment)
        updated = moments / masses
        if torch.allclose(updated, values, rtol=0, atol=1e-8):
            break
        values = updated
    return Codebook(f"lloyd_max{bits}", values)


def _weighted_density(block_size: int) -> Tensor:
    """Integral of ``E[m**2 | u] p(u)`` over each of ``CELLS`` equal cells of [-1, 1].

    The largest magnitude of ``n`` standard normals has the density
    ``n (2 Phi(m) - 1)**(n - 1) 2 phi(m)``; given ``m``, the other ``n - 1`` are normals
    truncated to [-m, m], and the largest itself sits at ``u = -1`` or ``u = 1``.
    """
    n = block_size
    m = torch.linspace(1e-3, 9, 2000, dtype=torch.float64)
    phi = torch.exp(-(m**2) / 2) / math.sqrt(2 * math.pi)
    inside = torch.erf(m / math.sqrt(2))
    density_of_m = n * inside ** (n - 1) * 2 * phi
    step = m[1] - m[0]
    cost = density_of_m * m**2 * step

    edges = torch.linspace(-1, 1, CELLS + 1, dtype=torch.float64)
    below = torch.erf(edges[:, None] * m / math.sqrt(2)) / (2 * inside)
    weight = (below[1:] - below[:-1]) @ cost * (n - 1) / n
    weight[[0, -1]] += cost.sum() / n / 2
    return weight


def _starting_values(weight: Tensor, edges: Tensor, count: int) -> Tensor:
    """Values as dense as the cube root of the weight (Panter and Dite, 1951).

    That is the optimum for many values, so the iteration starts close to its end.
    """
    below = _cumulative(weight ** (1 / 3))
    targets = (torch.arange(count, dtype=torch.float64) + 0.5) / count * below[-1]
    cell = torch.searchsorted(below, targets) - 1
    position = (targets - below[cell]) / (below[cell + 1] - below[cell])
    return edges[cell] + position * (edges[1] - edges[0])


def _cumulative(weight: Tensor) -> Tensor:
    return torch.cat([weight.new_zeros(1), weight.cumsum(0)])


def _between(below: Tensor, boundaries: Tensor, total: Tensor) -> Tensor:
    """Differences of a cumulative table at ``boundaries``, linear within a cell."""
    position = (boundaries + 1) / 2 * CELLS
    cell = position.long().clamp(max=CELLS - 1)
    at = below[cell] + (position - cell) * (below[cell + 1] - below[cell])
    return torch.diff(at, prepend=at.new_zeros(1), append=total[None])
