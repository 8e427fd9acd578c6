"""Arguments of an optimizer that are refused, each with its cure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qlora_lib.optim.devices import CudaDevice, Device
from qlora_lib.optim.simulated import SimulatedDevice


def check_group(group: Mapping[str, Any]) -> None:
    """Raise if a parameter group has a parameter twice, or options out of range."""
    if len({id(parameter) for parameter in group["params"]}) < len(group["params"]):
        raise ValueError("params has a parameter twice: give each once")
    check_options(group)


def check_options(group: Mapping[str, Any]) -> None:
    """Raise if options of a parameter group are out of range, missing or not known."""
    missing = {"lr", "betas", "eps", "weight_decay"} - group.keys()
    if missing:
        raise ValueError(f"a parameter group lacks {sorted(missing)}: give them values")
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name} must be at least 0, got {group[name]}")
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(
                f"a parameter group has {name}=True, which PagedAdamW does not know: "
                "use torch.optim.AdamW"
            )


def check_budget(device_budget: int | None, page_bytes: int) -> None:
    """Raise if not even one page fits into a budget."""
    if device_budget is None:
        return
    check_bytes("device_budget", device_budget)
    if device_budget < page_bytes:
        raise ValueError(
            f"device_budget must be at least one page, {page_bytes} bytes, got "
            f"{device_budget}"
        )


def check_bytes(name: str, value: int) -> None:
    """Raise if a number of bytes is not a whole one."""
    if not isinstance(value, int):
        raise TypeError(
            f"{name} must be a whole number of bytes, got {value!r}: convert it with "
            "int()"
        )


def check_device(device: Device, parameters: torch.device) -> None:
    """Raise if a device has no pages for parameters that are where they are.

    Raises:
        TypeError: If it is no device of this kind, as ``"cuda"`` is none.
        ValueError: If a kernel would be given memory that is not on its GPU, or a GPU
            would be given pages of parameters on the CPU.
    """
    if not isinstance(device, Device):
        raise TypeError(
            f"device must be a SimulatedDevice, got {device!r}: leave it out, and "
            "pages move to the GPU that the parameters are on"
        )
    for kind, place in ((SimulatedDevice, "cpu"), (CudaDevice, "cuda")):
        if isinstance(device, kind) and parameters.type != place:
            raise ValueError(
                f"device is a {kind.__name__}, and the parameters are on {parameters}: "
                "leave device out, and pages move to the GPU that they are on"
            )
