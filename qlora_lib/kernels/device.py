"""The device that a kernel is launched on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the device of a tensor the current one, on which Triton launches kernels.

    Nearly always it is the current one already. Then there is nothing to do, which
    takes a fraction of the time of entering and leaving a context.
    """
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device_of(tensor)
