"""Training steps that survive a spike of GPU memory, as a long sequence makes it."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer

from qlora_lib.optim.spikes import RandomState, attempt_with_room

logger = logging.getLogger(__name__)

Inputs = dict[str, Any]


class _Part(NamedTuple):
    """What a part of a batch is computed from."""

    inputs: Inputs
    items_in_batch: Tensor | int | None
    random_state: RandomState


class SpikeTrainer(Trainer):
    """A Trainer whose optimizer makes room when forward or backward run out of memory.

    The optimizer has to have a method ``evict()`` that moves its state off the GPU, as
    :class:`~qlora_lib.PagedAdamW` has; with another one the error is raised. A
    backward pass that fails leaves the gradients of some layers and not of others, so
    all parts of the batch so far are computed again, from no gradients on, each with
    the random numbers that it had: the step is the one that it would have been, bit for
    bit. In training with several processes the error is raised: one that began again
    alone would add its gradients to those of another step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parts: list[_Part] = []

    def training_step(
        self,
        model: nn.Module,
        inputs: Inputs,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Compute a part of a batch and add to the gradients; return its loss."""
        compute = super().training_step
        # accelerate puts an optimizer of its own around the one that is given.
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if not hasattr(optimizer, "evict") or self.args.world_size > 1:
            return compute(model, inputs, num_items_in_batch)
        if _has_no_gradients(optimizer):  # this is the first part of a batch
            self._parts.clear()
        self._parts.append(_Part(inputs, num_items_in_batch, RandomState.now()))

        def make_room() -> int:
            freed: int = optimizer.evict()
            if freed:
                logger.warning(
                    "GPU memory ran out in step %d: %.2f GiB of optimizer state were "
                    "moved to the host, and the step begins again",
                    self.state.global_step + 1,
                    freed / 2**30,
                )
            return freed

        def begin_again() -> Tensor:
            model.zero_grad()
            for part in self._parts:
                part.random_state.restore()
                loss = compute(model, part.inputs, part.items_in_batch)
            return loss

        return attempt_with_room(
            lambda: compute(model, inputs, num_items_in_batch), make_room, begin_again
        )


def _has_no_gradients(optimizer: Optimizer) -> bool:
    return all(
        parameter.grad is None
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
