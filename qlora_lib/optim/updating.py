"""How pages that are ready are updated: by the kernel, or by the reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from qlora_lib.kernels.device import on_device_of
from qlora_lib.kernels.parameter_table import ParameterTable
from qlora_lib.optim.layout import Layout
from qlora_lib.optim.paging import Pages
from qlora_lib.optim.state import fields_of, slices_of, update_segment
from qlora_lib.optim.work import Work

# What the kernel needs to move four numbers at a time.
ALIGNED_BYTES, ALIGNED_COUNT = 16, 8
# Tables of pages that are kept on the GPU: more than a run has pages and slots.
MOST_TABLES = 2**12


class Updater(Protocol):
    """Updates parameters and their state, page by page."""

    def update(self, work: Sequence[Work | None], walk: Iterable[Pages]) -> None:
        """Do the work of a step on pages as they become ready."""


class ReferenceUpdater:
    """Updates segment by segment in PyTorch, on any device.

    Args:
        layout: What lies in which page.
        state_bits: 32 or 8.
    """

    def __init__(self, layout: Layout, state_bits: int) -> None:
        self._layout, self._state_bits = layout, state_bits

    def update(self, work: Sequence[Work | None], walk: Iterable[Pages]) -> None:
        """Update one segment after the other."""
        for pages in walk:
            for page, place in zip(pages.numbers, pages.places, strict=True):
                arrays = fields_of(place, self._layout.page_size, self._state_bits)
                for segment in self._layout.segments(page):
                    if (each := work[segment.parameter]) is not None:
                        part = slice(segment.begin, segment.begin + segment.length)
                        update_segment(
                            slices_of(arrays, segment, self._state_bits),
                            each.parameter.view(-1)[part],
                            each.gradient.view(-1)[part],
                            each.factors,
                        )


class KernelUpdater:
    """Updates any number of pages of one data type in one launch, on a GPU.

    Args:
        layout: What lies in which page.
        counts: Numbers of each parameter.
        dtypes: Its type.
        state_bits: 32 or 8.
        device: The GPU.
    """

    def __init__(
        self,
        layout: Layout,
        counts: Sequence[int],
        dtypes: Sequence[torch.dtype],
        state_bits: int,
        device: torch.device,
    ) -> None:
        from qlora_lib.kernels.adamw import update_pages

        self._update_pages = update_pages
        self._layout, self._state_bits, self._device = layout, state_bits, device
        self._counts_are_aligned = all(count % ALIGNED_COUNT == 0 for count in counts)
        self._is_aligned = False
        self._addresses: list[int] = []
        self._dtypes = dtypes
        self._tables: dict[tuple[torch.dtype, tuple[int, ...]], Tensor] = {}
        nothing = torch.empty(0, device=device)
        self._table = ParameterTable(
            parameter_of=layout.parameter_of_programs().to(device),
            first_program=torch.tensor(layout.first_programs, device=device),
            counts=torch.tensor(counts, device=device),
            addresses=nothing,
            factors=nothing,
        )

    def update(self, work: Sequence[Work | None], walk: Iterable[Pages]) -> None:
        """Launch the kernel for pages that come together, once for each data type."""
        # Autograd does not see what is written to an address.
        torch.autograd.graph.increment_version(
            [each.parameter for each in work if each is not None]
        )
        with on_device_of(self._table.counts):
            self._bring_up_to_date(work)
            for pages in walk:
                both = zip(pages.numbers, pages.places, strict=True)
                for dtype, group in groupby(both, lambda pair: self._dtype_of(pair[0])):
                    self._launch(dtype, *zip(*group, strict=True))

    def _launch(
        self, dtype: torch.dtype, numbers: tuple[int, ...], places: tuple[Tensor, ...]
    ) -> None:
        self._update_pages(
            self._on_device(torch.int32, numbers),
            self._on_device(torch.int64, tuple(place.data_ptr() for place in places)),
            self._table,
            dtype,
            self._layout.page_size,
            self._state_bits,
            self._is_aligned,
        )

    def _bring_up_to_date(self, work: Sequence[Work | None]) -> None:
        """Put addresses and factors on the GPU, without waiting."""
        addresses = [0 if each is None else each.parameter.data_ptr() for each in work]
        addresses += [0 if each is None else each.gradient.data_ptr() for each in work]
        if addresses != self._addresses:
            self._addresses = addresses
            self._is_aligned = self._counts_are_aligned and not any(
                address % ALIGNED_BYTES for address in addresses
            )
            both = torch.tensor(addresses).view(2, len(work))
            self._table = self._table._replace(addresses=self._upload(both))
        # Most parameters share their factors, and nobody reads those without work.
        shared = {id(each.factors): each.factors for each in work if each is not None}
        factors = torch.tensor([*shared.values()], dtype=torch.float64).T
        if len(shared) == 1:
            factors = factors.expand(-1, len(work))
        else:
            row = {key: number for number, key in enumerate(shared)}
            rows = [0 if each is None else row[id(each.factors)] for each in work]
            factors = factors[:, rows]
        factors = self._upload(factors.contiguous())
        self._table = self._table._replace(factors=factors)

    def _dtype_of(self, page: int) -> torch.dtype:
        return self._dtypes[self._layout.segments(page)[0].parameter]

    def _on_device(self, dtype: torch.dtype, values: tuple[int, ...]) -> Tensor:
        table = self._tables.get((dtype, values))
        if table is None:
            if len(self._tables) >= MOST_TABLES:
                self._tables.clear()
            if len(values) == 1:  # while pages are copied: a kernel does not queue
                table = torch.full((1,), values[0], dtype=dtype, device=self._device)
            else:
                table = self._upload(torch.tensor(values, dtype=dtype))
            self._tables[dtype, values] = table
        return table

    def _upload(self, table: Tensor) -> Tensor:
        uploaded = table.pin_memory().to(self._device, non_blocking=True)
        # What follows a copy in this stream is queued behind the copies of pages that
        # other streams have asked for meanwhile. A kernel in between prevents that.
        return uploaded.clone()
