"""Codebooks: the values that codes stand for.

A code is a small integer; a codebook is the sorted table that gives it a value in
[-1, 1]. Everything that distinguishes one 4-bit data type from another is in this
table and in the rule for ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

# Up to this many boundaries, comparing with each in turn is faster than searching.
MAX_COMPARISONS = 32


class Codebook:
    """A sorted table of at most 256 values in [-1, 1], and the rule for the nearest.

    The code of a normalized number ``x`` is the number of boundaries below it, where
    the boundaries are the midpoints of neighboring values, computed in float32:

    ``boundaries[i] = (values[i] + values[i + 1]) / 2``

    Args:
        name: What the data type is called, such as ``"nf4"``.
        values: The numbers that the codes 0, 1, 2, ... stand for, in ascending order.
            They are rounded to float32.
        ties: Where a number exactly on a boundary goes: to the ``"lower"`` code (the
            rule of bitsandbytes) or to the ``"upper"`` one.

    Attributes:
        values: float32 ``[entries]``, ascending, on the CPU.
        boundaries: float32 ``[entries - 1]``, ascending, on the CPU.
        bits: The width of a code, ``ceil(log2(entries))``.

    Raises:
        ValueError: If ``values`` has fewer than 2 or more than 256 entries, is not
            strictly ascending in float32, holds NaN or a number outside [-1, 1], or if
            ``ties`` is neither ``"lower"`` nor ``"upper"``.
    """

    def __init__(
        self,
        name: str,
        values: Sequence[float] | Tensor,
        ties: Literal["lower", "upper"] = "lower",
    ) -> None:
        table = torch.as_tensor(values, dtype=torch.float32, device="cpu")
        table = table.detach().clone()
        _check_values(table)
        if ties not in ("lower", "upper"):
            raise ValueError(f"ties must be 'lower' or 'upper', got {ties!r}")
        self.name = name
        self.values = table
        self.boundaries = (table[:-1] + table[1:]) / 2
        self.bits = (len(table) - 1).bit_length()
        self.ties = ties
        # Made in inference mode, they could not be saved for a later backward pass.
        with torch.inference_mode(False):
            unused = table.new_zeros(2**self.bits - len(table))
            self._tables = {table.device: torch.cat([table, unused])}

    def nearest(self, normalized: Tensor) -> Tensor:
        """Return the code of the value nearest to each number.

        Args:
            normalized: float32 tensor of any shape, without NaN.

        Returns:
            uint8 tensor of the same shape and device.
        """
        if len(self.boundaries) > MAX_COMPARISONS:
            boundaries = self.boundaries.to(normalized.device)
            right = self.ties == "upper"
            return torch.bucketize(
                normalized, boundaries, out_int32=True, right=right
            ).to(torch.uint8)
        is_above = torch.gt if self.ties == "lower" else torch.ge
        codes = torch.zeros_like(normalized, dtype=torch.uint8)
        for boundary in self.boundaries.tolist():
            codes += is_above(normalized, boundary)
        return codes

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the float32 value of each code, in the shape of ``codes``."""
        return lookup(self.table(codes.device)[: len(self)], codes)

    def table(self, device: torch.device) -> Tensor:
        """The values on a device: float32 ``[2**bits]``, zeros after the last value.

        The copy is made at the first call for a device and shared from then on, so the
        first call must not be part of a CUDA graph's capture.
        """
        table = self._tables.get(device)
        if table is None:
            # Only a plain tensor may outlive this call: not one of inference mode, nor
            # a fake one of a tracer, nor one that torch.func has wrapped.
            with torch.inference_mode(False):
                table = self._tables[torch.device("cpu")].to(device)
            if (
                type(table) is Tensor
                and not torch._C._are_functorch_transforms_active()
            ):
                self._tables[device] = table
        return table

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"Codebook({self.name!r}, {len(self)} values, {self.bits} bits)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Codebook):
            return NotImplemented
        return self.ties == other.ties and torch.equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash((self.ties, tuple(self.values.tolist())))

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the tables, since their devices may be missing where it is read.
        return Codebook, (self.name, self.values, self.ties)


def lookup(values: Tensor, codes: Tensor) -> Tensor:
    """``values[codes]``, in the shape of ``codes``, which are uint8."""
    # int32 indexes: uint8 ones would be read as a mask.
    return values.index_select(0, codes.reshape(-1).int()).view(codes.shape)


def integer(bits: int) -> Codebook:
    """Evenly spaced values, symmetric around zero, as an integer data type has them.

    ``values = k / (2**(bits - 1) - 1)`` for ``k = -(2**(bits - 1) - 1), ..., 2**(bits -
    1) - 1``

    The most negative integer has no positive partner and is left out, so there are
    ``2**bits - 1`` values: -1, 0 and 1 are always among them.

    Raises:
        ValueError: If ``bits`` is not in 2..8.
    """
    _check_bits(bits)
    largest = 2 ** (bits - 1) - 1
    steps = torch.arange(-largest, largest + 1, dtype=torch.float32)
    return Codebook(f"int{bits}", steps / largest)


def floating_point(exponent_bits: int, mantissa_bits: int) -> Codebook:
    """The values of a small float with a sign bit, divided by the largest of them.

    With exponent field ``e`` and mantissa field ``m``, normal numbers are
    ``2**(e - 1) * (1 + m / 2**mantissa_bits)`` for ``e >= 1`` and subnormal ones are
    ``m / 2**mantissa_bits`` for ``e = 0``. No code is spent on infinity or NaN. Plus
    and minus zero are one value, so there are ``2**bits - 1`` values.

    FP4 of the paper's Table 2: E2M1 is ``floating_point(2, 1)``, E3M0 is
    ``floating_point(3, 0)``.

    Raises:
        ValueError: If ``exponent_bits`` is no integer from 1 up, ``mantissa_bits`` is
            none from 0 up, or the sign and both fields together exceed 8 bits.
    """
    _check_field("exponent_bits", exponent_bits, smallest=1)
    _check_field("mantissa_bits", mantissa_bits, smallest=0)
    bits = 1 + exponent_bits + mantissa_bits
    if bits > 8:
        raise ValueError(
            "exponent_bits and mantissa_bits must be at most 7 together, beside the "
            f"sign, got {exponent_bits} and {mantissa_bits}"
        )
    fractions = torch.arange(2**mantissa_bits, dtype=torch.float32) / 2**mantissa_bits
    exponents = torch.arange(2**exponent_bits - 1, dtype=torch.float32)
    normal = 2.0 ** exponents[:, None] * (1 + fractions)
    positive = torch.cat([fractions, normal.flatten()])
    values = torch.cat([-positive[1:].flip(0), positive])
    return Codebook(f"fp{bits}_e{exponent_bits}m{mantissa_bits}", values / values[-1])


def normal_float(bits: int) -> Codebook:
    """NormalFloat: quantiles of the standard normal, and an exact zero.

    Equation 4 of the paper (section 3) averages neighboring quantiles,
    ``(Q(i / (n + 1)) + Q((i + 1) / (n + 1))) / 2`` with ``n = 2**bits``; read literally
    the first and the last of them are infinite. The construction in use, which this
    function follows, stops short of the ends:

    1. ``p_max = 1 - (1 / (2 n) + 1 / (2 (n - 1))) / 2`` with ``n = 2**bits``,
       rounded to 7 digits (0.9677083 for 4 bits);
    2. positive half: the normal quantiles of ``n/2 + 1`` evenly spaced probabilities
       from ``p_max`` down to 1/2, without the last;
    3. negative half: minus the quantiles of ``n/2`` such probabilities, without the
       last;
    4. zero between them, and everything divided by the largest value.

    The halves have ``n/2`` and ``n/2 - 1`` values: the zero that both would contain is
    spent once, which leaves one value more for the positive side.

    The steps are computed in the precision that reproduces the table of bitsandbytes
    bit for bit at 4 bits: probabilities in float32, quantiles in float64, division in
    float32.

    Raises:
        ValueError: If ``bits`` is not in 2..8.
    """
    _check_bits(bits)
    n = 2**bits
    p_max = round(1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2, 7)

    def half(count: int) -> Tensor:
        grid = torch.linspace(p_max, 0.5, count + 1, dtype=torch.float32)
        quantiles: Tensor = torch.special.ndtri(grid[:-1].double())
        return quantiles.float()

    negative, positive = -half(n // 2 - 1), half(n // 2).flip(0)
    values = torch.cat([negative, negative.new_zeros(1), positive])
    return Codebook(f"nf{bits}", values / values[-1])


def dynamic(bits: int = 8, signed: bool = True) -> Codebook:
    """The dynamic map: few fraction bits for small numbers, many for large ones.

    For ``i = 0, ..., bits - 2`` the values are plus and minus ``10**(i - (bits - 2))``
    times the midpoints of ``2**i`` equal intervals of [0.1, 1]; 0 and 1 complete the
    table. With 8 bits it spans seven decades, which is why quantization constants are
    stored in it (Dettmers et al., 8-bit Optimizers via Block-wise Quantization, section
    1.3).

    Without a sign there are the positive values alone, at the midpoints of ``2**(i +
    1)`` intervals: numbers that cannot be negative, as the second moment of Adam,
    have the bit of the sign for a fraction twice as fine (section 2.2).

    It is computed in float32 as in bitsandbytes, so that on one machine both have the
    same table; processors differ in its last bits.

    Args:
        bits: The width of a code. There are ``2**bits`` values.
        signed: Whether there are negative values. The name tells the map without them:
            ``"dynamic8_unsigned"``.

    Raises:
        ValueError: If ``bits`` is not in 2..8.
    """
    _check_bits(bits)
    parts = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for i in range(bits - 1):
        intervals = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1, intervals + 1, dtype=torch.float32)
        decade = 10 ** (i - (bits - 2)) * ((edges[:-1] + edges[1:]) / 2)
        parts += [decade, -decade] if signed else [decade]
    name = f"dynamic{bits}" if signed else f"dynamic{bits}_unsigned"
    return Codebook(name, torch.cat(parts).sort().values)


def _check_bits(bits: int) -> None:
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}")


def _check_field(name: str, width: int, smallest: int) -> None:
    if not isinstance(width, int) or width < smallest:
        raise ValueError(
            f"{name} must be an integer of at least {smallest}, got {width!r}"
        )


def _check_values(table: Tensor) -> None:
    if table.dim() != 1 or not 2 <= len(table) <= 256:
        raise ValueError(
            "values must be a sequence of 2 to 256 numbers, got shape "
            f"{tuple(table.shape)}"
        )
    is_inside = table.abs() <= 1
    if not bool(is_inside.all()):
        where = int((~is_inside).nonzero()[0])
        raise ValueError(
            "values must be finite and lie in [-1, 1], where normalized numbers lie, "
            f"got {float(table[where])!r} at index {where}: divide them by the largest "
            "magnitude"
        )
    steps = table[1:] - table[:-1]
    if bool((steps <= 0).any()):
        where = int((steps <= 0).nonzero()[0])
        raise ValueError(
            "values must be strictly ascending in float32, got "
            f"{float(table[where])!r} followed by {float(table[where + 1])!r} at index "
            f"{where}: sort them and remove duplicates"
        )


TOY = Codebook("toy", (-1.0, 0.3, 0.5, 1.0), ties="upper")
INT4 = integer(4)
FP4 = floating_point(2, 1)
FP4_E3M0 = floating_point(3, 0)
# bitsandbytes' FP4 is E2M1 with its one subnormal moved from 1/12 to 1/192.
FP4_BITSANDBYTES = Codebook(
    "fp4_bitsandbytes",
    [
        sign * m / 12
        for sign, ms in (
            (-1, (12, 8, 6, 4, 3, 2, 0.0625)),
            (1, (0, 0.0625, 2, 3, 4, 6, 8, 12)),
        )
        for m in ms
    ],
)
NF4 = normal_float(4)
DYNAMIC8 = dynamic(8)
DYNAMIC8_UNSIGNED = dynamic(8, signed=False)
