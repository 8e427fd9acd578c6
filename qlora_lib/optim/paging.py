"""The pager: which pages of optimizer state lie on the GPU, and when the others come.

An optimizer reads and writes all of its state once in each step, always in the same
order. Whoever keeps the pages that were used last (LRU) keeps exactly those that are
needed last, and finds none of the others: with room for ``k`` of ``n > k`` pages, every
access misses. So the first pages stay where they are, and the rest is streamed through
a few staging slots: while one page is updated, the next ones come in and the last ones
go out.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_lib.optim.arguments import check_budget
from qlora_lib.optim.devices import Device

# One slot is read from the host, one is updated, one is written to the host, and one
# more evens out what does not take equally long.
STAGING_SLOTS = 4
# Walks after which there is another look whether pages on the host have room again.
LONGEST_WAIT = 64


class Pages(NamedTuple):
    """Pages that are ready to be updated.

    Attributes:
        numbers: Which pages.
        places: uint8 ``[page_bytes]`` each, where they are now.
    """

    numbers: Sequence[int]
    places: Sequence[Tensor]


@dataclass
class Counters:
    """What a pager has done so far.

    Attributes:
        bytes_in: Bytes copied to the device.
        bytes_out: Bytes copied to the host.
        stalls: Updates that were ready before their page had arrived, and waited.
        evictions: How often resident pages had to give way.
    """

    bytes_in: int = 0
    bytes_out: int = 0
    stalls: int = 0
    evictions: int = 0


class HostPages:
    """Pages that are used where they lie, in host memory: nothing has to move.

    Args:
        page_count: How many pages there are.
        page_bytes: Size of each.
        host: Zeroed uint8 ``[page_count * page_bytes]``; by default made here.

    Attributes:
        host: uint8 ``[page_count, page_bytes]``.
        resident: How many pages are where they are used.
    """

    def __init__(
        self, page_count: int, page_bytes: int, host: Tensor | None = None
    ) -> None:
        self.page_count, self.page_bytes = page_count, page_bytes
        if host is None:
            host = torch.zeros(page_count * page_bytes, dtype=torch.uint8)
        self.host = host.view(page_count, page_bytes)

    @property
    def resident(self) -> int:
        """How many pages are where they are used: all of them."""
        return self.page_count

    @property
    def counters(self) -> Counters:
        """What has been moved: nothing."""
        return Counters()

    def walk(self, pages: Sequence[int] | None = None) -> Generator[Pages]:
        """Yield pages, by default all, ready to be updated in place."""
        pages = range(self.page_count) if pages is None else pages
        yield Pages(pages, [self.host[page] for page in pages])

    def evict(self) -> int:
        """Free no memory of any device: 0 bytes."""
        return 0

    def write_back(self) -> None:
        """Bring ``host`` up to date, which it is."""

    def forget(self) -> None:
        """Prepare for ``host`` being written, which needs nothing."""


class Pager(HostPages):
    """Pages in host memory that are used on a device, where the first ones may reside.

    Args:
        page_count: How many pages there are.
        page_bytes: Size of each.
        device: Where they are used.
        device_budget: Bytes of the device that pages may take, staging slots included.
            None: what is free, less a reserve, looked up at the first walk and, as long
            as there are pages on the host, now and then.

    Attributes:
        host: uint8 ``[page_count, page_bytes]``. Resident pages may be newer on the
            device, see :meth:`write_back`.

    Raises:
        ValueError: If ``device_budget`` is less than one page, with the least that
            works.
    """

    def __init__(
        self,
        page_count: int,
        page_bytes: int,
        device: Device,
        device_budget: int | None = None,
    ) -> None:
        check_budget(device_budget, page_bytes)
        memory = device.host_memory(page_count * page_bytes)
        super().__init__(page_count, page_bytes, memory)
        self._device, self._budget = device, device_budget
        self._homes: list[Tensor] = []
        # The last copy of a page to the host, for whoever reads it there.
        self._written: dict[int, Any] = {}
        self._counters = Counters()
        self._walks = 0
        # When pages may return. The wait doubles each time, once in a walk, so that a
        # run whose steps differ does not move them to and fro for ever.
        self._next_return = self._wait = 1
        self._last_put_off = 0

    @property
    def resident(self) -> int:
        """How many pages reside on the device: the first so many."""
        return len(self._homes)

    @property
    def counters(self) -> Counters:
        """What has happened so far."""
        return dataclasses.replace(self._counters, stalls=self._device.stalls())

    def walk(self, pages: Sequence[int] | None = None) -> Generator[Pages]:
        """Yield pages, each once, ready to be updated in place.

        First come all resident pages at once, then the others one by one. What is
        yielded may be used until the next is asked for. Nothing here waits on the host:
        copies out may still be under way when the walk has ended.

        Args:
            pages: Which pages, ascending; by default all.

        Raises:
            torch.OutOfMemoryError: If there is no room for a single page.
        """
        pages = range(self.page_count) if pages is None else pages
        self._walks += 1
        self._bring_home()
        slots = self._staging_slots(sum(page >= self.resident for page in pages))
        here = [page for page in pages if page < self.resident]
        streamed = iter([page for page in pages if page >= self.resident])
        coming: deque[tuple[int, Tensor, Any]] = deque()
        try:
            for slot, page in zip(slots, streamed, strict=False):
                coming.append((page, slot, self._copy_in(page, slot)))
            if here:
                yield Pages(here, [self._homes[page] for page in here])
            while coming:
                page, slot, arrival = coming.popleft()
                self._device.wait(arrival)
                yield Pages([page], [slot])
                gone = self._copy_out(page, slot)
                if (page := next(streamed, -1)) >= 0:
                    coming.append((page, slot, self._copy_in(page, slot, gone)))
        finally:
            for slot in slots:
                self._device.release(slot)

    def evict(self) -> int:
        """Move all resident pages to the host and wait until they are there.

        They return by themselves in a later walk, as far as there is room.

        Returns:
            Bytes of the device that this has freed.
        """
        count = self.resident
        if count:
            self._give_way(to=0)
        return count * self.page_bytes

    def write_back(self) -> None:
        """Bring ``host`` up to date and wait until it is. Resident pages stay."""
        for page, home in enumerate(self._homes):
            self._copy_out(page, home)
        self._device.synchronize()

    def forget(self) -> None:
        """Drop what is on the device, since ``host`` is about to be written."""
        self._device.synchronize()
        while self._homes:
            self._device.release(self._homes.pop())
        self._next_return = self._walks + 1

    def _bring_home(self) -> None:
        """Have as many pages reside as there is room for."""
        if self.resident == self.page_count or self._walks < self._next_return:
            return
        room = self._budget
        if room is None:
            room = self._device.free_bytes() + self.resident * self.page_bytes
        if room >= self.host.nbytes:
            goal = self.page_count
        else:
            goal = max(0, room // self.page_bytes - STAGING_SLOTS)
            if self._budget is None:  # there may be more room later
                self._put_off_return()
        if goal < self.resident:
            self._give_way(to=goal)
        elif goal > self.resident:
            self._device.tidy()
        arriving: deque[tuple[Tensor, Any]] = deque()
        try:
            for page in range(self.resident, goal):
                home = self._device.allocate(self.page_bytes)
                arriving.append((home, self._copy_in(page, home)))
        except torch.OutOfMemoryError:
            self._put_off_return()
        try:
            while arriving:
                self._device.wait(arriving[0][1])
                self._homes.append(arriving.popleft()[0])
        finally:  # none but after an interrupt
            for home, _ in arriving:
                self._device.release(home)

    def _staging_slots(self, streamed: int) -> list[Tensor]:
        """Allocate as many slots as are of use, at least one if any is."""
        wanted = min(streamed, STAGING_SLOTS)
        if self._budget is not None:
            wanted = min(wanted, max(1, self._budget // self.page_bytes))
        slots: list[Tensor] = []
        while len(slots) < wanted:
            try:
                slots.append(self._device.allocate(self.page_bytes))
            except torch.OutOfMemoryError:
                if slots:
                    break
                if not self.resident:
                    raise
                self._give_way(to=self.resident - 1)
        return slots

    def _give_way(self, to: int) -> None:
        """Move resident pages to the host, and have them stay there for a while."""
        for page in range(to, self.resident):
            self._copy_out(page, self._homes[page])
        self._device.synchronize()
        while self.resident > to:
            self._device.release(self._homes.pop())
        self._counters.evictions += 1
        self._put_off_return()

    def _put_off_return(self) -> None:
        if self._last_put_off < self._walks:
            self._last_put_off = self._walks
            self._next_return = self._walks + 1 + self._wait
            self._wait = min(2 * self._wait, LONGEST_WAIT)

    def _copy_in(self, page: int, place: Tensor, *after: Any) -> Any:
        self._counters.bytes_in += self.page_bytes
        if page in self._written:
            after = (*after, self._written[page])
        return self._device.copy_in(self.host[page], place, after)

    def _copy_out(self, page: int, place: Tensor) -> Any:
        self._counters.bytes_out += self.page_bytes
        self._written[page] = self._device.copy_out(place, self.host[page])
        return self._written[page]
