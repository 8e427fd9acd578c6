"""The whole training step of a model of the shape of LLaMA 7B, by optimizer.

Adapters of rank 64 on all linear layers have 160 million parameters. One model takes
its steps with each optimizer in turns: forward and backward as often as is accumulated,
clipping, and the update.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from paging_candidates import FUSED, LLAMA_7B, PAGED, Candidate, make_optimizer
from paging_timing import alternate
from paging_updates import allocated
from qlora_lib.optim.adamw import PAGE_BYTES
from random_llama import RANK, linear4bit, random_llama, with_adapters

MAX_NORM = 0.3  # the paper's recipe
CANDIDATES = (Candidate(PAGED, 0.0), Candidate(PAGED, 1.0), Candidate(FUSED))


def measure(
    device: str,
    ways: tuple[tuple[int, int, int, int, float], ...],
    shape: tuple[int, int, int] = LLAMA_7B,
    page_bytes: int = PAGE_BYTES,
) -> dict[str, Any]:
    """Time the steps of every way with every optimizer.

    Args:
        device: "cuda" or "cpu".
        ways: Sequences at a time, how many times in a step, their tokens, rounds, and
            seconds of steps between two synchronizations. Single steps (0) come after
            others like them.
        shape: Layers, hidden size and intermediate size.
        page_bytes: Of the paged optimizers.
    """
    layers, hidden, intermediate = shape
    config = LlamaConfig(  # 32 heads, a vocabulary of 32000, as LLaMA has it
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate
    )
    model = with_adapters(random_llama(config, device, linear4bit))
    trained = [p for p in model.parameters() if p.requires_grad]
    # The optimizers share the parameters: the time of a step is all that is asked.
    optimizers = {c: make_optimizer(c, trained, page_bytes) for c in CANDIDATES}
    short = make_tokens(config, (1, 16), device)
    # Without state: what a first step leaves behind beside it is not its optimizer's.
    TrainingStep(model, torch.optim.SGD(trained, lr=0.0), short, 1)()
    held = {
        candidate: held_bytes(TrainingStep(model, optimizer, short, 1), device)
        for candidate, optimizer in optimizers.items()
    }
    runs = []
    for batch_size, accumulation, sequence, rounds, group_seconds in ways:
        tokens = make_tokens(config, (batch_size, sequence), device)
        steps = {
            candidate: TrainingStep(model, optimizer, tokens, accumulation)
            for candidate, optimizer in optimizers.items()
        }
        times = alternate(steps, device, rounds, group_seconds)
        for candidate, step in steps.items():
            run: dict[str, Any] = {
                "batch_size": batch_size,
                "accumulation": accumulation,
                "sequence": sequence,
                **candidate.about(),
                **times[candidate],
            }
            if device == "cuda" and "error" not in run:
                run["update_seconds"] = step.update_seconds()
                run["held_bytes"] = held[candidate]
                # Memory is the same from the second time on.
                step.accumulation = min(accumulation, 2)
                others = sum(held.values()) - held[candidate]
                run["peak_bytes"] = peak_bytes(step) - others
            runs.append(run)
    return {
        "shape": shape,
        "rank": RANK,
        "parameters": sum(p.numel() for p in trained),
        "runs": runs,
    }


def make_tokens(
    config: LlamaConfig, shape: tuple[int, int], device: str
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, shape, generator=generator).to(device)


class TrainingStep:
    """Forward and backward as often as is accumulated, clipping, and the update."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tokens: torch.Tensor,
        accumulation: int,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.tokens, self.accumulation = tokens, accumulation
        self.updates: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self) -> None:
        for _ in range(self.accumulation):
            loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
            (loss / self.accumulation).backward()
        nn.utils.clip_grad_norm_(self.trained, MAX_NORM)
        if self.tokens.is_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.optimizer.step()
            end.record()
            self.updates.append((start, end))
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def update_seconds(self) -> float:
        """Median of the update alone, as the stream of the computation saw it."""
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) / 1e3 for start, end in self.updates]
        return round(statistics.median(times), 6)


def held_bytes(step: TrainingStep, device: str) -> int:
    """Take a first step; bytes that its optimizer has on the card from then on."""
    before = allocated(device)
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return allocated(device) - before


def peak_bytes(step: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
