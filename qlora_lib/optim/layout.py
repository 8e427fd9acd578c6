"""Where the state of each parameter lies: its place in a line of pages.

State is cut twice. Programs of a kernel work on ``PROGRAM`` numbers each, so every
parameter begins with a program of its own; pages are what moves, and hold the same
number of programs each. A parameter may begin in one page and end in another, and a
page may hold many parameters, which then have one data type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_lib.kernels.parameter_table import PROGRAM


class Segment(NamedTuple):
    """A run of numbers of one parameter within one page.

    Attributes:
        parameter: Index of the parameter.
        begin: First of the parameter's numbers, flattened.
        length: How many numbers.
        place: Where their state begins in the page, in numbers.
    """

    parameter: int
    begin: int
    length: int
    place: int


class Layout:
    """The pages of a list of parameters.

    Args:
        counts: Numbers of each parameter.
        dtypes: Its data type. Parameters of one type lie together, in their order.
        largest_page: Numbers that a page may hold of each moment, a multiple of
            ``PROGRAM``.

    Attributes:
        page_size: Numbers that a page holds of each moment: ``largest_page``, or less
            if the parameters are fewer.
        page_count: Pages in all.
        pages_of: For each parameter, the range of pages that it touches.
        first_programs: For each parameter, the program that it begins with, counted
            from the first page on.
    """

    def __init__(
        self, counts: Sequence[int], dtypes: Sequence[torch.dtype], largest_page: int
    ) -> None:
        programs = [-(-count // PROGRAM) for count in counts]
        kinds = list(dict.fromkeys(dtypes))
        most = max(
            (
                sum(n for n, each in zip(programs, dtypes, strict=True) if each == kind)
                for kind in kinds
            ),
            default=0,  # a group may have no parameters
        )
        per_page = max(1, min(most, largest_page // PROGRAM))
        self.page_size = per_page * PROGRAM
        self.first_programs = [0] * len(counts)
        self.pages_of = [range(0)] * len(counts)
        program = 0
        for kind in kinds:
            program = -(-program // per_page) * per_page  # a type begins a page
            for index, dtype in enumerate(dtypes):
                if dtype == kind:
                    self.first_programs[index] = program
                    program += programs[index]
                    end = -(-program // per_page) if programs[index] else 0
                    first = self.first_programs[index] // per_page
                    self.pages_of[index] = range(first, end)
        self.page_count = max(1, -(-program // per_page))
        self._programs = programs
        self._segments: list[list[Segment]] = [[] for _ in range(self.page_count)]
        self._places: list[list[tuple[int, Segment]]] = [[] for _ in counts]
        for index in sorted(range(len(counts)), key=self.first_programs.__getitem__):
            self._cut(index, counts[index])

    def segments(self, page: int) -> list[Segment]:
        """Return the runs of numbers whose state lies in a page, in its order."""
        return self._segments[page]

    def segments_of(self, parameter: int) -> list[tuple[int, Segment]]:
        """Return the pages and segments of one parameter, from its first number on."""
        return self._places[parameter]

    def parameter_of_programs(self) -> Tensor:
        """Return the parameter of each program, -1 where it has none.

        Returns:
            int32 ``[page_count * page_size / PROGRAM]`` on the CPU.
        """
        programs = self.page_count * self.page_size // PROGRAM
        owners = torch.full((programs,), -1, dtype=torch.int32)
        for index, first in enumerate(self.first_programs):
            owners[first : first + self._programs[index]] = index
        return owners

    def _cut(self, index: int, count: int) -> None:
        start = self.first_programs[index] * PROGRAM
        done = 0
        for page in self.pages_of[index]:
            place = start + done - page * self.page_size
            length = min(count - done, self.page_size - place)
            segment = Segment(index, done, length, place)
            self._segments[page].append(segment)
            self._places[index].append((page, segment))
            done += length
