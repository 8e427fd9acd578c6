"""The moments of all parameters: in pages, updated where they are ready."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from qlora_lib.kernels.dispatch import runs_triton
from qlora_lib.optim.arguments import check_device
from qlora_lib.optim.devices import CudaDevice, Device
from qlora_lib.optim.expected import ExpectedParameter
from qlora_lib.optim.layout import Layout
from qlora_lib.optim.paging import HostPages, Pager
from qlora_lib.optim.state import read_state, state_bytes, write_state
from qlora_lib.optim.updating import KernelUpdater, ReferenceUpdater, Updater
from qlora_lib.optim.work import Work

# By parameter, the arrays of its state under their names.
Moments = Mapping[int, Mapping[str, Tensor]]


class PagedState:
    """The state of parameters on one device.

    Memory is taken when the state is first used, as by torch's optimizers.

    Args:
        parameters: What they are.
        state_bits: 32 or 8.
        largest_page: Numbers that a page may hold of each moment.
        device: Where pages move to; by default the GPU of the parameters, and for those
            on the CPU nowhere.
        device_budget: Bytes of it, or None for what is free.

    Attributes:
        layout: What lies where.
        page_bytes: Size of a page.
    """

    def __init__(
        self,
        parameters: Sequence[ExpectedParameter],
        state_bits: int,
        largest_page: int,
        device: Device | None,
        device_budget: int | None,
    ) -> None:
        if device is not None and parameters:
            check_device(device, parameters[0].device)
        self._parameters, self._state_bits = parameters, state_bits
        self._device, self._budget = device, device_budget
        self._counts = [parameter.shape.numel() for parameter in parameters]
        self._dtypes = [parameter.dtype for parameter in parameters]
        self.layout = Layout(self._counts, self._dtypes, largest_page)
        self.page_bytes = state_bytes(self.layout.page_size, state_bits)
        self._pages: HostPages | None = None
        self._updater: Updater | None = None

    @property
    def pages(self) -> HostPages:
        """The pages, in memory that is taken now if it was not yet."""
        return self.take_memory()

    @property
    def is_in_use(self) -> bool:
        """Whether memory has been taken."""
        return self._pages is not None

    def take_memory(self) -> HostPages:
        """Take host memory for all pages, if that has not been done."""
        if self._pages is None:
            count, on = self.layout.page_count, self._parameters[0].device
            if on.type not in ("cpu", "cuda"):
                raise ValueError(
                    f"the parameters are on {on}, and PagedAdamW trains on NVIDIA and "
                    "AMD GPUs and on CPUs: use torch.optim.AdamW there"
                )
            device = self._device or (CudaDevice(on) if on.type == "cuda" else None)
            self._pages = (
                HostPages(count, self.page_bytes)
                if device is None
                else Pager(count, self.page_bytes, device, self._budget)
            )
        return self._pages

    def update(self, work: Sequence[Work | None]) -> None:
        """Take a step with the parameters that have work to do."""
        touched: Iterable[int] = range(self.layout.page_count)
        # A page that is there for parameters of no numbers holds nothing to update.
        if None in work or not any(self._counts):
            touched = sorted(
                {
                    page
                    for pages, each in zip(self.layout.pages_of, work, strict=True)
                    if each is not None
                    for page in pages
                }
            )
        updater = self._choose_updater()
        # Closed in any case: what a failed step has raised would keep it, and with it
        # the memory of its slots.
        with contextlib.closing(self.pages.walk([*touched])) as walk:
            updater.update(work, walk)

    def read(self, numbers: Iterable[int]) -> dict[int, dict[str, Tensor]]:
        """Copy the moments of some parameters to the CPU."""
        self.pages.write_back()
        return {
            number: read_state(
                self.pages.host,
                self.layout,
                number,
                self._parameters[number].shape,
                self._state_bits,
            )
            for number in numbers
        }

    def write(self, moments: Moments) -> None:
        """Set the moments of some parameters, and those of all others to zero."""
        self.pages.forget()
        self.pages.host.zero_()
        for number, arrays in moments.items():
            write_state(self.pages.host, self.layout, number, arrays, self._state_bits)

    def _choose_updater(self) -> Updater:
        if self._updater is None:
            device = self._parameters[0].device
            if runs_triton(device):
                self._updater = KernelUpdater(
                    self.layout, self._counts, self._dtypes, self._state_bits, device
                )
            else:
                self._updater = ReferenceUpdater(self.layout, self._state_bits)
        return self._updater
