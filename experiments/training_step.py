"""Time a QLoRA training step of a LLaMA-shaped model beside bitsandbytes and peft.

    python experiments/training_step.py

Both stacks train the same model: the shape of LLaMA 7B with the same random weights in
NF4 with double quantization, the rest in bfloat16, float32 adapters of rank 64 on all
linear layers, gradient checkpointing, the same tokens and the same optimizer. One uses
the layers of this library and the other those of bitsandbytes with the adapters that
peft puts beside them. Both run as they are, and with their decoder layers compiled.
Writes experiments/results/training_step.json.

A stack is checked before it is timed: the loss of its first step must be that of the
other one, but for rounding, and its loss on the same batch must fall.
"""

import argparse
import gc
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from qlora_lib.integrations.transformers import compile_decoder_layers
from qlora_lib.memory import llama_config
from random_llama import RANK, linear4bit, random_llama, with_adapters
from record import provenance, write_record
from timing import event_seconds

LEARNING_RATE = 2e-4
WARM_UP_STEPS = 3
TIMED_STEPS = 10
# Losses of a first step near ln 32000, in bfloat16 over 32 layers.
LOSS_TOLERANCE = 5e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="llama-7b", help="shape of the model")
    parser.add_argument("--rounds", type=int, default=2, help="times through all runs")
    arguments = parser.parse_args()
    config = llama_config(arguments.size)
    packages = ("torch", "triton", "transformers", "peft", "bitsandbytes")
    record = {
        **provenance(packages),
        "model": arguments.size,
        "rank": RANK,
        "runs": compare(config, "cuda", arguments.rounds),
    }
    write_record("training_step", record)


def compare(config: LlamaConfig, device: str, rounds: int) -> list[dict[str, Any]]:
    """Every way with every stack, and all that again in each round.

    A model is made anew for each run, since what an earlier run left in the allocator
    would count as its memory.
    """
    runs = []
    for _, way in itertools.product(range(rounds), WAYS):
        pair = [measure(config, device, stack, *way) for stack in STACKS]
        check_same_loss(pair)
        for run in pair:
            print(run, flush=True)
        runs += pair
    return runs


def measure(
    config: LlamaConfig,
    device: str,
    stack: str,
    optimizer: str,
    batch: tuple[int, int],
    compiled: bool = False,
) -> dict[str, Any]:
    """Train some steps on one batch; tokens a second, memory, and the losses."""
    free_before = forget(device)
    model = with_adapters(STACKS[stack](config, device))
    if compiled:
        compile_decoder_layers(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    stepper = OPTIMIZERS[optimizer](trained)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, batch, generator=generator).to(device)
    losses: list[Tensor] = []

    def step() -> None:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 0.3)
        stepper.step()
        stepper.zero_grad()
        losses.append(loss.detach())

    for _ in range(WARM_UP_STEPS):
        step()
    result: dict[str, Any] = {
        "stack": stack,
        "compiled": compiled,
        "optimizer": optimizer,
        "batch": batch[0],
        "sequence": batch[1],
    }
    if device == "cuda":
        times = [event_seconds(step) for _ in range(TIMED_STEPS)]
        seconds = statistics.median(times)
        result |= {
            "step_seconds": round(seconds, 4),
            "shortest_step_seconds": round(min(times), 4),
            "tokens_per_second": round(tokens.numel() / seconds, 1),
            "peak_allocated_gib": gib(torch.cuda.max_memory_allocated()),
            "peak_reserved_gib": gib(torch.cuda.max_memory_reserved()),
            "card_gib": gib(free_before - torch.cuda.mem_get_info()[0]),
        }
    result |= {"first_loss": losses[0].item(), "last_loss": losses[-1].item()}
    if not result["last_loss"] < result["first_loss"]:
        raise AssertionError(f"the loss did not fall: {result}")
    return result


def check_same_loss(pair: list[dict[str, Any]]) -> None:
    first, second = (run["first_loss"] for run in pair)
    if not abs(first - second) <= LOSS_TOLERANCE * abs(second):
        raise AssertionError(f"the stacks train different models: {pair}")


def make_qlora_lib(config: LlamaConfig, device: str) -> PreTrainedModel:
    return random_llama(config, device, linear4bit)


def make_bitsandbytes(config: LlamaConfig, device: str) -> PreTrainedModel:
    """The layers that transformers makes of a BitsAndBytesConfig with NF4."""
    import bitsandbytes as bnb

    def layer(weight: Tensor) -> nn.Module:
        linear = bnb.nn.Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        linear.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True
        ).to(device)
        return linear

    model = random_llama(config, device, layer)
    model.is_loaded_in_4bit = True  # by which peft knows to add its own 4-bit layers
    return model


def adamw(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)


def paged_adamw(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The paper's optimizer, whose state lies in managed memory."""
    import bitsandbytes as bnb

    return bnb.optim.PagedAdamW32bit(trained, lr=LEARNING_RATE)


STACKS: dict[str, Callable[[LlamaConfig, str], PreTrainedModel]] = {
    "qlora_lib": make_qlora_lib,
    "bitsandbytes": make_bitsandbytes,
}
# Optimizer, sequences and their tokens, and whether decoder layers are compiled.
WAYS = (
    ("AdamW", (1, 2048), False),
    ("AdamW", (4, 512), False),
    ("PagedAdamW32bit", (1, 2048), False),
    ("AdamW", (1, 2048), True),
)
OPTIMIZERS = {"AdamW": adamw, "PagedAdamW32bit": paged_adamw}


def forget(device: str) -> int:
    """Give back what earlier runs held; the free bytes of the card after that."""
    gc.collect()
    torch.compiler.reset()
    if device != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.mem_get_info()[0]


def gib(count: int) -> float:
    return round(count / 2**30, 3)


if __name__ == "__main__":
    main()
