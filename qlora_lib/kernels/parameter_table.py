"""What the kernel of the optimizer looks its work up in, and how state is laid out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from qlora_lib.numerics import DYNAMIC8, Codebook, dynamic

# Numbers that one program updates. Each parameter's state begins with a program.
PROGRAM = 2048
# Of 8-bit state: how many numbers of a moment share a scale; a divisor of PROGRAM.
STATE_BLOCK_SIZE = 256


def _never_to_zero(codebook: Codebook) -> Codebook:
    """Give numbers above zero the smallest value above zero at least.

    The codebook has no negative values. A second moment that was rounded to zero would
    make its parameter jump: it is what the first moment is divided by.
    """
    codebook.boundaries[0] = 0.0
    return codebook


# Of 8-bit state. The first moment has both signs, the second none.
STATE_CODEBOOKS = {
    "exp_avg": DYNAMIC8,
    "exp_avg_sq": _never_to_zero(dynamic(8, signed=False)),
}


class ParameterTable(NamedTuple):
    """Where programs look up what they work on, in tensors on the GPU.

    Attributes:
        parameter_of: int32 ``[pages * page_size / PROGRAM]``, the parameter of each
            program of all pages; -1 where a page's end is unused.
        first_program: int64 ``[parameters]``, the program that each begins with.
        counts: int64 ``[parameters]``, how many numbers each has.
        addresses: int64 ``[2, parameters]``, of the first number of each parameter and
            of its gradient, both contiguous; 0 for a gradient that is missing.
        factors: float64 ``[7, parameters]``, in the order of
            :class:`qlora_lib.optim.update.Factors`.
    """

    parameter_of: Tensor
    first_program: Tensor
    counts: Tensor
    addresses: Tensor
    factors: Tensor
