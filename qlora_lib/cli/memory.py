"""``qlora memory``: what a run needs, and whether it fits."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_lib.cli.fitting import as_flags, estimate, gib
from qlora_lib.cli.options import (
    QUANTIZATION,
    BlockSize,
    CodebookName,
    Json,
    NoDoubleQuant,
    NoGradientCheckpointing,
    asked_for,
)
from qlora_lib.cli.output import show_result, working
from qlora_lib.cli.status import DOES_NOT_FIT
from qlora_lib.memory.optimizers import DEFAULT_OPTIMIZER, OPTIMIZERS
from qlora_lib.memory.parts import GIB
from qlora_lib.memory.planned_model import LLAMA_SHAPES

if TYPE_CHECKING:
    from rich.table import Table

    from qlora_lib.memory import MemoryEstimate


class Weights(StrEnum):
    """Width of the base model's weights."""

    four = "4bit"
    sixteen = "16bit"


class Trained(StrEnum):
    """What gets gradients."""

    adapters = "adapters"
    all = "all"


def memory(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Id of the hub, folder of a model, or one of the paper's: "
            + ", ".join(LLAMA_SHAPES),
            show_default=False,
        ),
    ],
    gpu: Annotated[
        float | None,
        typer.Option(
            help="Memory of the GPU in GiB.", show_default="that of the GPU here"
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Sequences that are computed at a time.")
    ] = 1,
    sequence_length: Annotated[
        int, typer.Option(min=1, help="Tokens of a sequence.")
    ] = 512,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 64,
    optimizer: Annotated[
        str,
        typer.Option(
            help="The first is that of qlora finetune; those without qlora are named "
            f"as in transformers: {', '.join(OPTIMIZERS)}."
        ),
    ] = DEFAULT_OPTIMIZER,
    no_gradient_checkpointing: NoGradientCheckpointing = False,
    gradient_accumulation: Annotated[
        int, typer.Option(min=1, help="Batches before the optimizer takes its step.")
    ] = 1,
    weights: Annotated[
        Weights,
        typer.Option(help="Of linear layers.", rich_help_panel=QUANTIZATION),
    ] = Weights.four,
    trained: Annotated[
        Trained, typer.Option(help="all needs 16-bit weights.")
    ] = Trained.adapters,
    codebook: CodebookName = None,
    block_size: BlockSize = None,
    no_double_quant: NoDoubleQuant = False,
    as_json: Json = False,
) -> None:
    """Estimate the memory of a fine-tuning run, without weights and without a GPU.

    Exit code 3 if it does not fit; the table is followed by what would.

    Example: `qlora memory llama-7b --gpu 24 --sequence-length 2048`
    """
    asked = asked_for(
        codebook=codebook, block_size=block_size, no_double_quant=no_double_quant
    )
    run = {
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "rank": rank,
        "optimizer": optimizer,
        "gradient_checkpointing": not no_gradient_checkpointing,
        "gradient_accumulation": gradient_accumulation,
        "weights": weights.value,
        "trained": trained.value,
        "device_gib": gpu if gpu is not None else _memory_here(),
    }
    with working():
        found = _estimate(model, asked, run)
    result = {
        "model": model,
        **run,
        "fits": found.fits,
        "on_card": found.on_card,
        "peak": found.peak,
        "peak_phase": found.peak_phase,
        "paged_state": found.paged_state,
        "device_bytes": found.device_bytes,
        "phases": {name: dataclasses.asdict(p) for name, p in found.phases.items()},
        "suggestions": list(found.suggestions),
    }
    show_result(result, as_json, _table(model, found), *_answer(found))
    if found.fits is False:
        raise typer.Exit(DOES_NOT_FIT)


def _memory_here() -> float | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info()[1] / GIB


def _estimate(model: str, asked: dict[str, Any], run: dict[str, Any]) -> MemoryEstimate:
    from qlora_lib.finetuning.loading import load_config, quantization_of
    from qlora_lib.integrations.transformers import QLoRAConfig

    if model in LLAMA_SHAPES:
        return estimate(model, QLoRAConfig(**asked), **run)
    config = load_config(model)
    return estimate(config, quantization_of(config, **asked), **run)


def _table(model: str, found: MemoryEstimate) -> Table:
    from rich.table import Table

    table = Table(title=f"{model}: memory at the peak, in the {found.peak_phase} phase")
    table.add_column("what for")
    table.add_column("GiB", justify="right")
    for name, size in dataclasses.asdict(found.at_peak).items():
        if size:
            table.add_row(name.replace("_", " "), f"{size / GIB:.3f}")
    table.add_section()
    table.add_row("in use at the peak", f"{found.peak / GIB:.3f}")
    table.add_row("on the card, with an allowance", f"{found.on_card / GIB:.3f}")
    if found.paged_state:
        table.add_row(
            "paged, for which the host has room", f"{found.paged_state / GIB:.3f}"
        )
    return table


def _answer(found: MemoryEstimate) -> list[str]:
    if found.device_bytes is None:
        return ["Pass --gpu GIB to see whether it fits."]
    card = f"a GPU of {gib(found.device_bytes)}"
    if found.fits:
        return [f"Fits on {card}."]
    lines = [f"Does not fit on {card}: it needs {gib(found.on_card)}."]
    if not found.suggestions:
        return [*lines, "No setting makes it fit: take a larger GPU, a smaller model."]
    return [*lines, "Would fit:", *(f"  {as_flags(s)}" for s in found.suggestions)]
