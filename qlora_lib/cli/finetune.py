"""``qlora finetune``: an adapter trained beside a 4-bit model."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_lib.cli.fitting import check_memory, free_memory
from qlora_lib.cli.options import (
    BlockSize,
    CodebookName,
    ComputeDtype,
    Device,
    Json,
    Model,
    NoDoubleQuant,
    NoGradientCheckpointing,
    SkipModules,
    as_words,
    asked_for,
)
from qlora_lib.cli.output import log_lines, say, show_result, working
from qlora_lib.cli.status import WORDS, CommandError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel

    from qlora_lib.finetuning.data import Example, InstructionPair

STAGED = "adapter"
RECIPE = "Recipe"


def finetune(
    ctx: typer.Context,
    model: Model,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A jsonl file, another file or folder that datasets reads, or a data "
            "set of the hub. Rows have prompt and answer, prompt and completion, or "
            "instruction, output and perhaps input.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="Folder of the adapter and of the checkpoints.",
            show_default=False,
        ),
    ],
    split: Annotated[str, typer.Option(help="Part of a data set.")] = "train",
    max_length: Annotated[
        int,
        typer.Option(min=2, help="Tokens of a pair; a longer prompt loses its end."),
    ] = 512,
    pack: Annotated[
        bool, typer.Option("--pack", help="Put short pairs together in full rows.")
    ] = False,
    steps: Annotated[
        int, typer.Option(min=1, help="Optimizer steps.", rich_help_panel=RECIPE)
    ] = 1875,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Pairs of a step.", rich_help_panel=RECIPE)
    ] = 16,
    gradient_accumulation: Annotated[
        int,
        typer.Option(
            min=1,
            help="Parts that a batch is computed in, to save memory.",
            rich_help_panel=RECIPE,
        ),
    ] = 1,
    learning_rate: Annotated[
        float, typer.Option(min=0, help="Constant.", rich_help_panel=RECIPE)
    ] = 2e-4,
    rank: Annotated[
        int, typer.Option(min=1, help="Of the adapters.", rich_help_panel=RECIPE)
    ] = 64,
    alpha: Annotated[
        int,
        typer.Option(
            min=1,
            help="Scale of the adapters, before it is divided by the rank.",
            rich_help_panel=RECIPE,
        ),
    ] = 16,
    dropout: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of an adapter's inputs that is zeroed.",
            rich_help_panel=RECIPE,
        ),
    ] = 0.05,
    no_gradient_checkpointing: NoGradientCheckpointing = False,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile each layer first: minutes once, then faster steps.",
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Of the adapters, the order and the dropout.")
    ] = 0,
    save_every: Annotated[
        int, typer.Option(min=1, help="Steps from one checkpoint to the next.")
    ] = 100,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.")
    ] = False,
    gpu: Annotated[
        float | None,
        typer.Option(
            help="Memory that the run may take, in GiB.",
            show_default="what is free on the GPU",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Start although it is estimated not to fit."),
    ] = False,
    codebook: CodebookName = None,
    block_size: BlockSize = None,
    no_double_quant: NoDoubleQuant = False,
    compute_dtype: ComputeDtype = None,
    skip_module: SkipModules = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train adapters beside a model in 4 bits, and save them.

    The defaults are the recipe of the paper. All data are checked before anything is
    loaded, and the memory before anything is trained; exit code 3 if the run does not
    fit. After Ctrl-C the same command with --resume goes on from the last checkpoint.

    Example: `qlora finetune Qwen/Qwen3-0.6B pairs.jsonl out --steps 500`
    """
    asked = asked_for(
        codebook=codebook,
        block_size=block_size,
        no_double_quant=no_double_quant,
        compute_dtype=compute_dtype,
        skip_modules=skip_module,
    )
    if batch_size % gradient_accumulation:
        raise typer.BadParameter(
            f"--batch-size {batch_size} cannot be computed in "
            f"{gradient_accumulation} equal parts: choose a divisor of it"
        )
    if dropout == 1:
        raise typer.BadParameter("--dropout 1 leaves nothing to learn: choose below 1")
    with working():
        import torch
        from safetensors import SafetensorError

        from qlora_lib.finetuning import training
        from qlora_lib.finetuning.data import encode_pairs
        from qlora_lib.finetuning.loading import (
            load_config,
            load_model,
            load_tokenizer,
            quantization_of,
        )
        from qlora_lib.finetuning.packing import pack as pack_pairs
        from qlora_lib.finetuning.reading import ANSWER_CUE

        _check_out(out, resume)
        pairs = _read(data, split)
        say(f"Read {len(pairs)} pairs")
        quantization = quantization_of(config := load_config(model), **asked)
        tokenizer = load_tokenizer(model)
        examples: Sequence[Example] = encode_pairs(pairs, tokenizer, max_length)
        if pack:
            examples = pack_pairs(examples, max_length)
        run = {
            "batch_size": batch_size,
            "gradient_accumulation": gradient_accumulation,
            "sequence_length": max(len(example["input_ids"]) for example in examples),
            "rank": rank,
            "gradient_checkpointing": not no_gradient_checkpointing,
        }
        if gpu is None:
            gpu = free_memory(device)
        needed = None
        if gpu is not None:
            needed = check_memory(config, quantization, run, gpu, force)

        say(f"Loading {model}")
        # Also the seed of the adapters.
        torch.manual_seed(seed)
        adapted = training.add_adapters(
            load_model(model, device=device, **asked), rank, alpha, dropout
        )
        bar = sys.stderr.isatty()
        try:
            losses = training.finetune(
                adapted,
                tokenizer,
                examples,
                steps=steps,
                output_dir=out,
                save_every=save_every,
                resume=resume,
                batch_size=batch_size,
                gradient_accumulation=gradient_accumulation,
                learning_rate=learning_rate,
                gradient_checkpointing=not no_gradient_checkpointing,
                compile_layers=compile,
                seed=seed,
                progress=bar,
                callbacks=[] if bar else log_lines(),
            )
            _check_losses(losses)
            _save_adapter(adapted, out)
        except (KeyboardInterrupt, OSError, RuntimeError, SafetensorError) as error:
            error.add_note(_how_to_resume(out, ctx))
            raise
    result = {
        "out": str(out),
        "pairs": len(pairs),
        "steps": steps,
        "losses": losses,
        "estimated_bytes": None if needed is None else needed.on_card,
    }
    text = (
        f"{out}: an adapter of {steps} steps, loss {losses[0]:.3f} at first and "
        f"{losses[-1]:.3f} at last"
    )
    words = ["qlora", "generate", model, "--adapter", str(out), *as_words(asked)]
    if pairs[0].cue == ANSWER_CUE:
        words.append("--instruction")
    show_result(result, as_json, text, f"Ask it: {shlex.join(words)} --prompt TEXT")


def _check_losses(losses: list[float]) -> None:
    for step, loss in enumerate(losses, 1):
        if not math.isfinite(loss):
            raise CommandError(
                f"the loss of step {step} is {loss}: no adapter was saved. Start again "
                "with a smaller --learning-rate, in another OUT"
            )


def _check_out(out: Path, resume: bool) -> None:
    from qlora_lib.finetuning.checkpoints import checkpoints

    if out.exists() and not out.is_dir():
        raise CommandError(f"OUT={str(out)!r} is a file: name a folder")
    found = checkpoints(out)
    if resume and not found:
        raise CommandError(
            f"OUT={str(out)!r} holds no checkpoint to resume from: start without "
            "--resume, in a folder that is new or empty"
        )
    if not resume and out.is_dir() and any(out.iterdir()):
        cure = f"pass --resume to go on from {found[-1].name}, or " if found else ""
        raise CommandError(
            f"OUT={str(out)!r} is a folder that is not empty: {cure}name another"
        )


def _read(data: str, split: str) -> list[InstructionPair]:
    from qlora_lib.finetuning.reading import read_hub_dataset, read_jsonl

    if Path(data).suffix == ".jsonl" and not Path(data).is_dir():
        return read_jsonl(data)
    return read_hub_dataset(data, split)


def _save_adapter(model: PeftModel, out: Path) -> None:
    """Write the adapter beside the checkpoints, its configuration last.

    A folder without ``adapter_config.json`` does not pass for an adapter.
    """
    from peft.utils import CONFIG_NAME

    from qlora_lib.finetuning.saving import whole_folder

    staged = out / STAGED
    with whole_folder(staged, replace=True) as folder:
        model.save_pretrained(str(folder))
    for file in sorted(staged.iterdir(), key=lambda file: file.name == CONFIG_NAME):
        file.replace(out / file.name)
    staged.rmdir()


def _how_to_resume(out: Path, ctx: typer.Context) -> str:
    from qlora_lib.finetuning.checkpoints import checkpoints

    found = checkpoints(out)
    if not found:
        return "There was no checkpoint yet"
    words = [word for word in ctx.meta[WORDS] if word != "--resume"]
    command = shlex.join(["qlora", *words, "--resume"])
    return f"{found[-1]} is whole. To go on from it: {command}"
