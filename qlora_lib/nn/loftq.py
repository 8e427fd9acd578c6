"""LoftQ: an adapter that starts at what quantization has rounded away."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_lib.kernels.ops import dequantize, quantize
from qlora_lib.numerics import Codebook, QuantizedTensor


@torch.no_grad()
def loftq_split(
    weight: Tensor,
    codebook: Codebook,
    block_size: int | None,
    double_quant: bool,
    rank: int,
    scaling: float,
    iterations: int = 1,
) -> tuple[QuantizedTensor, Tensor, Tensor]:
    """Split a weight in a quantized one and a low-rank correction.

    ``W ~ Q + scaling * B A``, the two found in turn (LoftQ, arXiv 2310.08659,
    algorithm 1): ``Q = quantize(W - scaling * B A)``, beginning with ``B A = 0``, and
    ``scaling * B A``, the best approximation of ``W - Q`` of this rank, by its singular
    value decomposition. After one iteration ``Q`` is plainly ``quantize(W)``.

    Args:
        weight: float ``[out_features, in_features]``.
        codebook: As for :func:`qlora_lib.quantize`.
        block_size: Likewise.
        double_quant: Likewise.
        rank: Rank of the correction, at most the smaller dimension of ``weight``.
        scaling: The factor that the adapter is applied with.
        iterations: How often both are found.

    Returns:
        ``Q``, ``A`` float32 ``[rank, in_features]`` and ``B`` float32
        ``[out_features, rank]``.

    Raises:
        ValueError: If ``rank`` is not between 1 and the smaller dimension, ``scaling``
            is not above 0, or ``iterations`` is below 1.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(
            f"rank must be between 1 and {min(weight.shape)}, the smaller dimension of "
            f"weight, got {rank}"
        )
    if not scaling > 0:
        raise ValueError(
            f"scaling must be above 0, got {scaling}: the correction is divided by it"
        )
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    dense = weight.float()
    correction = torch.zeros_like(dense)
    for _ in range(iterations):
        # The first Q has the bits of one that is quantized from the weight itself.
        q = quantize(dense - correction, codebook, block_size, double_quant)
        rest = dense - dequantize(q, torch.float32)
        u, s, vh = torch.linalg.svd(rest, full_matrices=False)
        root = (s[:rank] / scaling).sqrt()
        a, b = root[:, None] * vh[:rank], u[:, :rank] * root
        correction = scaling * b @ a
    return q, a, b
