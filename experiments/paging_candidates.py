"""The optimizers that are timed side by side: PagedAdamW at its budgets, and its peers.

Each has parameters of its own, in the shapes of LoRA adapters, that start from the same
numbers. A peer is imported when it is made: one that is missing leaves an error.
"""

import itertools
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from qlora_lib import PagedAdamW
from qlora_lib.optim import SimulatedDevice

PAGED = "qlora_lib PagedAdamW"
FUSED = "torch AdamW, fused"
MANAGED = "bitsandbytes PagedAdamW32bit"
OFFLOADED = "torchao CPUOffloadOptimizer"
# Not optimizers: what the others are compared with, or contain.
COPIES, BACKWARD = "bare copies both ways", "backward alone"

LEARNING_RATE = 2e-4
INITIAL_STD = 0.02
LLAMA_7B = (32, 4096, 11008)  # layers, their hidden and intermediate sizes
# What the card must have left beside managed memory, so that none of it is moved.
MARGIN_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Candidate:
    """An optimizer, and for PagedAdamW what it may keep on the card.

    Attributes:
        optimizer: Whose it is.
        budget_share: Budget over bytes of state. At 0 it is the staging slots alone.
        state_bits: Bits of a number of state.
    """

    optimizer: str
    budget_share: float | None = None
    state_bits: int = 32

    def about(self) -> dict[str, Any]:
        return (
            asdict(self) if self.optimizer == PAGED else {"optimizer": self.optimizer}
        )


def adapter_shapes(
    layers: int, hidden: int, intermediate: int, rank: int
) -> list[tuple[int, int]]:
    """Shapes of the two matrices beside each linear layer of a LLaMA model."""
    linear = [(hidden, hidden)] * 4 + [(hidden, intermediate)] * 2
    linear += [(intermediate, hidden)]
    pairs = [[(rank, k), (n, rank)] for k, n in linear]
    return list(itertools.chain(*pairs)) * layers


def make_parameters(
    shapes: list[tuple[int, int]], device: str, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator(device).manual_seed(seed)
    return [
        nn.Parameter(
            torch.randn(shape, device=device, generator=generator).mul_(INITIAL_STD)
        )
        for shape in shapes
    ]


def make_optimizer(
    candidate: Candidate, trained: list[nn.Parameter], page_bytes: int
) -> torch.optim.Optimizer:
    """Make it, resident or paged on the device of its parameters."""
    if candidate.optimizer == PAGED:
        share = candidate.budget_share or 0
        return make_paged(trained, share, page_bytes, candidate.state_bits)
    if candidate.optimizer == FUSED:
        return torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    if trained[0].device.type == "cpu":
        raise RuntimeError(f"{candidate.optimizer} needs a GPU")
    if candidate.optimizer == MANAGED:
        check_room(sum(2 * p.nbytes for p in trained))
        import bitsandbytes as bnb

        return bnb.optim.PagedAdamW32bit(trained, lr=LEARNING_RATE)
    from torchao.optim import CPUOffloadOptimizer

    # Its update runs on the CPU, with PyTorch's fused AdamW there.
    return CPUOffloadOptimizer(trained, torch.optim.AdamW, fused=True, lr=LEARNING_RATE)


def make_paged(
    trained: list[nn.Parameter],
    budget_share: float,
    page_bytes: int,
    state_bits: int = 32,
) -> PagedAdamW:
    """PagedAdamW with a budget; on a CPU, with a simulated device of enough memory."""
    options: dict[str, Any] = {
        "lr": LEARNING_RATE,
        "state_bits": state_bits,
        "page_bytes": page_bytes,
    }
    sized = PagedAdamW(trained, **options)  # it takes no memory before its first step
    if trained[0].device.type == "cpu":
        options["device"] = SimulatedDevice(sized.state_bytes + sized.staging_bytes)
    budget = budget_bytes(sized, budget_share)
    return PagedAdamW(trained, device_budget=budget, **options)


def budget_bytes(optimizer: PagedAdamW, budget_share: float) -> int:
    """A share of the state, and at least the slots through which the rest streams."""
    return max(optimizer.staging_bytes, round(budget_share * optimizer.state_bytes))


def check_room(managed: int) -> None:
    """Raise if so much managed memory would not find room on the card."""
    free = torch.cuda.mem_get_info()[0]
    if managed + MARGIN_BYTES > free:
        raise MemoryError(
            f"managed memory of {managed} bytes and a margin of {MARGIN_BYTES} are "
            f"more than the {free} bytes that are free"
        )
