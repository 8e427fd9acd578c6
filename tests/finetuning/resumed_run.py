"""One fine-tuning run in a process of its own, which can be killed on the way.

    python resumed_run.py FOLDER [resume] [bits=8] [budget=BYTES] [forward=N | save=N]

The optimizer's state has so many bits, by default 32; with a budget it moves to a
simulated device. The process kills itself in the N-th forward pass, or in the middle of
saving step N. Else it prints the losses, and a checksum of the adapter, as JSON.
"""

import hashlib
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lib.finetuning.checkpoints import CheckpointTrainer, adapter_tensors
from qlora_lib.finetuning.data import InstructionPair, encode_pairs
from qlora_lib.finetuning.training import add_adapters, finetune
from qlora_lib.nn import quantize_linears
from qlora_lib.optim import PagedAdamW, SimulatedDevice

BASE = Path(__file__).parents[2] / "models" / "base"
STEPS, SAVE_EVERY, PARTS = 5, 2, 2


def main(folder: str, *words: str) -> None:
    options = dict(word.split("=") for word in words if "=" in word)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    quantize_linears(model)
    # A run that resumes starts from other adapters, which have to make no difference.
    torch.manual_seed(7 if "resume" in words else 0)
    model = add_adapters(model, rank=4, dropout=0.1)
    pairs = [InstructionPair(f"f({n}) =" + " 1 +" * n, f" {n * n}.") for n in range(7)]

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if "forward" in options:
        left = [int(options["forward"])]

        def count(*_: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                die()

        model.get_input_embeddings().register_forward_hook(count)
    if "save" in options:
        save = CheckpointTrainer._save_rng_state

        def save_and_die(self: CheckpointTrainer, output_dir: str) -> None:
            save(self, output_dir)
            if self.state.global_step == int(options["save"]):
                die()

        CheckpointTrainer._save_rng_state = save_and_die
    paging = {"state_bits": int(options.get("bits", 32)), "page_bytes": 2**16}
    if "budget" in options:
        paging["device"] = SimulatedDevice(2**30)
        paging["device_budget"] = int(options["budget"])
    losses = finetune(
        model,
        tokenizer,
        encode_pairs(pairs, tokenizer, max_length=64),
        steps=STEPS,
        batch_size=4,
        gradient_accumulation=PARTS,
        learning_rate=1e-2,
        optimizer=partial(PagedAdamW, **paging),
        output_dir=folder,
        save_every=SAVE_EVERY,
        resume="resume" in words,
    )
    digest = hashlib.sha256()
    for name, tensor in sorted(adapter_tensors(model).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    print(json.dumps({"losses": losses, "adapter": digest.hexdigest()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
