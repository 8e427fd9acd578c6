"""Train the small base model that the book ships, from nothing.

    python experiments/pretrain.py --size full                  # a GPU, ten minutes
    python experiments/pretrain.py --size small --minutes 50    # two CPU cores

The corpus is what every reader has: the Python standard library and the scientific
packages installed beside it. The modules that `qlora_lib.finetuning.docstrings` holds
out, and one whole package, are kept for validation. Writes the model and its card to
models/base, and the same record to experiments/results/pretrain.json.
"""

import argparse
import math
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pretrain_card import model_card
from pretrain_corpus import Corpus, installed_corpus
from qlora_lib.finetuning.docstrings import is_held_out, standard_library_files
from record import REPOSITORY, provenance, write_record

MODEL_DIRECTORY = REPOSITORY / "models" / "base"
MAX_SHARD = "12MB"
EVALUATION_WINDOWS = 256
END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
SEED = 0
PROMPTS = (
    'def read_json(path):\n    """',
    "class Stack:\n    def __init__(self):\n",
    "import numpy as np\n\ndef normalize(x, axis=-1):\n",
)


@dataclass(frozen=True)
class Size:
    """Shape of the model, the text of one step, and the peak learning rate."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    sequence_length: int
    batch_size: int
    learning_rate: float
    max_package_bytes: int | None = None
    vocabulary: int = 4096


SIZES = {
    "full": Size(320, 8, 10, 5, 896, 512, 128, 3e-3),
    # A short run cannot read everything: a cap keeps the large packages from crowding
    # out the small ones.
    "small": Size(192, 6, 6, 2, 512, 256, 16, 3e-3, max_package_bytes=5_000_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the book's base model.")
    parser.add_argument("--size", choices=SIZES, default="full")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=10.0, help="training time")
    length.add_argument("--steps", type=int, help="optimizer steps instead of minutes")
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    budget = Budget(arguments.steps, arguments.minutes * 60)
    corpus = installed_corpus(size.max_package_bytes)
    can_compile = shutil.which("g++") is not None
    record = pretrain(size, corpus, budget, MODEL_DIRECTORY, can_compile)
    record = {"size": arguments.size, **record}
    write_record("pretrain", record)
    card = model_card(record)
    (MODEL_DIRECTORY / "README.md").write_text(card, encoding="utf-8")


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that finds Python's indentation cheap."""
    # A line end and the indentation after it make one piece; a word or sign takes the
    # one space before it; digits stand alone.
    pieces = r"\n[\n ]*| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|[^\S\n]+"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    # A text begins where the last one ended, so one token serves as both marks.
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A stream of tokens, cut into windows of equal length.

    A limit keeps that many windows, spread evenly over the stream.
    """

    def __init__(
        self,
        texts: list[str],
        tokenizer: PreTrainedTokenizerFast,
        length: int,
        limit: int | None = None,
    ) -> None:
        stream: list[int] = []
        for start in range(0, len(texts), 64):
            for encoded in tokenizer(texts[start : start + 64])["input_ids"]:
                stream += [tokenizer.eos_token_id, *encoded]
        count = len(stream) // length
        tokens = torch.tensor(stream[: count * length], dtype=torch.int32)
        tokens = tokens.view(count, length)
        self.tokens = (
            tokens if limit is None else tokens[:: max(count // limit, 1)][:limit]
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.tokens[index].long()
        return {"input_ids": window, "labels": window}

    def bytes_per_token(self, tokenizer: PreTrainedTokenizerFast) -> float:
        """Mean UTF-8 bytes of a predicted token; the end of a text has none."""
        # In a byte-level vocabulary a token's string has one character for each byte.
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        marks = (END_OF_TEXT, PADDING)
        lengths = torch.tensor([0 if name in marks else len(name) for name in names])
        return lengths[self.tokens[:, 1:].long()].double().mean().item()


class Budget(TrainerCallback):
    """The length of a run in steps or in seconds, and the learning rate along it.

    The rate rises over the first `WARMUP` steps and falls linearly to zero. A budget
    in seconds counts by the clock, so that a run on a shared machine ends in time,
    and with the rate at zero.
    """

    WARMUP, EVALUATIONS = 100, 12

    def __init__(self, steps: int | None, seconds: float) -> None:
        self.steps, self.seconds = steps, seconds
        self.start = time.monotonic()
        self.evaluations = 0

    def fraction(self, step: int) -> float:
        if self.steps is not None:
            return step / self.steps
        return (time.monotonic() - self.start) / self.seconds

    def rate(self, step: int) -> float:
        return max(0.0, min((step + 1) / self.WARMUP, 1 - self.fraction(step)))

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.start = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        fraction = self.fraction(state.global_step)
        if fraction * self.EVALUATIONS >= self.evaluations:
            self.evaluations += 1
            control.should_evaluate = control.should_log = True
        if fraction >= 1:
            control.should_evaluate = control.should_training_stop = True


def pretrain(
    size: Size, corpus: Corpus, budget: Budget, output: Path, compile_model: bool
) -> dict[str, Any]:
    """Train tokenizer and model, save both to `output`, and return the record."""
    transformers.set_seed(SEED)
    tokenizer = train_tokenizer(corpus.train[::4], size.vocabulary)
    train = Windows(corpus.train, tokenizer, size.sequence_length)
    held_out = {
        name: Windows(texts, tokenizer, size.sequence_length, limit=EVALUATION_WINDOWS)
        for name, texts in corpus.held_out.items()
    }
    print(f"{len(train):,} windows of {size.sequence_length} tokens", flush=True)
    model = new_model(size, tokenizer)
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim == 2]
    vectors = [p for p in parameters if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=size.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.1,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, budget.rate)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(output),
            max_steps=budget.steps or 10**7,
            per_device_train_batch_size=size.batch_size,
            per_device_eval_batch_size=size.batch_size,
            max_grad_norm=1.0,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            torch_compile=compile_model,
            logging_steps=50,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            seed=SEED,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        optimizers=(optimizer, schedule),
        callbacks=[budget],
    )
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    model.config.use_cache = True  # the Trainer turns it off
    # transformers would load the weights of an earlier run before the shards of this.
    for earlier in output.glob("*.safetensors*"):
        earlier.unlink()
    model.to(torch.bfloat16).save_pretrained(output, max_shard_size=MAX_SHARD)
    tokenizer.save_pretrained(output)
    tokens_per_step = size.batch_size * size.sequence_length
    return {
        **provenance(("torch", "transformers", "tokenizers")),
        "configuration": asdict(size),
        "parameters": sum(p.numel() for p in parameters),
        "sources": corpus.sources,
        "dropped_files": corpus.dropped_files,
        "held_out_sources": corpus.held_out_sources,
        "held_out_modules": sorted(
            {m.partition(".")[0] for m, _ in standard_library_files() if is_held_out(m)}
        ),
        "corpus_tokens": train.tokens.numel(),
        "steps": trainer.state.global_step,
        "tokens_seen": trainer.state.global_step * tokens_per_step,
        "seconds": round(seconds),
        "curve": curve(trainer.state.log_history, held_out, tokenizer, tokens_per_step),
        **measure(output, held_out),
    }


def new_model(size: Size, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build an untrained Llama of the given size."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            head_dim=size.hidden // size.heads,
            intermediate_size=size.intermediate,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def curve(
    history: list[dict[str, float]],
    held_out: dict[str, Windows],
    tokenizer: PreTrainedTokenizerFast,
    tokens_per_step: int,
) -> list[dict[str, float]]:
    """Collect the held-out losses along the run, in nats a token and bits a byte."""
    points: dict[int, dict[str, float]] = {}
    for entry in history:
        step = int(entry["step"])
        for name, windows in held_out.items():
            if (loss := entry.get(f"eval_{name}_loss")) is None:
                continue
            point = points.setdefault(step, {"tokens": step * tokens_per_step})
            bits = loss / windows.bytes_per_token(tokenizer) / math.log(2)
            point[f"{name}, nats per token"] = round(loss, 4)
            point[f"{name}, bits per byte"] = round(bits, 4)
    return list(points.values())


def measure(directory: Path, held_out: dict[str, Windows]) -> dict[str, Any]:
    """Load what was saved, as a reader will, and measure it: losses and samples."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    results = {}
    for name, windows in held_out.items():
        loss = held_out_loss(model, windows)
        bits = loss / windows.bytes_per_token(tokenizer) / math.log(2)
        results[name] = {"nats_per_token": loss, "bits_per_byte": bits}
    samples = []
    for prompt in PROMPTS:
        transformers.set_seed(SEED)
        inputs = tokenizer(prompt, return_tensors="pt")
        generated = model.generate(
            **inputs, max_new_tokens=80, do_sample=True, temperature=0.7, top_p=0.9
        )
        text = tokenizer.decode(generated[0], skip_special_tokens=True)
        samples.append({"prompt": prompt, "text": text})
    return {"held_out": results, "samples": samples}


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, windows: Windows) -> float:
    """Mean negative log-likelihood of a token given those before it, in nats."""
    batches = windows.tokens.long().split(16)
    total = sum(model(input_ids=b, labels=b).loss.item() * len(b) for b in batches)
    return total / len(windows)


if __name__ == "__main__":
    main()
