"""Fine-tune the base model as chapter 10 does, with more steps, and record the result.

    python experiments/fine_tuning.py

Quantizes the linear layers to NF4, trains LoRA adapters on docstring pairs, and writes
the held-out loss before and after to experiments/results/fine_tuning.json. Chapter 10
shows that file; it is meant to be made on a GPU.
"""

import argparse
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lib.finetuning.data import encode_pairs, standard_library_pairs
from qlora_lib.finetuning.training import answer_losses, finetune
from qlora_lib.nn import quantize_linears
from record import REPOSITORY, provenance, write_record

RANK = 16
MAX_LENGTH = 512
BATCH_SIZE = 16
LEARNING_RATE = 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(REPOSITORY / "models" / "base"))
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model = model.to(device)
    train_pairs, held_out_pairs = standard_library_pairs()
    train = encode_pairs(train_pairs, tokenizer, MAX_LENGTH)
    held_out = encode_pairs(held_out_pairs, tokenizer, MAX_LENGTH)

    dense = answer_losses(model, tokenizer, held_out)
    quantize_linears(model)
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    model = get_peft_model(model, config)
    before = answer_losses(model, tokenizer, held_out)
    start = time.perf_counter()
    losses = finetune(
        model,
        tokenizer,
        train,
        steps=arguments.steps,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
    )
    seconds = time.perf_counter() - start
    after = answer_losses(model, tokenizer, held_out)

    fall = (before - after).tolist()
    record = {
        **provenance(("torch", "transformers", "peft")),
        "steps": arguments.steps,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "rank": RANK,
        "seconds": seconds,
        "held_out_functions": len(held_out),
        "loss_dense": dense.mean().item(),
        "loss_before": before.mean().item(),
        "loss_after": after.mean().item(),
        "fall": statistics.mean(fall),
        "fall_standard_error": statistics.stdev(fall) / len(fall) ** 0.5,
        "training_losses": losses,
    }
    write_record("fine_tuning", record)
    print(f"{record['loss_before']:.3f} -> {record['loss_after']:.3f}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
