"""Measure the memory of QLoRA training steps beside its estimate, part by part.

    python experiments/memory.py            # on a GPU
    python experiments/memory.py --quick    # tiny shapes, on a CPU too

Models of LLaMA shapes with random weights take a few steps, with adapters of rank 64 on
all linear layers. Recorded is the peak of what torch's allocator had in use, of what it
held, and of the card, beside qlora_lib.memory.estimate_memory; and for a waterfall,
what is in use after each stage. Each run has a process of its own, and no other may use
the card. Writes experiments/results/memory.json, anew after each run, so that a run
that fails costs only itself.
"""

import argparse
import concurrent.futures
import dataclasses
import gc
import importlib.util
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from qlora_lib import PagedAdamW
from qlora_lib.memory import estimate_memory, llama_config
from qlora_lib.memory.optimizers import DEFAULT_OPTIMIZER
from random_llama import RANK, linear4bit, random_llama, with_adapters
from record import RESULTS, provenance, write_record

STEPS = 3
MAX_NORM = 0.3  # the paper's recipe
LEARNING_RATE = 2e-4
FUSED, PAGED, PAGED_8BIT = "adamw_torch_fused", "paged_adamw_32bit", "paged_adamw_8bit"
OURS = DEFAULT_OPTIMIZER
# Memory that a card must have left beside the peak before state may be paged: managed
# memory beyond what is free would be moved to and fro.
MARGIN_BYTES = 2 * 2**30


@dataclasses.dataclass(frozen=True)
class Run:
    """One model, trained one way."""

    model: str
    config: LlamaConfig
    sequence_length: int = 512
    optimizer: str = FUSED
    gradient_checkpointing: bool = True

    def estimate(self) -> dict[str, Any]:
        found = estimate_memory(
            self.config,
            sequence_length=self.sequence_length,
            rank=RANK,
            optimizer=self.optimizer,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        return {
            "peak": found.peak,
            "peak_phase": found.peak_phase,
            "on_card": found.on_card,
            "paged_state": found.paged_state,
            "largest": dataclasses.asdict(found.largest),
            "phases": {k: dataclasses.asdict(v) for k, v in found.phases.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, any device")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not arguments.quick and device == "cpu":
        parser.error("the shapes of the paper need a GPU: try --quick")
    runs = quick_runs() if arguments.quick else paper_runs()
    # bitsandbytes gives managed memory back with its process only, so that a later run
    # would be measured with that of the earlier ones.
    call = called_here if device == "cpu" else called_in_a_process
    record = {
        **call(about, device),
        "separate_processes": call is called_in_a_process,
        "rank": RANK,
        "steps": STEPS,
        "runs": [],
    }
    for run in runs:
        record["runs"].append(call(attempt, run, device))
        write_record("memory", record, arguments.out)
        print(summary(record["runs"][-1]), flush=True)


def called_here(function: Callable[..., dict[str, Any]], *arguments: Any) -> Any:
    return function(*arguments)


def called_in_a_process(
    function: Callable[..., dict[str, Any]], *arguments: Any
) -> Any:
    """What the function returns in a process of its own.

    It is started, not forked: imports alone initialize CUDA, which a fork cannot share.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(function, *arguments).result()


def about(device: str) -> dict[str, Any]:
    packages = [
        name
        for name in ("torch", "triton", "transformers", "peft", "bitsandbytes")
        if importlib.util.find_spec(name)
    ]
    return {**provenance(tuple(packages)), "context_bytes": context_bytes(device)}


def paper_runs() -> list[Run]:
    """The four sizes, the waterfall's steps for the first, the largest one paged."""
    llama = {
        size: llama_config(f"llama-{size}") for size in ("7b", "13b", "33b", "65b")
    }
    return [
        Run("llama-65b", llama["65b"], optimizer=OURS),
        Run("llama-65b", llama["65b"], optimizer=PAGED),
        Run("llama-65b", llama["65b"], optimizer=PAGED_8BIT),
        Run("llama-7b", llama["7b"]),
        Run("llama-7b", llama["7b"], sequence_length=2048),
        Run("llama-7b", llama["7b"], gradient_checkpointing=False),
        Run("llama-7b", llama["7b"], optimizer=OURS),
        Run("llama-7b", llama["7b"], optimizer=PAGED),
        Run("llama-7b", llama["7b"], optimizer=PAGED_8BIT),
        Run("llama-13b", llama["13b"]),
        Run("llama-33b", llama["33b"]),
    ]


def quick_runs() -> list[Run]:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    return [
        Run("tiny", config, sequence_length=256),
        Run("tiny", config, sequence_length=256, gradient_checkpointing=False),
    ]


def attempt(run: Run, device: str) -> dict[str, Any]:
    """Estimate and measure a run; one that fails is recorded with its error."""
    result: dict[str, Any] = {
        "model": run.model,
        "sequence_length": run.sequence_length,
        "optimizer": run.optimizer,
        "gradient_checkpointing": run.gradient_checkpointing,
    }
    try:
        result["estimate"] = run.estimate()
        result |= measure(run, device, result["estimate"])
    except Exception as error:  # memory that runs out, a library that is missing
        result["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    gc.collect()
    return result


def measure(run: Run, device: str, estimate: dict[str, Any]) -> dict[str, Any]:
    """Take the steps of a run; bytes in use after each stage, and at the peak.

    Without a GPU there are no bytes to read, and losses are all that is returned.
    """
    stages: dict[str, int] = {}

    def note(stage: str, read: Callable[[], int]) -> None:
        if device == "cuda":
            stages[stage] = max(stages.get(stage, 0), read())

    model: nn.Module = random_llama(run.config, device, linear4bit)
    note("weights", torch.cuda.memory_allocated)
    model = with_adapters(model, run.gradient_checkpointing)
    note("adapters", torch.cuda.memory_allocated)

    check_room(estimate, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(run.optimizer, trained)
    shape = (1, run.sequence_length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(run.config.vocab_size, shape, generator=generator).to(device)
    losses = []
    on_card = 0
    for index in range(STEPS):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if index == 0:  # the optimizer has no state yet
            note("forward_backward", torch.cuda.max_memory_allocated)
        nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        del loss
        note("step", torch.cuda.max_memory_allocated)
        note("reserved", torch.cuda.max_memory_reserved)
        if device == "cuda":
            free, total = torch.cuda.mem_get_info()
            on_card = max(on_card, total - free)
    result: dict[str, Any] = {"losses": [loss.item() for loss in losses]}
    if device == "cuda":
        result["measured"] = {
            "peak_allocated": stages.pop("step"),
            "peak_reserved": stages.pop("reserved"),
            # With the context, and with paged state as far as it lies on the card.
            "on_card": on_card,
            "stages": stages,
        }
        peak = result["measured"]["peak_allocated"]
        result["estimate_error"] = round(estimate["peak"] / peak - 1, 4)
    return result


def make_optimizer(name: str, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    if name == FUSED:
        return torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    if name == OURS:  # with all state on the host, as the estimate counts it
        optimizer = PagedAdamW(trained, lr=LEARNING_RATE)
        budget = optimizer.staging_bytes
        return PagedAdamW(trained, lr=LEARNING_RATE, device_budget=budget)
    import bitsandbytes as bnb

    kinds = {PAGED: bnb.optim.PagedAdamW32bit, PAGED_8BIT: bnb.optim.PagedAdamW8bit}
    return kinds[name](trained, lr=LEARNING_RATE)


def check_room(estimate: dict[str, Any], device: str) -> None:
    """Raise if the paged state would not find room on the card beside the peak."""
    if device != "cuda" or not estimate["paged_state"]:
        return
    needed = estimate["peak"] - torch.cuda.memory_allocated()
    needed += estimate["paged_state"] + MARGIN_BYTES
    free = torch.cuda.mem_get_info()[0]
    if needed > free:
        raise MemoryError(f"paged state needs {needed} bytes, and {free} are free")


def context_bytes(device: str) -> int | None:
    """What the card holds of this process that is not the allocator's.

    Once a product has run: the context, the libraries, and the code of their kernels.
    Read from the whole card, before a model is made.
    """
    if device == "cpu":
        return None
    ones = torch.ones(1024, 1024, device=device, dtype=torch.bfloat16)
    (ones @ ones).sum().item()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def summary(result: dict[str, Any]) -> str:
    name = f"{result['model']} {result['sequence_length']} {result['optimizer']}"
    if "error" in result:
        return f"{name}: {result['error']}"
    estimate = result["estimate"]["peak"] / 2**30
    if "measured" not in result:
        return f"{name}: estimate {estimate:.2f} GiB, no GPU to measure"
    peak = result["measured"]["peak_allocated"] / 2**30
    error = result["estimate_error"]
    return f"{name}: estimate {estimate:.2f}, measured {peak:.2f} GiB, {error:+.1%}"


if __name__ == "__main__":
    main()
