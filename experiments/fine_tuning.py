"""Fine-tune the base model to convergence and a 7B shape for 50 steps, and record it.

    python experiments/fine_tuning.py

Chapter 10 shows what this writes to experiments/results/fine_tuning.json:

- ``base``: the base model of the book on docstring pairs, with its linear layers in
  NF4 and, from the same seed, in 16 bits. Trained until the held-out loss has not
  fallen for some evaluations.
- ``llama-7b``: a model of that shape with random weights, on the same pairs packed into
  rows of 2048 tokens, with its speed, its peak memory and the estimate of it.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from qlora_lib import estimate_memory
from qlora_lib.finetuning.data import Example, InstructionPair, encode_pairs
from qlora_lib.finetuning.docstrings import DocstringPair, standard_library_pairs
from qlora_lib.finetuning.generation import generate_docstring
from qlora_lib.finetuning.packing import pack
from qlora_lib.finetuning.training import add_adapters, answer_losses, finetune
from qlora_lib.integrations.transformers import QLoRAConfig
from qlora_lib.memory import llama_config
from random_llama import linear4bit, random_llama
from record import REPOSITORY, provenance, write_record

BASE = {
    "rank": 16,
    "alpha": 16,
    "dropout": 0.1,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "max_length": 512,
    "seed": 0,
}
PATIENCE = 4
SAMPLES = 6
LLAMA_STEPS = 50
LLAMA_SEQUENCE = 2048
WARM_UP_STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(REPOSITORY / "models" / "base"))
    parser.add_argument("--steps", type=int, default=1500, help="at most so many")
    parser.add_argument("--every", type=int, default=50, help="steps to an evaluation")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    train, held_out = standard_library_pairs()
    record = {
        **provenance(("torch", "triton", "transformers", "peft")),
        "base": train_base(
            arguments.model,
            tokenizer,
            train,
            held_out,
            arguments.steps,
            arguments.every,
        ),
    }
    write_record("fine_tuning", record)
    record["llama-7b"] = train_llama(llama_config("llama-7b"), tokenizer, train)
    write_record("fine_tuning", record)


def train_base(
    model_folder: str,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[DocstringPair],
    held_out: Sequence[DocstringPair],
    steps: int,
    every: int,
) -> dict[str, Any]:
    """The same training in 4 and in 16 bits; held-out losses, and what it answers."""
    max_length = BASE["max_length"]
    examples = encode_pairs(instruction_pairs(train), tokenizer, max_length)
    held_out_examples = encode_pairs(instruction_pairs(held_out), tokenizer, max_length)
    result: dict[str, Any] = {
        **BASE,
        "training_pairs": len(train),
        "held_out_pairs": len(held_out),
    }
    shown = held_out[:: max(1, len(held_out) // SAMPLES)][:SAMPLES]
    samples = [
        {"module": pair.module, "name": pair.name, "author": pair.summary}
        for pair in shown
    ]
    for bits, config in (("16bit", None), ("4bit", QLoRAConfig())):
        model = load(model_folder, config)
        torch.manual_seed(BASE["seed"])
        adapted = add_adapters(
            model, rank=BASE["rank"], alpha=BASE["alpha"], dropout=BASE["dropout"]
        )
        if bits == "4bit":
            answer(adapted, tokenizer, shown, samples, "before")
        watcher = HeldOutLoss(
            lambda m: answer_losses(m, tokenizer, held_out_examples, 64), every
        )
        start = time.perf_counter()
        losses = finetune(
            adapted,
            tokenizer,
            examples,
            steps=steps,
            batch_size=BASE["batch_size"],
            learning_rate=BASE["learning_rate"],
            gradient_checkpointing=False,
            seed=BASE["seed"],
            callbacks=[watcher],
        )
        best = min(watcher.curve, key=lambda point: point["loss"])
        result[bits] = {
            "curve": watcher.curve,
            "best": best,
            "steps": len(losses),
            "training_losses": [round(loss, 4) for loss in losses],
            "seconds": round(time.perf_counter() - start, 1),
        }
        print(bits, best, len(losses), flush=True)
        if bits == "4bit":
            answer(adapted, tokenizer, shown, samples, "after")
    return {**result, "samples": samples}


class HeldOutLoss(TrainerCallback):
    """Measures the held-out loss while training goes on, and ends it when it rises.

    Attributes:
        curve: ``step``, ``loss`` and its ``standard_error``, from step 0.
    """

    def __init__(self, measure: Callable[[Any], torch.Tensor], every: int) -> None:
        self.curve: list[dict[str, float]] = []
        self._measure, self._every = measure, every

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._note(0, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self._every:
            return
        self._note(state.global_step, model)
        losses = [point["loss"] for point in self.curve]
        control.should_training_stop |= losses.index(min(losses)) < (
            len(losses) - PATIENCE
        )

    def _note(self, step: int, model: Any) -> None:
        losses = self._measure(model)
        self.curve.append(
            {
                "step": step,
                "loss": round(losses.mean().item(), 4),
                "standard_error": round((losses.std() / len(losses) ** 0.5).item(), 4),
            }
        )


def train_llama(
    config: LlamaConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[DocstringPair],
    steps: int = LLAMA_STEPS,
    sequence: int = LLAMA_SEQUENCE,
) -> dict[str, Any]:
    """Random weights learn little, but at the speed and in the memory of real ones."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = pack(encode_pairs(instruction_pairs(train), tokenizer, sequence), sequence)
    model = random_llama(config, device, linear4bit)
    torch.manual_seed(0)
    adapted = add_adapters(model)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = StepTimes()
    losses = finetune(
        adapted, tokenizer, rows, steps=steps, batch_size=1, callbacks=[clock]
    )
    estimate = estimate_memory(config, sequence_length=sequence)
    result: dict[str, Any] = {
        "steps": steps,
        "batch_size": 1,
        "sequence": sequence,
        "losses": [round(loss, 4) for loss in losses],
        "tokens_per_second": round(clock.rate(mean_tokens(rows)), 1),
        # The card has room for all that is paged, so that it stays there.
        "estimated_gib": round((estimate.peak + estimate.paged_state) / 2**30, 3),
    }
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        result["peak_allocated_gib"] = round(peak / 2**30, 3)
    print({key: value for key, value in result.items() if key != "losses"})
    return result


class StepTimes(TrainerCallback):
    """Notes when each step has ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def rate(self, tokens_per_step: float) -> float:
        """Tokens a second after the first steps, which compile kernels."""
        ends = self.ends[min(WARM_UP_STEPS, len(self.ends) - 2) :]
        return tokens_per_step * (len(ends) - 1) / (ends[-1] - ends[0])


def mean_tokens(rows: Sequence[Example]) -> float:
    return sum(len(row["input_ids"]) for row in rows) / len(rows)


def load(folder: str | Path, config: QLoRAConfig | None) -> PreTrainedModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map=device
    )


def instruction_pairs(pairs: Sequence[DocstringPair]) -> list[InstructionPair]:
    return [pair.as_instruction() for pair in pairs]


def answer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[DocstringPair],
    samples: list[dict[str, str]],
    when: str,
) -> None:
    """Put what the model answers for each pair into its sample, as ``when``."""
    for pair, sample in zip(pairs, samples, strict=True):
        sample[when] = generate_docstring(model, tokenizer, pair.source)


if __name__ == "__main__":
    main()
