"""The bytes of a page, read as Adam's moments.

A page is a record of arrays, one after the other: the moments themselves, or their
codes and the scales of those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_lib.kernels.parameter_table import (
    PROGRAM,
    STATE_BLOCK_SIZE,
    STATE_CODEBOOKS,
)
from qlora_lib.optim.layout import Layout, Segment
from qlora_lib.optim.update import (
    Codes,
    Factors,
    update_8bit,
    update_32bit,
)


class Field(NamedTuple):
    """An array of a page.

    Attributes:
        dtype: Type of its entries.
        numbers: How many numbers of a moment share an entry.
    """

    dtype: torch.dtype
    numbers: int

    def length(self, count: int) -> int:
        """Entries for so many numbers."""
        return -(-count // self.numbers)


# By the number of bits, the arrays of a page in their order, under the names that they
# have in a state dict. Those of 32 bits are torch's own.
FIELDS = {
    32: {
        "exp_avg": Field(torch.float32, 1),
        "exp_avg_sq": Field(torch.float32, 1),
    },
    8: {
        "exp_avg_codes": Field(torch.uint8, 1),
        "exp_avg_sq_codes": Field(torch.uint8, 1),
        "exp_avg_scales": Field(torch.float32, STATE_BLOCK_SIZE),
        "exp_avg_sq_scales": Field(torch.float32, STATE_BLOCK_SIZE),
    },
}


def state_bytes(count: int, state_bits: int) -> int:
    """Return the bytes of the state of so many numbers, whole programs."""
    programs = -(-count // PROGRAM)
    return sum(
        field.length(programs * PROGRAM) * field.dtype.itemsize
        for field in FIELDS[state_bits].values()
    )


def fields_of(page: Tensor, page_size: int, state_bits: int) -> dict[str, Tensor]:
    """View a page's bytes as its arrays."""
    arrays, start = {}, 0
    for name, field in FIELDS[state_bits].items():
        end = start + field.length(page_size) * field.dtype.itemsize
        arrays[name] = page[start:end].view(field.dtype)
        start = end
    return arrays


def slices_of(
    arrays: Mapping[str, Tensor], segment: Segment, state_bits: int
) -> dict[str, Tensor]:
    """View the part of a page's arrays that belongs to a segment."""
    slices = {}
    for name, field in FIELDS[state_bits].items():
        first = segment.place // field.numbers
        slices[name] = arrays[name][first : first + field.length(segment.length)]
    return slices


def update_segment(
    state: Mapping[str, Tensor], parameter: Tensor, gradient: Tensor, factors: Factors
) -> None:
    """Update the numbers of one segment, which are flat, and their state in place."""
    if "exp_avg" in state:
        update_32bit(
            parameter, gradient, state["exp_avg"], state["exp_avg_sq"], factors
        )
    else:
        moments = [_codes(state, name) for name in STATE_CODEBOOKS]
        update_8bit(parameter, gradient, moments[0], moments[1], factors)


def read_state(
    pages: Tensor, layout: Layout, parameter: int, shape: torch.Size, state_bits: int
) -> dict[str, Tensor]:
    """Copy the state of one parameter out of pages ``[page_count, page_bytes]``.

    Returns:
        The arrays by name: moments and codes in the parameter's shape, scales flat.
    """
    parts = [
        slices_of(
            fields_of(pages[page], layout.page_size, state_bits), segment, state_bits
        )
        for page, segment in layout.segments_of(parameter)
    ]
    state = {}
    for name, field in FIELDS[state_bits].items():
        empty = torch.empty(0, dtype=field.dtype)
        joined = torch.cat([empty, *(part[name] for part in parts)])
        state[name] = joined.view(shape) if field.numbers == 1 else joined
    return state


def write_state(
    pages: Tensor,
    layout: Layout,
    parameter: int,
    state: Mapping[str, Tensor],
    state_bits: int,
) -> None:
    """Copy the state of one parameter into pages ``[page_count, page_bytes]``."""
    for page, segment in layout.segments_of(parameter):
        arrays = fields_of(pages[page], layout.page_size, state_bits)
        for name, target in slices_of(arrays, segment, state_bits).items():
            first = segment.begin // FIELDS[state_bits][name].numbers
            target.copy_(state[name].reshape(-1)[first : first + len(target)])


def dequantized(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the moments of a parameter's 8-bit state in float32."""
    return {
        name: _codes(state, name).dequantize().view(state[f"{name}_codes"].shape)
        for name in STATE_CODEBOOKS
    }


def _codes(state: Mapping[str, Tensor], name: str) -> Codes:
    codes, scales = state[f"{name}_codes"], state[f"{name}_scales"]
    return Codes(codes.view(-1), scales, STATE_CODEBOOKS[name])
