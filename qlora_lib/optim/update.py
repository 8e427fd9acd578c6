"""One step of AdamW on a run of numbers, in plain PyTorch.

This is the reference on every device, and what runs where there is no kernel. On the
CPU it rounds as ``torch.optim.AdamW(foreach=False)`` does, operation by operation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from qlora_lib.kernels.parameter_table import STATE_BLOCK_SIZE
from qlora_lib.numerics.blockwise import (
    absmax_scales,
    dequantize_blockwise,
    quantize_blockwise,
)
from qlora_lib.numerics.codebooks import Codebook


class Factors(NamedTuple):
    """What the numbers of a step are multiplied with, in float64.

    Attributes:
        decay: ``1 - lr * weight_decay``.
        beta1_complement: ``1 - beta1``.
        beta2: ``beta2``.
        beta2_complement: ``1 - beta2``.
        root_correction: ``sqrt(1 - beta2**step)``.
        eps: ``eps``.
        step_size: ``lr / (1 - beta1**step)``.
    """

    decay: float
    beta1_complement: float
    beta2: float
    beta2_complement: float
    root_correction: float
    eps: float
    step_size: float

    @classmethod
    def of_step(
        cls,
        step: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> Factors:
        """Return the factors of the step with that number, the first being 1."""
        beta1, beta2 = betas
        return cls(
            decay=1 - lr * weight_decay,
            beta1_complement=1 - beta1,
            beta2=beta2,
            beta2_complement=1 - beta2,
            root_correction=math.sqrt(1 - beta2**step),
            eps=eps,
            step_size=lr / (1 - beta1**step),
        )


class Codes(NamedTuple):
    """A moment in 8 bits.

    Attributes:
        codes: uint8 ``[count]``.
        scales: float32 ``[ceil(count / 256)]``.
        codebook: The values that the codes stand for.
    """

    codes: Tensor
    scales: Tensor
    codebook: Codebook

    def dequantize(self) -> Tensor:
        """Return the moment as float32 ``[count]``."""
        values = self.codebook.table(self.codes.device)
        return dequantize_blockwise(self.codes, self.scales, values, STATE_BLOCK_SIZE)

    def store(self, moment: Tensor) -> None:
        """Quantize float32 ``[count]``; a block with NaN becomes NaN as a whole."""
        self.scales.copy_(absmax_scales(moment, STATE_BLOCK_SIZE))
        self.codes.copy_(
            quantize_blockwise(moment, self.scales, self.codebook, STATE_BLOCK_SIZE)
        )


def update_32bit(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    factors: Factors,
) -> None:
    """Update a parameter and both moments in place (Loshchilov and Hutter, alg. 2).

    ::

        p = p (1 - lr weight_decay)
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Args:
        parameter: float32, bfloat16 or float16 ``[count]``. Everything is computed in
            float32, and the parameter rounded once.
        gradient: Of the same type and shape.
        exp_avg: float32 ``[count]``, the first moment ``m``.
        exp_avg_sq: float32 ``[count]``, the second moment ``v``.
        factors: Of this step.
    """
    exact, slope = parameter.float(), gradient.float()
    exact.mul_(factors.decay)
    exp_avg.lerp_(slope, factors.beta1_complement)
    exp_avg_sq.mul_(factors.beta2)
    exp_avg_sq.addcmul_(slope, slope, value=factors.beta2_complement)
    denominator = (exp_avg_sq.sqrt() / factors.root_correction).add_(factors.eps)
    exact.addcdiv_(exp_avg, denominator, value=-factors.step_size)
    if exact is not parameter:
        parameter.copy_(exact)


def update_8bit(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Codes,
    exp_avg_sq: Codes,
    factors: Factors,
) -> None:
    """Update as :func:`update_32bit` does, with moments that rest in 8 bits.

    The moments are dequantized, updated, used in float32, and quantized again (Dettmers
    et al., 8-bit Optimizers via Block-wise Quantization, section 2).
    """
    moments = exp_avg.dequantize(), exp_avg_sq.dequantize()
    update_32bit(parameter, gradient, *moments, factors)
    exp_avg.store(moments[0])
    exp_avg_sq.store(moments[1])
