"""``qlora quantize``: a 4-bit model in a folder."""

from __future__ import annotations

from enum import StrEnum
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
    Out,
    Overwrite,
    SkipModules,
    asked_for,
    check_out,
)
from qlora_lib.cli.output import say, show_result, working


class Format(StrEnum):
    """Whose files are written."""

    qlora = "qlora"
    bitsandbytes = "bitsandbytes"


def quantize(
    model: Model,
    out: Out,
    format: Annotated[
        Format,
        typer.Option(
            help="qlora: to be loaded with this library. bitsandbytes: with "
            "transformers and bitsandbytes, or vLLM."
        ),
    ] = Format.qlora,
    codebook: CodebookName = None,
    block_size: BlockSize = None,
    no_double_quant: NoDoubleQuant = False,
    compute_dtype: ComputeDtype = None,
    skip_module: SkipModules = None,
    device: Device = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Quantize a model and save it, with its tokenizer.

    Weight by weight: the peak is the quantized model and one weight of the dense one.

    Example: `qlora quantize Qwen/Qwen3-0.6B qwen-4bit`
    """
    asked = asked_for(
        codebook=codebook,
        block_size=block_size,
        no_double_quant=no_double_quant,
        compute_dtype=compute_dtype,
        skip_modules=skip_module,
    )
    check_out(out, overwrite, model)
    with working():
        from qlora_lib.finetuning.loading import load_model, load_tokenizer
        from qlora_lib.finetuning.saving import whole_folder
        from qlora_lib.integrations.transformers import save_bitsandbytes
        from qlora_lib.nn import Linear4bit

        tokenizer = load_tokenizer(model)
        say(f"Loading {model}")
        loaded = load_model(model, device=device, **asked)
        layers = [m for m in loaded.modules() if isinstance(m, Linear4bit)]
        say(f"Saving {out}")
        with whole_folder(out, replace=overwrite) as folder:
            if format is Format.bitsandbytes:
                save_bitsandbytes(loaded, folder)
            else:
                loaded.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    weights = [layer.quantized_weight for layer in layers]
    stored = sum(weight.nbytes for weight in weights)
    bits = 8 * stored / sum(weight.shape.numel() for weight in weights)
    result = {
        "out": str(out),
        "format": format.value,
        "layers": len(layers),
        "codebook": weights[0].codebook.name,
        "block_size": weights[0].block_size,
        "bits_per_parameter": bits,
        "bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
    }
    text = f"{out}: {len(layers)} layers, {bits:.3f} bits for each of their weights"
    show_result(result, as_json, text)
