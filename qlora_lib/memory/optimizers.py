"""What optimizers take of a GPU, by their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

from torch import nn

from qlora_lib.optim import PagedAdamW


class OptimizerBytes(NamedTuple):
    """Bytes that an optimizer takes for the parameters that it trains.

    Attributes:
        state: State that stays on the GPU.
        paged_state: State that moves to the host when the GPU is full.
        step: What it takes beside its state while it takes a step.
    """

    state: int = 0
    paged_state: int = 0
    step: int = 0


# How bitsandbytes keeps Adam's moments: 8-bit codes in blocks of 256 with float32
# scales, small tensors in 32 bits, and only large ones paged.
MIN_8BIT_COUNT = 4096
MIN_PAGED_COUNT = 100_000
STATE_BLOCK_SIZE = 256


def _ours(
    parameters: Sequence[nn.Parameter], state_bits: Literal[32, 8]
) -> OptimizerBytes:
    # It takes no memory before its first step, so it can be asked.
    adam = PagedAdamW(parameters, state_bits=state_bits)
    return OptimizerBytes(paged_state=adam.state_bytes, step=adam.staging_bytes)


def _torch(
    parameters: Sequence[nn.Parameter], temporary_bytes: int = 0
) -> OptimizerBytes:
    count = sum(parameter.numel() for parameter in parameters)
    return OptimizerBytes(state=2 * 4 * count, step=temporary_bytes * count)


def _bitsandbytes(
    parameters: Sequence[nn.Parameter], state_bits: Literal[32, 8], paged: bool
) -> OptimizerBytes:
    state = {True: 0, False: 0}
    for count in (parameter.numel() for parameter in parameters):
        size = 2 * 4 * count
        if state_bits == 8 and count >= MIN_8BIT_COUNT:
            size = 2 * (count + 4 * -(-count // STATE_BLOCK_SIZE))
        state[paged and count >= MIN_PAGED_COUNT] += size
    return OptimizerBytes(state=state[False], paged_state=state[True])


DEFAULT_OPTIMIZER = "qlora_paged_adamw_32bit"

# The first two are qlora_lib.PagedAdamW. The others have the names that transformers
# has for them in TrainingArguments(optim=...). The unfused one of torch holds the root
# of the second moment of all parameters at once.
OPTIMIZERS: dict[str, Callable[[Sequence[nn.Parameter]], OptimizerBytes]] = {
    DEFAULT_OPTIMIZER: partial(_ours, state_bits=32),
    "qlora_paged_adamw_8bit": partial(_ours, state_bits=8),
    "adamw_torch_fused": _torch,
    "adamw_torch": partial(_torch, temporary_bytes=4),
    "adamw_8bit": partial(_bitsandbytes, state_bits=8, paged=False),
    "paged_adamw_32bit": partial(_bitsandbytes, state_bits=32, paged=True),
    "paged_adamw_8bit": partial(_bitsandbytes, state_bits=8, paged=True),
}
