"""A second attempt, with more room, at what ran out of GPU memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class RandomState(NamedTuple):
    """The state of torch's random number generators, which dropout draws from.

    Attributes:
        cpu: That of the CPU.
        cuda: That of each GPU; empty where CUDA is not in use.
    """

    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> RandomState:
        """Return the state of this moment; it is on the host, so no GPU is awaited."""
        in_use = torch.cuda.is_initialized()
        cuda = torch.cuda.get_rng_state_all() if in_use else []
        return cls(torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Have the numbers that were drawn since then drawn again."""
        torch.set_rng_state(self.cpu)
        torch.cuda.set_rng_state_all(self.cuda)


def attempt_with_room(
    attempt: Callable[[], T],
    make_room: Callable[[], int],
    again: Callable[[], T] | None = None,
) -> T:
    """Do what may run out of GPU memory; if it does, make room and do it again.

    The second attempt draws the same random numbers as the first, and finds the memory
    of the first one freed. There is no third.

    Args:
        attempt: What is done. It must be no harm that it was done in part.
        make_room: Frees GPU memory and returns how many bytes it freed.
        again: What is done instead in the second attempt; by default the same.

    Returns:
        What the attempt returned that succeeded.

    Raises:
        torch.OutOfMemoryError: If no room could be made, or it was not enough.
    """
    before = RandomState.now()
    try:
        return attempt()
    except torch.OutOfMemoryError:
        if not make_room():
            raise
    # Only after the except block, since the error's traceback keeps the tensors of the
    # failed attempt alive. Layers that were to be computed again hold theirs in cycles.
    gc.collect()
    before.restore()
    return attempt() if again is None else again()
