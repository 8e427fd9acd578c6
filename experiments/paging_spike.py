"""A forced spike: one long sequence among short ones, where state no longer fits.

The same small model takes the same steps three times: with PagedAdamW and all memory,
then with resident AdamW and with PagedAdamW under a limit of PyTorch's allocator that
has room for the long sequence only without the optimizer's state. On a CPU the limit
is simulated: it counts the activations of a sequence and the state that is resident.
"""

import gc
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from paging_candidates import FUSED, PAGED, Candidate, make_optimizer
from paging_timing import one_line
from qlora_lib import PagedAdamW
from qlora_lib.optim.adamw import PAGE_BYTES

STEPS, SPIKE = 12, 4
SHORT, LONG = 512, 8192  # tokens
WIDTH, LAYERS = 4096, 8


def measure(
    device: str,
    width: int = WIDTH,
    layers: int = LAYERS,
    lengths: tuple[int, int] = (SHORT, LONG),
    page_bytes: int = PAGE_BYTES,
) -> dict[str, Any]:
    """Train with all memory, then resident and paged under the limit."""
    lengths_of_steps = [lengths[step == SPIKE] for step in range(STEPS)]

    def run(optimizer: str, limit: int | None) -> dict[str, Any]:
        gc.collect()
        candidate = Candidate(optimizer, 1.0 if optimizer == PAGED else None)
        training = Training(device, width, layers, candidate, page_bytes)
        with Limit(device, limit):
            return training.take_steps(lengths_of_steps, limit)

    free = run(PAGED, None)
    # Half of the state is too little room to keep the other half, and enough to spare.
    limit = max(free["peak_bytes"]) - free["state_bytes"] // 2
    resident, paged = run(FUSED, limit), run(PAGED, limit)
    return {
        "lengths": lengths_of_steps,
        "limit_bytes": limit,
        "without_limit": free,
        "resident": resident,
        "paged": paged,
        "resident_ran_out_at_the_spike": resident.get("failed_at") == SPIKE
        and resident["error"].startswith("OutOfMemoryError"),
        "paged_completed": "error" not in paged,
        "equal_losses": paged["losses"] == free["losses"],
    }


class Training:
    """Linear layers that are trained, whose activations grow with the sequence."""

    def __init__(
        self,
        device: str,
        width: int,
        layers: int,
        candidate: Candidate,
        page_bytes: int,
    ) -> None:
        self.device, self.width, self.layers = device, width, layers
        torch.manual_seed(0)
        with torch.device(device):
            blocks = [(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)]
            self.model = nn.Sequential(*(part for block in blocks for part in block))
        self.trained = list(self.model.parameters())
        self.optimizer = make_optimizer(candidate, self.trained, page_bytes)
        self.state_bytes = PagedAdamW(self.trained, page_bytes=page_bytes).state_bytes

    def take_steps(self, lengths: list[int], limit: int | None) -> dict[str, Any]:
        """Losses and what was on the card, step by step, up to one that fails."""
        result: dict[str, Any] = {"losses": [], "peak_bytes": [], "share_in_step": []}
        result |= {"share_after_step": [], "counters": []}
        result["state_bytes"] = self.state_bytes
        for index, length in enumerate(lengths):
            generator = torch.Generator().manual_seed(index)
            tokens = torch.randn(length, self.width, generator=generator)
            tokens = tokens.to(self.device)
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                loss = self.optimizer.step(self.closure(tokens, limit, result))
            except torch.OutOfMemoryError as error:
                return result | {"error": one_line(error), "failed_at": index}
            result["losses"].append(loss.item())
            result["peak_bytes"].append(self.peak(length))
            if isinstance(self.optimizer, PagedAdamW):
                result["share_after_step"].append(self.optimizer.resident_share)
                result["counters"].append(asdict(self.optimizer.counters))
        return result

    def closure(
        self, tokens: Tensor, limit: int | None, result: dict[str, Any]
    ) -> Callable[[], Tensor]:
        def forward_and_backward() -> Tensor:
            self.optimizer.zero_grad()
            if isinstance(self.optimizer, PagedAdamW):
                # Twice in a step whose first attempt ran out of memory.
                result["share_in_step"].append(self.optimizer.resident_share)
            if self.device == "cpu" and limit is not None:
                needed = self.needed(len(tokens))
                if needed > limit:
                    raise torch.OutOfMemoryError(f"{needed} bytes, limit {limit}")
            loss = (self.model(tokens) - tokens).square().mean()
            loss.backward()
            return loss.detach()

        return forward_and_backward

    def peak(self, length: int) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return self.needed(length)

    def needed(self, length: int) -> int:
        """Bytes that a GPU would need for parameters, gradients, outputs and state."""
        parameters = sum(p.nbytes for p in self.trained)
        paged = isinstance(self.optimizer, PagedAdamW)
        share = self.optimizer.resident_share if paged else 1
        outputs = 4 * length * self.width * self.layers
        return 2 * parameters + round(share * self.state_bytes) + outputs


class Limit:
    """Let PyTorch's allocator have so many bytes, for as long as the context lasts."""

    def __init__(self, device: str, limit: int | None) -> None:
        self.limit = limit if device == "cuda" else None

    def __enter__(self) -> None:
        if self.limit is not None:
            torch.cuda.empty_cache()
            _, total = torch.cuda.mem_get_info()
            torch.cuda.set_per_process_memory_fraction(self.limit / total)

    def __exit__(self, *_: object) -> None:
        if self.limit is not None:
            torch.cuda.set_per_process_memory_fraction(1.0)
