"""A device that pages move to within ordinary memory, for tests and for reading."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class SimulatedDevice:
    """A device in ordinary memory, whose copies run as late as they are allowed to.

    Nothing is faster for it: it shows, and lets tests check, that a pager waits for
    what it has to. A copy runs when somebody waits for it. A place is filled with the
    byte 255, which makes every float NaN, as soon as a copy into it may begin, so that
    whoever reads it too early reads NaN.

    Args:
        capacity: Bytes that the device has.

    Attributes:
        occupied: Bytes that are in use by others than pages, to be set at will.
        log: ``("in", page)`` and ``("out", page)``, in the order in which copies ran.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.occupied = 0
        self.log: list[tuple[str, int]] = []
        self._used = 0
        self._asked: list[LateCopy] = []
        self._stalls = 0
        self._slab = torch.empty(0)

    def host_memory(self, size: int) -> Tensor:
        """Return ordinary memory."""
        self._slab = torch.zeros(size, dtype=torch.uint8)
        return self._slab

    def allocate(self, size: int) -> Tensor:
        """Return memory that is full of NaN."""
        if size > self.capacity - self.occupied - self._used:
            raise torch.OutOfMemoryError(
                f"{size} bytes asked for, {self.capacity} in all, {self.occupied} "
                f"occupied and {self._used} used by pages"
            )
        self._used += size
        return torch.full((size,), 255, dtype=torch.uint8)

    def release(self, place: Tensor) -> None:
        """Count the memory as free."""
        self._used -= place.nbytes

    def tidy(self) -> None:
        """Do nothing: one place is as good as another."""

    def free_bytes(self) -> int:
        """Return what neither others nor pages use."""
        return self.capacity - self.occupied - self._used

    def copy_in(
        self, host: Tensor, place: Tensor, after: Iterable[LateCopy]
    ) -> LateCopy:
        """Poison the place as soon as it may be written to, and fill it later."""
        return self._ask("in", host, place, list(after))

    def copy_out(self, place: Tensor, host: Tensor) -> LateCopy:
        """Read the place later."""
        return self._ask("out", place, host, [])

    def wait(self, event: LateCopy) -> None:
        """Run the copy now, and before it those that it waits for."""
        self._stalls += not event.has_run
        event.run()
        self._asked = [copy for copy in self._asked if not copy.has_run]

    def stalls(self) -> int:
        """How many copies had not run when they were waited for."""
        return self._stalls

    def synchronize(self) -> None:
        """Run the copies that are left."""
        for copy in self._asked:
            copy.run()
        self._asked = []

    def _ask(
        self, direction: str, source: Tensor, target: Tensor, after: list[LateCopy]
    ) -> LateCopy:
        host = source if direction == "in" else target
        page = (host.data_ptr() - self._slab.data_ptr()) // max(1, host.nbytes)
        copy = LateCopy(
            source, target, after, lambda: self.log.append((direction, page))
        )
        self._asked.append(copy)
        return copy


class LateCopy:
    """A copy of a simulated device, and the event that it has run.

    Attributes:
        has_run: Whether it has.
    """

    def __init__(
        self,
        source: Tensor,
        target: Tensor,
        after: list[LateCopy],
        note: Callable[[], None],
    ) -> None:
        self.has_run = False
        self._source, self._target, self._after = source, target, after
        self._note = note
        if all(copy.has_run for copy in after):
            self._poison()

    def run(self) -> None:
        """Run the copies that it waits for, and then itself, once."""
        if self.has_run:
            return
        if not all(copy.has_run for copy in self._after):
            for copy in self._after:
                copy.run()
            self._poison()
        self._target.copy_(self._source)
        self.has_run = True
        self._after = []
        self._note()

    def _poison(self) -> None:
        self._target.fill_(255)
