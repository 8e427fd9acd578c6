"""``qlora generate``: a model's answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qlora_lib.cli.options import (
    BlockSize,
    CodebookName,
    ComputeDtype,
    Device,
    Json,
    Model,
    NoDoubleQuant,
    SkipModules,
    asked_for,
)
from qlora_lib.cli.output import say, show_result, working


def generate(
    model: Model,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of an adapter.", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="What is asked.", show_default="the standard input"),
    ] = None,
    instruction: Annotated[
        bool,
        typer.Option(
            "--instruction",
            help="Lay the prompt out as in training on keys instruction and output.",
        ),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 for the most likely token each time.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the probability drawn from."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    dense: Annotated[
        bool, typer.Option("--dense", help="Leave a 16-bit model in 16 bits.")
    ] = False,
    codebook: CodebookName = None,
    block_size: BlockSize = None,
    no_double_quant: NoDoubleQuant = False,
    compute_dtype: ComputeDtype = None,
    skip_module: SkipModules = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Ask a model, with an adapter or without.

    Example: `qlora generate Qwen/Qwen3-0.6B --adapter out --prompt "Why?"`

    Or from a file: `qlora generate out-merged --dense < question.txt`
    """
    asked = asked_for(
        codebook=codebook,
        block_size=block_size,
        no_double_quant=no_double_quant,
        compute_dtype=compute_dtype,
        skip_modules=skip_module,
    )
    if top_p == 0:
        raise typer.BadParameter("--top-p 0 leaves no token: choose above 0")
    if dense and asked:
        options = ", ".join(asked)
        raise typer.BadParameter(f"--dense does not quantize: leave out {options}")
    if prompt is None:
        if sys.stdin.isatty():
            raise typer.BadParameter("pass --prompt TEXT, or pipe the prompt in")
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise typer.BadParameter("the prompt is blank: pass --prompt TEXT")
    with working():
        import torch

        from qlora_lib.finetuning import generation
        from qlora_lib.finetuning.data import InstructionPair
        from qlora_lib.finetuning.loading import load_model, load_tokenizer
        from qlora_lib.finetuning.reading import alpaca_pair
        from qlora_lib.integrations.peft import load_adapter

        tokenizer = load_tokenizer(model)
        say(f"Loading {model}")
        loaded = load_model(model, device=device, dense=dense, **asked)
        pair = alpaca_pair(prompt) if instruction else InstructionPair(prompt, "")
        torch.manual_seed(seed)
        answer = generation.generate(
            load_adapter(loaded, adapter) if adapter is not None else loaded,
            tokenizer,
            pair.prompt,
            cue=pair.cue,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
        )
    show_result({"prompt": prompt, "answer": answer}, as_json, answer)
