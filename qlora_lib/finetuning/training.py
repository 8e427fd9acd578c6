"""Fine-tuning on the transformers Trainer, and the held-out loss beside it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import qlora_lib.integrations.peft  # noqa: F401 - tells peft about Linear4bit
from qlora_lib.finetuning.checkpoints import (
    CheckpointTrainer,
    adapter_tensors,
    checkpoint_to_resume,
    checkpoints,
    fingerprint_base,
    fingerprint_examples,
    load_adapter_exactly,
    losses_of,
)
from qlora_lib.finetuning.data import (
    IGNORED_LABEL,
    Example,
    collate,
    padding_token,
)
from qlora_lib.finetuning.modes import as_before, evaluating
from qlora_lib.finetuning.packing import check_packing
from qlora_lib.finetuning.spikes import SpikeTrainer
from qlora_lib.integrations.transformers import (
    compile_decoder_layers,
    enable_gradient_checkpointing,
)
from qlora_lib.optim import PagedAdamW

OptimizerFactory = Callable[..., torch.optim.Optimizer]
"""Called as ``factory(parameters, lr=learning_rate)``."""


def paper_optimizer(parameters: Sequence[nn.Parameter], lr: float) -> PagedAdamW:
    """Return the paper's Adam: paged, ``beta2 = 0.999`` and no weight decay.

    Paging is of section 3, the numbers of appendix B. Its state has 32 bits.
    """
    return PagedAdamW(parameters, lr=lr, betas=(0.9, 0.999), weight_decay=0.0)


def add_adapters(
    model: PreTrainedModel, rank: int = 64, alpha: int = 16, dropout: float = 0.05
) -> PeftModel:
    """Freeze a model and put a LoRA adapter beside each of its linear layers.

    ``y = x W^T + (alpha / rank) dropout(x) A^T B^T`` with ``A`` random and ``B`` zero,
    so that the model answers as before until it is trained. The output layer gets none.
    The defaults are the paper's (appendix B); its dropout was 0.1 for the models of 7B
    and 13B and 0.05 for the larger ones. The random numbers are those of
    ``torch.manual_seed``.

    Args:
        model: A causal language model, quantized or not; changed in place.
        rank: Rows of ``A`` and columns of ``B``.
        alpha: Scale of the adapters, before it is divided by the rank.
        dropout: Probability that an input of an adapter is zeroed in training.

    Returns:
        The model with adapters in float32 that are trained, and all else frozen.

    Raises:
        ValueError: If the model has adapters, or no linear layer beside its output, or
            if rank or dropout is out of range.
    """
    if isinstance(model, PeftModel):
        raise ValueError("model has adapters already: pass the model under them")
    if rank < 1:
        raise ValueError(f"rank must be a positive whole number, got {rank}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def finetune(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    steps: int,
    output_dir: str | Path | None = None,
    save_every: int | None = None,
    resume: bool = False,
    batch_size: int = 16,
    gradient_accumulation: int = 1,
    learning_rate: float = 2e-4,
    optimizer: OptimizerFactory = paper_optimizer,
    gradient_checkpointing: bool = True,
    compile_layers: bool = False,
    seed: int = 0,
    progress: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[float]:
    """Train the parameters of a model that require gradients.

    The defaults are the paper's recipe (appendix B): batches of 16, Adam with
    ``beta2 = 0.999``, a constant learning rate of 2e-4 for models of 7B and 13B (1e-4
    for the larger ones), gradients clipped to the norm 0.3, activations recomputed
    in the backward pass.

    The loss of a step is the mean over all answer tokens of its batch, however the
    batch is split or packed.

    With ``output_dir`` the run can be interrupted, even killed, and resumed: the same
    call with ``resume=True`` gives the losses and adapters of the run that was not
    interrupted, bit for bit on the same machine. What is computed again is what came
    after the last checkpoint.

    Where a long sequence needs more GPU memory than is free, the optimizer's state
    makes room and the step is computed again, with the same result, see
    :class:`~qlora_lib.finetuning.spikes.SpikeTrainer`.

    Args:
        model: A causal language model, quantized and with adapters; trained in place.
        tokenizer: Its tokenizer, which names the token that pads the batches.
        examples: From :func:`qlora_lib.finetuning.data.encode_pairs`, or packed rows
            from :func:`qlora_lib.finetuning.packing.pack`.
        steps: Number of optimizer steps, at least 1.
        output_dir: Folder of the checkpoints; by default none are written. The last two
            are kept.
        save_every: Steps from one checkpoint to the next. The last step is always
            saved, and by default nothing else.
        resume: Go on from the last checkpoint in ``output_dir``.
        batch_size: Examples, or packed rows, of a step.
        gradient_accumulation: Parts of equal size that a batch is computed in, one
            after the other. More parts need less memory for activations.
        learning_rate: The constant learning rate.
        optimizer: Called with the parameters to train and ``lr=learning_rate``; by
            default it gives a :class:`~qlora_lib.PagedAdamW` with state of 32 bits.
        gradient_checkpointing: Whether activations are computed again in the backward
            pass and not kept. It changes no result.
        compile_layers: Whether decoder layers are compiled with ``torch.compile``, see
            :func:`~qlora_lib.integrations.transformers.compile_decoder_layers`: steps
            are shorter after a first one that takes a minute or so, and round
            otherwise. The model stays compiled.
        seed: Seed of the order of the examples and of dropout.
        progress: Whether to show a progress bar.
        callbacks: More of the Trainer's callbacks, for example to measure the held-out
            loss on the way, or to stop early.

    Returns:
        The training loss of each step from the first, in nats per answer token; NaN
        where it was NaN.

    Raises:
        ValueError: If ``examples`` is empty or cannot be trained on, an argument is out
            of range, no parameter requires a gradient, or a checkpoint cannot be
            resumed from, with the reason.
        FileExistsError: If ``output_dir`` holds checkpoints and ``resume`` is False.
        FileNotFoundError: If it holds none and ``resume`` is True.
    """
    _check_examples(examples)
    _check_numbers(steps, batch_size, gradient_accumulation, save_every)
    rows_at_a_time = batch_size // gradient_accumulation
    check_packing(examples, model, rows_at_a_time)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            "model has no parameter that requires a gradient: add adapters with "
            "add_adapters"
        )
    built_optimizer = optimizer(trained, lr=learning_rate)
    settings: dict[str, Any] = {}
    checkpoint = None
    if output_dir is not None:
        settings = {
            "steps": steps,
            "batch_size": batch_size,
            "gradient_accumulation": gradient_accumulation,
            "learning_rate": learning_rate,
            "seed": seed,
            "compile_layers": compile_layers,
            **_describe_optimizer(built_optimizer),
            "checksum of the examples": fingerprint_examples(examples),
            **_describe_model(model),
        }
        checkpoint = _start_or_resume(Path(output_dir), settings, resume)
    elif resume or save_every is not None:
        raise ValueError("output_dir is missing: resume and save_every need it")
    if checkpoint is not None and len(losses := losses_of(checkpoint)) == steps:
        load_adapter_exactly(model, checkpoint)  # the Trainer would take a step more
        return losses

    with tempfile.TemporaryDirectory() as unused_folder, as_before(model):
        if gradient_checkpointing:
            enable_gradient_checkpointing(model)
        if compile_layers:
            compile_decoder_layers(model)
        arguments = TrainingArguments(
            output_dir=str(output_dir or unused_folder),
            max_steps=steps,
            per_device_train_batch_size=rows_at_a_time,
            gradient_accumulation_steps=gradient_accumulation,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=0.3,
            seed=seed,
            logging_steps=1,
            # The filter would report a mean of earlier losses instead of NaN.
            logging_nan_inf_filter=False,
            save_strategy="no" if output_dir is None else "steps",
            save_steps=save_every or steps,
            remove_unused_columns=False,
            # The Trainer would move a model that is on the CPU to a GPU.
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=model.device.type == "cuda",
            report_to="none",
            disable_tqdm=True,
        )
        # With several GPUs the Trainer would multiply the batch by their number.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer = _FinetuneTrainer(
            settings,
            model=model,
            args=arguments,
            train_dataset=list(examples),
            data_collator=partial(collate, padding_id=padding_token(tokenizer)),
            optimizers=(built_optimizer, None),
            callbacks=[
                *callbacks,
                *([_LossBar()] if progress else []),
                *([_SaveWhenStopped()] if output_dir is not None else []),
            ],
        )
        # Without a progress bar the Trainer prints every log entry; they are returned.
        trainer.remove_callback(PrinterCallback)
        trainer.train(
            resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
        )
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def answer_losses(
    model: PreTrainedModel | PeftModel,
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
        tokenizer: Its tokenizer, which names the token that pads the batches.
        examples: From :func:`qlora_lib.finetuning.data.encode_pairs`, not packed.
        batch_size: Examples computed at a time.

    Returns:
        float32 ``[examples]`` on the CPU.

    Raises:
        ValueError: If ``examples`` is empty or packed, or ``batch_size`` is below 1.
    """
    _check_examples(examples)
    if batch_size < 1:
        raise ValueError(f"batch_size must be a positive number, got {batch_size}")
    if "position_ids" in examples[0]:
        raise ValueError(
            "examples are packed, and a row has no answer of its own: pass the pairs"
        )
    losses = []
    with evaluating(model):
        for start in range(0, len(examples), batch_size):
            batch = collate(
                examples[start : start + batch_size], padding_token(tokenizer)
            )
            batch = {key: rows.to(model.device) for key, rows in batch.items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1]
            token_losses = F.cross_entropy(
                logits.float().transpose(1, 2),
                labels,
                ignore_index=IGNORED_LABEL,
                reduction="none",
            )
            answer_lengths = (labels != IGNORED_LABEL).sum(1)
            losses.append(token_losses.sum(1) / answer_lengths)
    return torch.cat(losses).cpu()


class _FinetuneTrainer(SpikeTrainer, CheckpointTrainer):
    """Both: spikes are survived, and checkpoints are whole."""


class _LossBar(ProgressCallback):
    """The Trainer's progress bar with the loss in it, not on a line for each step."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


class _SaveWhenStopped(TrainerCallback):
    """A checkpoint of the last step, where another callback stops the run early."""

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        control.should_save |= control.should_training_stop


def _check_examples(examples: Sequence[Example]) -> None:
    if not examples:
        raise ValueError("examples is empty: pass at least one encoded pair")
    for number, example in enumerate(examples):
        if set(example["labels"][1:]) <= {IGNORED_LABEL}:
            raise ValueError(
                f"examples[{number}] has no label to learn: its answer is empty"
            )


def _check_numbers(
    steps: int, batch_size: int, gradient_accumulation: int, save_every: int | None
) -> None:
    if steps < 1:  # the Trainer would take it for "until three epochs are over"
        raise ValueError(f"steps must be a positive number of steps, got {steps}")
    if save_every is not None and save_every < 1:
        raise ValueError(f"save_every must be a positive number, got {save_every}")
    if (
        gradient_accumulation < 1
        or batch_size < 1
        or batch_size % gradient_accumulation
    ):
        raise ValueError(
            f"batch_size={batch_size} cannot be computed in "
            f"gradient_accumulation={gradient_accumulation} equal parts: choose a "
            "divisor of the batch size"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "WORLD_SIZE is above 1, and finetune trains in one process: start it "
            "without a distributed launcher, or give the model to a Trainer of your own"
        )


def _start_or_resume(
    output_dir: Path, settings: dict[str, Any], resume: bool
) -> Path | None:
    if resume:
        # Through JSON and back, as the settings of the checkpoint went.
        return checkpoint_to_resume(output_dir, json.loads(json.dumps(settings)))
    if found := checkpoints(output_dir):
        raise FileExistsError(
            f"output_dir={str(output_dir)!r} holds {found[-1].name} of an earlier run: "
            "resume it, or name another folder"
        )
    return None


def _describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    plain = (bool, int, float, str, tuple, list, type(None))
    options = {k: v for k, v in optimizer.defaults.items() if isinstance(v, plain)}
    if isinstance(optimizer, PagedAdamW):
        # Where its state lies changes no bit, so the budget may be another one.
        options["state_bits"] = optimizer.state_bits
    return {
        "optimizer": type(optimizer).__qualname__,
        **{f"optimizer's {name}": value for name, value in options.items()},
    }


def _describe_model(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    adapter_tensors(model)  # before the first step, not at the first checkpoint
    config = model.peft_config["default"]
    options = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
    return {
        "checksum of the base model": fingerprint_base(model),
        **{f"adapter's {name}": getattr(config, name, None) for name in options},
    }
