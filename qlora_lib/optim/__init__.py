"""Optimizers whose state is paged."""

from qlora_lib.optim.adamw import PagedAdamW
from qlora_lib.optim.devices import CudaDevice
from qlora_lib.optim.paging import Counters, HostPages, Pager
from qlora_lib.optim.simulated import SimulatedDevice

__all__ = [
    "Counters",
    "CudaDevice",
    "HostPages",
    "PagedAdamW",
    "Pager",
    "SimulatedDevice",
]
