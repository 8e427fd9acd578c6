"""Where pages move: what a pager needs of a device, and a GPU with its streams.

A copy is only asked for here; when it runs is up to the device. What has to come first
is said by events: a copy waits for those that it is given, and whoever computes with a
page waits for the event of its arrival.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

# Left free beside the pages where no budget is given: for what the caching allocator
# cannot use of its memory, and for steps somewhat larger than those seen so far.
RESERVE = 512 * 2**20
# Waits that are noted before those that are over are counted.
MOST_WAITS = 1000


@runtime_checkable
class Device(Protocol):
    """What a pager needs of a device; an event is what its copies return."""

    def host_memory(self, size: int) -> Tensor:
        """Return zeroed host memory, uint8 ``[size]``, to copy from and to."""

    def allocate(self, size: int) -> Tensor:
        """Return memory of the device, uint8 ``[size]``.

        Raises:
            torch.OutOfMemoryError: If there is not enough.
        """

    def release(self, place: Tensor) -> None:
        """Give memory back; copies that were asked for may still use it."""

    def tidy(self) -> None:
        """Prepare for allocations that will stay for long."""

    def free_bytes(self) -> int:
        """Bytes that pages may take beside what training needs."""

    def copy_in(self, host: Tensor, place: Tensor, after: Iterable[Any]) -> Any:
        """Copy to the device once the events ``after`` have come; return an event."""

    def copy_out(self, place: Tensor, host: Tensor) -> Any:
        """Copy to the host what has been computed so far; return an event."""

    def wait(self, event: Any) -> None:
        """Let all that is computed from now on come after an event."""

    def stalls(self) -> int:
        """How often what was computed had to wait for an event, so far."""

    def synchronize(self) -> None:
        """Wait until every copy has run."""


class CudaDevice:
    """A GPU: pinned host memory, and a stream for the copies of each direction.

    Computing goes on in the current stream of whoever calls, so that the three overlap.
    That has to be the same stream each time, or one that has waited for it.

    Args:
        device: The CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        # As an index the device is found faster, and every page asks for its stream.
        index = device.index
        self._device = torch.cuda.current_device() if index is None else index
        self._in = torch.cuda.Stream(device)
        self._out = torch.cuda.Stream(device)
        # When computing was ready for a page, and when the page had arrived.
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._stalls = 0

    def host_memory(self, size: int) -> Tensor:
        """Return zeroed host memory, pinned if it can be.

        Copies from and to pageable memory do not overlap with anything, but give the
        same result; there is a warning then.
        """
        # Not pin_memory=True: that would round the size up to a power of two.
        memory = torch.zeros(size, dtype=torch.uint8)
        runtime = torch.cuda.cudart()
        address = memory.data_ptr()
        with torch.cuda.device(self._device):
            error = int(runtime.cudaHostRegister(address, size, 0)) if size else 0
        if error:
            # The next launch would report the error once more.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self._device)
            warnings.warn(
                f"{size} bytes of host memory cannot be pinned (CUDA error {error}), "
                "so optimizer state moves slowly and by itself: free host memory, or "
                "raise the limit of locked memory",
                stacklevel=2,
            )
        elif size:
            streams = self._in, self._out
            unpin = weakref.finalize(memory.untyped_storage(), _unpin, address, streams)
            unpin.atexit = False
        return memory

    def allocate(self, size: int) -> Tensor:
        """Return memory of the caching allocator, for the current stream."""
        place = torch.empty(size, dtype=torch.uint8, device=self._device)
        # Work that is queued may still use what this memory held before.
        self._in.wait_stream(torch.cuda.current_stream(self._device))
        return place

    def release(self, place: Tensor) -> None:
        """Leave memory to the caching allocator as soon as no copy uses it."""
        place.record_stream(self._in)
        place.record_stream(self._out)

    def tidy(self) -> None:
        """Give the card back what the caching allocator holds unused.

        So pages get memory of their own and none is cut out of larger pieces, which
        forward and backward pass could not have whole again.
        """
        torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        """Return what is free, less a reserve.

        The reserve is what the caching allocator held unused: forward and backward
        needed it since the last call and will again.
        """
        device = self._device
        before = torch.cuda.memory_reserved(device)
        self.tidy()
        reserved = torch.cuda.memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return min(free, allowed - reserved) - (before - reserved) - RESERVE

    def copy_in(
        self, host: Tensor, place: Tensor, after: Iterable[torch.cuda.Event]
    ) -> torch.cuda.Event:
        """Copy in the stream of copies to the GPU."""
        for event in after:
            self._in.wait_event(event)
        with self._in:
            place.copy_(host, non_blocking=True)
        return self._in.record_event(torch.cuda.Event(enable_timing=True))

    def copy_out(self, place: Tensor, host: Tensor) -> torch.cuda.Event:
        """Copy in the stream of copies from the GPU."""
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with self._out:
            host.copy_(place, non_blocking=True)
        return self._out.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        """Let the current stream wait; the host does not."""
        stream = torch.cuda.current_stream(self._device)
        ready = stream.record_event(torch.cuda.Event(enable_timing=True))
        stream.wait_event(event)
        self._waits.append((ready, event))
        if len(self._waits) > MOST_WAITS:
            self.stalls()

    def stalls(self) -> int:
        """Count the waits that are over and took time."""
        while self._waits and all(event.query() for event in self._waits[0]):
            ready, arrival = self._waits.popleft()
            self._stalls += ready.elapsed_time(arrival) > 0
        return self._stalls

    def synchronize(self) -> None:
        """Wait for both streams of copies."""
        self._in.synchronize()
        self._out.synchronize()


def _unpin(address: int, streams: Iterable[torch.cuda.Stream]) -> None:
    for stream in streams:
        stream.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)
