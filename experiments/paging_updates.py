"""The optimizer's step alone, at every budget, beside the resident and offloaded peers.

Groups of candidates share a process and are timed in turns. Every candidate takes the
same first steps from the same numbers: PagedAdamW has to give the same bits at every
budget, and the peers the same numbers up to rounding.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from paging_candidates import (
    BACKWARD,
    COPIES,
    FUSED,
    LEARNING_RATE,
    LLAMA_7B,
    MANAGED,
    OFFLOADED,
    PAGED,
    Candidate,
    adapter_shapes,
    budget_bytes,
    make_optimizer,
    make_parameters,
)
from paging_link import Link
from paging_timing import GROUP_SECONDS, alternate, busy_seconds, one_line
from qlora_lib import PagedAdamW
from qlora_lib.optim.adamw import PAGE_BYTES

ROUNDS = 5
CHECKED_STEPS = 3
GRADIENT_STD = 1e-3

GROUPS: dict[str, tuple[Candidate, ...]] = {
    "budgets": (
        *(Candidate(PAGED, share) for share in (0.0, 0.25, 0.5, 1.0)),
        Candidate(FUSED),
        *(Candidate(PAGED, share, state_bits=8) for share in (0.0, 1.0)),
        Candidate(COPIES),
    ),
    # With free memory to spare its managed memory stays on the card: it is resident.
    "managed": (Candidate(PAGED, 1.0), Candidate(MANAGED)),
    # It begins to copy in the backward pass, so all of this group have one.
    "offloaded": (
        *(Candidate(PAGED, share) for share in (0.0, 0.25, 0.5)),
        Candidate(OFFLOADED),
        Candidate(BACKWARD),
    ),
}


def measure(
    device: str,
    group: str,
    rank: int,
    shape: tuple[int, int, int] = LLAMA_7B,
    page_bytes: int = PAGE_BYTES,
    rounds: int = ROUNDS,
    group_seconds: float = GROUP_SECONDS,
) -> dict[str, Any]:
    """Check and time the candidates of a group on adapters of one rank.

    Returns:
        ``seconds`` and the other times of ``paging_timing`` for each candidate, what
        it held on the card, what it copied, and whether its results are right.
    """
    bench = Bench(adapter_shapes(*shape, rank), device, group == "offloaded")
    entries: dict[Candidate, dict[str, Any]] = {c: c.about() for c in GROUPS[group]}
    steps: dict[Candidate, Callable[[], object]] = {}
    for candidate, entry in entries.items():
        try:
            steps[candidate], found = bench.add(candidate, page_bytes)
            entry |= found
        except Exception as error:  # no memory, a peer that is missing or does not run
            entry["error"] = one_line(error)
    for candidate, times in alternate(steps, device, rounds, group_seconds).items():
        entries[candidate] |= times
        if "error" in times:
            continue
        try:
            entries[candidate] |= bench.one_step(candidate, steps[candidate])
        except Exception as error:
            entries[candidate]["error"] = one_line(error)
    return {
        "group": group,
        "rank": rank,
        "matrices": len(bench.shapes),
        "parameters": sum(n * k for n, k in bench.shapes),
        "page_bytes": page_bytes,
        "candidates": list(entries.values()),
    }


class Bench:
    """What the candidates of a group share: shapes, gradients, and expected results."""

    def __init__(
        self, shapes: list[tuple[int, int]], device: str, backward: bool
    ) -> None:
        self.shapes, self.device, self.backward = shapes, device, backward
        self.gradients = [torch.empty(shape, device=device) for shape in shapes]
        self.expected: dict[int, list[Tensor]] = {}  # by bits of state
        self.optimizers: dict[Candidate, torch.optim.Optimizer] = {}
        self.held: dict[Candidate, int] = {}

    def add(
        self, candidate: Candidate, page_bytes: int
    ) -> tuple[Callable[[], object], dict[str, Any]]:
        """Make a candidate; its step, and whether it comes where it should."""
        if candidate.optimizer == COPIES:
            return self.copies(), {}
        trained = make_parameters(self.shapes, self.device)
        if candidate.optimizer == BACKWARD:
            return self.step_of(trained, None), {}
        before = allocated(self.device)
        optimizer = make_optimizer(candidate, trained, page_bytes)
        step = self.step_of(trained, optimizer)
        generator = torch.Generator(self.device).manual_seed(1)
        for _ in range(CHECKED_STEPS):
            for gradient in self.gradients:
                gradient.normal_(std=GRADIENT_STD, generator=generator)
            step()
        synchronize(self.device)
        self.held[candidate] = allocated(self.device) - before
        self.optimizers[candidate] = optimizer
        return step, self.compare(candidate, trained)

    def compare(
        self, candidate: Candidate, trained: list[nn.Parameter]
    ) -> dict[str, Any]:
        bits = candidate.state_bits
        if bits not in self.expected:
            # PagedAdamW at the group's first budget: the others are compared with it.
            self.expected[bits] = [p.detach().clone() for p in trained]
            return {}
        pairs = list(zip(trained, self.expected[bits], strict=True))
        if candidate.optimizer == PAGED:
            return {"equal_bits": all(torch.equal(p, e) for p, e in pairs)}
        difference = max((p - e).abs().max().item() for p, e in pairs)
        largest = max(e.abs().max().item() for _, e in pairs)
        # In each step a parameter is rounded to half a unit in its last place on either
        # side, and what is subtracted differs by a few units in its own.
        tolerance = CHECKED_STEPS * (2**-23 * largest + 1e-5 * LEARNING_RATE)
        return {"difference": difference, "agrees": difference <= tolerance}

    def step_of(
        self, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer | None
    ) -> Callable[[], object]:
        """The step of an optimizer, after a backward pass if the group has one."""
        if optimizer is not None and not self.backward:
            for parameter, gradient in zip(trained, self.gradients, strict=True):
                parameter.grad = gradient
            return optimizer.step

        def backward_and_step() -> None:
            torch.autograd.backward(trained, self.gradients)
            if optimizer is not None:
                optimizer.step()
            for parameter in trained:
                parameter.grad = None

        return backward_and_step

    def copies(self) -> Callable[[], object]:
        """The copies of a step with nothing resident, without the step."""
        optimizer = self.optimizers[Candidate(PAGED, 0.0)]
        assert isinstance(optimizer, PagedAdamW)
        link = Link(self.device, optimizer.state_bytes)
        return lambda: link.copy(piece=optimizer.state_bytes)

    def one_step(
        self, candidate: Candidate, step: Callable[[], object]
    ) -> dict[str, Any]:
        """What a single step copies and takes on the card, in the steady state."""
        found: dict[str, Any] = {}
        optimizer = self.optimizers.get(candidate)
        paged = isinstance(optimizer, PagedAdamW)
        before = asdict(optimizer.counters) if paged else {}
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = allocated(self.device)
        step()
        synchronize(self.device)
        # A backward pass takes memory too.
        if self.device == "cuda" and optimizer is not None and not self.backward:
            more = torch.cuda.max_memory_allocated() - start
            # Parameters and gradients do not count.
            found["held_bytes"] = self.held[candidate]
            found["peak_bytes"] = self.held[candidate] + more
        if paged:
            after = asdict(optimizer.counters)
            found["per_step"] = {name: after[name] - before[name] for name in after}
            found["state_bytes"] = optimizer.state_bytes
            share = candidate.budget_share or 0
            found["budget_bytes"] = budget_bytes(optimizer, share)
            found["resident_share"] = optimizer.resident_share
        one_stream = candidate.optimizer == FUSED or found.get("resident_share") == 1
        if self.device == "cuda" and one_stream:
            found |= busy_seconds(step)
        return found


def allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
