"""``qlora merge``: an adapter becomes part of its model."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from qlora_lib.cli.options import (
    Adapter,
    BlockSize,
    CodebookName,
    ComputeDtype,
    Device,
    Json,
    Model,
    NoDoubleQuant,
    Out,
    Overwrite,
    SkipModules,
    asked_for,
    check_out,
)
from qlora_lib.cli.output import say, show_result, working


def merge(
    model: Model,
    adapter: Adapter,
    out: Out,
    into_4bit: Annotated[
        bool,
        typer.Option(
            "--into-4bit",
            help="Quantize the sum again, and report the error. Much of what was "
            "learned may be rounded away.",
        ),
    ] = False,
    codebook: CodebookName = None,
    block_size: BlockSize = None,
    no_double_quant: NoDoubleQuant = False,
    compute_dtype: ComputeDtype = None,
    skip_module: SkipModules = None,
    device: Device = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its model and save it, with its tokenizer.

    The result is an ordinary 16-bit model. Quantize as for the training: the adapter
    was trained beside those weights.

    Example: `qlora merge Qwen/Qwen3-0.6B out out-merged`
    """
    asked = asked_for(
        codebook=codebook,
        block_size=block_size,
        no_double_quant=no_double_quant,
        compute_dtype=compute_dtype,
        skip_modules=skip_module,
    )
    check_out(out, overwrite, model, adapter)
    result: dict[str, Any] = {"out": str(out), "bits": 4 if into_4bit else 16}
    text = f"{out}: merged, in {result['bits']} bits"
    with working():
        from qlora_lib.finetuning.loading import load_model, load_tokenizer
        from qlora_lib.finetuning.saving import whole_folder
        from qlora_lib.integrations.peft import (
            load_adapter,
            merge_dequantized,
            merge_into_4bit,
        )

        tokenizer = load_tokenizer(model)
        say(f"Loading {model}")
        adapted = load_adapter(load_model(model, device=device, **asked), adapter)
        merged: Any
        if into_4bit:
            report = merge_into_4bit(adapted)
            merged = report.model
            errors = {k: dataclasses.asdict(v) for k, v in report.layers.items()}
            result["merge_error"] = dataclasses.asdict(report.total)
            result["merge_error_of_layers"] = errors
            text += (
                f". Rounding changes the weights by {report.total.weight:.2%}, which "
                f"is {report.total.update:.2f} times what the adapter does"
            )
        else:
            merged = merge_dequantized(adapted)
        say(f"Saving {out}")
        with whole_folder(out, replace=overwrite) as folder:
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    show_result(result, as_json, text)
