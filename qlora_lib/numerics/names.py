"""Codebooks by their names, as files and command lines give them."""

from __future__ import annotations

from functools import cache

from qlora_lib.numerics.codebooks import (
    DYNAMIC8,
    FP4,
    FP4_BITSANDBYTES,
    FP4_E3M0,
    INT4,
    NF4,
    TOY,
    Codebook,
    dynamic,
    integer,
    normal_float,
)

CONSTANTS = {
    codebook.name: codebook
    for codebook in (TOY, INT4, FP4, FP4_E3M0, FP4_BITSANDBYTES, NF4, DYNAMIC8)
}
FAMILIES = {"nf": normal_float, "int": integer, "dynamic": dynamic}
NAMES = sorted(
    CONSTANTS.keys()
    | {f"{family}{bits}" for family in FAMILIES for bits in range(2, 9)}
)


@cache
def codebook_by_name(name: str) -> Codebook:
    """Return the codebook whose ``name`` this is.

    Known are the constants of this package, and ``nf2`` to ``nf8``, ``int2`` to
    ``int8`` and ``dynamic2`` to ``dynamic8``. The same object is returned for the same
    name, so that all layers of a model share one table on each device.

    Raises:
        ValueError: If no codebook has that name.
    """
    if name in CONSTANTS:
        return CONSTANTS[name]
    if name not in NAMES:
        raise ValueError(
            f"codebook must be the name of a known one, got {name!r}: use one of "
            f"{', '.join(NAMES)}"
        )
    return FAMILIES[name[:-1]](int(name[-1]))
