"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from qlora_lib.cli.status import CommandError
from qlora_lib.numerics import codebook_by_name

QUANTIZATION = "How a 16-bit model is quantized"

NoGradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--no-gradient-checkpointing",
        help="Keep all activations: faster, and much more memory.",
    ),
]


def _check_codebook(name: str | None) -> str | None:
    if name is not None:
        try:
            codebook_by_name(name)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    return name


def _check_device(name: str | None) -> str | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(f"{name!r} is no device: use cuda or cpu") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(
            f"there is no {name} here, torch sees {torch.cuda.device_count()} GPUs: "
            "use --device cpu"
        )
    return name


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Id of the hub, or folder of a model.",
        show_default=False,
    ),
]
Adapter = Annotated[
    Path,
    typer.Argument(
        metavar="ADAPTER", help="Folder of the adapter.", show_default=False
    ),
]
Out = Annotated[
    Path,
    typer.Argument(
        metavar="OUT",
        help="Folder to write, whole or not at all.",
        show_default=False,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT, with all that is in it.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result, or the error, as JSON.")
]
Device = Annotated[
    str | None,
    typer.Option(
        callback=_check_device,
        show_default="the GPU, if there is one",
        help="Where to compute: cuda, cuda:1, cpu.",
    ),
]
CodebookName = Annotated[
    str | None,
    typer.Option(
        "--codebook",
        callback=_check_codebook,
        show_default="nf4",
        help="Data type of the codes, such as nf4, fp4_e2m1, int4, nf3.",
        rich_help_panel=QUANTIZATION,
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="64",
        help="Weights that share a scale.",
        rich_help_panel=QUANTIZATION,
    ),
]
NoDoubleQuant = Annotated[
    bool,
    typer.Option(
        "--no-double-quant",
        help="Do not quantize the scales.",
        rich_help_panel=QUANTIZATION,
    ),
]
ComputeDtype = Annotated[
    str | None,
    typer.Option(
        show_default="bfloat16",
        help="Type of what is not quantized: bfloat16, float16, float32.",
        rich_help_panel=QUANTIZATION,
    ),
]
SkipModules = Annotated[
    list[str] | None,
    typer.Option(
        "--skip-module",
        show_default=False,
        help="Module to leave in 16 bits, such as down_proj. May be repeated.",
        rich_help_panel=QUANTIZATION,
    ),
]


def asked_for(no_double_quant: bool, **options: Any) -> dict[str, Any]:
    """Return what was asked for, as arguments of QLoRAConfig."""
    # typer has an empty list for an option that may be repeated and was not given.
    asked = {name: v for name, v in options.items() if v is not None and v != []}
    return asked | ({"double_quant": False} if no_double_quant else {})


def as_words(asked: dict[str, Any]) -> list[str]:
    """Write what was asked for as on the command line, the way back from asked_for."""
    words = []
    for name, value in asked.items():
        if name == "double_quant":
            words.append("--no-double-quant")
        elif name == "skip_modules":
            words += [word for module in value for word in ("--skip-module", module)]
        else:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def check_out(out: Path, overwrite: bool, *inputs: str | Path) -> None:
    """Refuse to write over something, before the work begins.

    Raises:
        CommandError: If ``out`` is a file, a folder that is not empty and shall not be
            replaced, or holds one of the inputs.
    """
    if out.exists() and not out.is_dir():
        raise CommandError(f"OUT={str(out)!r} is a file: name a folder")
    for path in inputs:
        if Path(path).exists() and Path(path).resolve().is_relative_to(out.resolve()):
            raise CommandError(
                f"OUT={str(out)!r} holds {str(path)!r}, which is read: name another "
                "folder"
            )
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise CommandError(
            f"OUT={str(out)!r} is a folder that is not empty: name another, or pass "
            "--overwrite to lose what is in it"
        )
