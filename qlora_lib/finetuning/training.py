"""Fine-tuning on the transformers Trainer, and the held-out loss beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from qlora_lib.finetuning.data import IGNORED_LABEL

Example = dict[str, list[int]]


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int = 16,
    learning_rate: float = 2e-4,
    seed: int = 0,
) -> list[float]:
    """Train the parameters of a model that require gradients.

    The defaults are the paper's recipe for models of 7B and 13B (appendix B): batches
    of 16, Adam with ``beta2 = 0.999``, a constant learning rate of 2e-4, gradients
    clipped to the norm 0.3.

    Args:
        model: A causal language model, quantized and with adapters; trained in place.
        tokenizer: Its tokenizer, which pads the batches.
        examples: ``input_ids``, ``attention_mask`` and ``labels`` of each example, as
            :func:`qlora_lib.finetuning.data.encode_pairs` returns them.
        steps: Number of optimizer steps, at least 1.
        batch_size: Examples of a step.
        learning_rate: The constant learning rate.
        seed: Seed of the order of the examples and of dropout.

    Returns:
        The training loss of each step, in nats per answer token; NaN where it was NaN.

    Raises:
        ValueError: If ``examples`` is empty, ``steps`` is below 1, or no parameter
            requires a gradient.
    """
    _check_examples(examples)
    if steps < 1:  # the Trainer would take it for "until three epochs are over"
        raise ValueError(f"steps must be a positive number of steps, got {steps}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "model has no parameter that requires a gradient: add adapters, for "
            "example with peft.get_peft_model"
        )
    with tempfile.TemporaryDirectory() as unused_folder:
        arguments = TrainingArguments(
            output_dir=unused_folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=0.3,
            adam_beta2=0.999,
            optim="adamw_torch",
            seed=seed,
            logging_steps=1,
            # The filter would report a mean of earlier losses instead of NaN.
            logging_nan_inf_filter=False,
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=list(examples),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        )
        # Without a progress bar the Trainer prints every log entry; they are returned.
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def answer_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int = 16,
) -> Tensor:
    """Return the loss of each example on its answer.

    ``loss = -mean(log p(token | prompt, earlier tokens))`` over the tokens of the
    answer, in nats. One number for each example, so that two models can be compared
    pair by pair.

    Args:
        model: A causal language model; its training mode is restored afterwards.
        tokenizer: Its tokenizer, which pads the batches.
        examples: Encoded examples, as for :func:`finetune`.
        batch_size: Examples computed at a time.

    Returns:
        float32 ``[examples]`` on the CPU.

    Raises:
        ValueError: If ``examples`` is empty.
    """
    _check_examples(examples)
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    was_training = model.training
    model.eval()
    losses = []
    for start in range(0, len(examples), batch_size):
        batch = collate(list(examples[start : start + batch_size])).to(model.device)
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        token_losses = F.cross_entropy(
            logits.float().transpose(1, 2),
            labels,
            ignore_index=IGNORED_LABEL,
            reduction="none",
        )
        answer_lengths = (labels != IGNORED_LABEL).sum(1)
        losses.append((token_losses.sum(1) / answer_lengths).cpu())
    model.train(was_training)
    return torch.cat(losses)


def _check_examples(examples: Sequence[Example]) -> None:
    if not examples:
        raise ValueError("examples is empty: pass at least one encoded pair")
