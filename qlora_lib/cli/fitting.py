"""Whether a run fits on a GPU: the estimate as the commands show it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qlora_lib.cli.output import say
from qlora_lib.cli.status import DOES_NOT_FIT, CommandError
from qlora_lib.memory import MemoryEstimate, estimate_memory
from qlora_lib.memory.parts import GIB
from qlora_lib.numerics import codebook_by_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from qlora_lib.integrations.transformers import QLoRAConfig


def estimate(
    model: str | PreTrainedConfig, quantization: QLoRAConfig, **run: Any
) -> MemoryEstimate:
    """Estimate a run on a model that is quantized in that way."""
    return estimate_memory(
        model,
        codebook=codebook_by_name(quantization.codebook),
        block_size=quantization.block_size,
        double_quant=quantization.double_quant,
        **run,
    )


def free_memory(device: str | None) -> float | None:
    """Return what is free on the GPU of a run, in GiB; None if it has none."""
    if not torch.cuda.is_available() or torch.device(device or "cuda").type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] / GIB


def check_memory(
    config: PreTrainedConfig,
    quantization: QLoRAConfig,
    run: dict[str, Any],
    gpu: float,
    force: bool,
) -> MemoryEstimate:
    """Say what the run needs, and refuse one that does not fit, with what would."""

    def planned(run: dict[str, Any]) -> MemoryEstimate:
        # With the optimizer of finetune, which is the default of an estimate too.
        rows = run["batch_size"] // run["gradient_accumulation"]
        run = {**run, "batch_size": rows, "device_gib": gpu}
        return estimate(config, quantization, **run)

    needed = planned(run)
    say(f"Memory: {gib(needed.on_card)} needed, {gpu:.2f} GiB free")
    if needed.fits or force:
        return needed
    changes = []
    for suggestion in needed.suggestions:
        change = _as_options(suggestion, run["batch_size"])
        # In parts a batch has gradients in memory for longer, so this is not certain.
        if planned(run | change).fits:
            changes.append(change)
    options = ", or ".join(as_flags(_renamed(change)) for change in changes)
    cure = f"what would fit: {options}" if options else "no option makes it fit"
    raise CommandError(
        f"the run needs {gib(needed.on_card)} and {gpu:.2f} GiB are free; {cure}. With "
        "--force it starts all the same",
        exit_code=DOES_NOT_FIT,
        on_card=needed.on_card,
        free_bytes=needed.device_bytes,
        suggestions=[_renamed(change) for change in changes],
    )


def as_flags(change: dict[str, Any]) -> str:
    """Write changes of ``estimate_memory``'s arguments as options of a command."""
    return " ".join(
        "no --no-gradient-checkpointing"
        if name == "gradient_checkpointing"
        else f"--{name.replace('_', '-')} {value}"
        for name, value in change.items()
    )


def gib(size: float) -> str:
    """Write a number of bytes in GiB."""
    return f"{size / GIB:.2f} GiB"


def _as_options(suggestion: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """What estimate_memory would change, as settings of this command."""
    change = dict(suggestion)
    if (rows := change.pop("batch_size", None)) is not None:
        # The batch stays, in more parts.
        change["gradient_accumulation"] = next(
            parts
            for parts in range(1, batch_size + 1)
            if batch_size % parts == 0 and batch_size // parts <= rows
        )
    return change


def _renamed(change: dict[str, Any]) -> dict[str, Any]:
    names = {"sequence_length": "max_length"}
    return {names.get(name, name): value for name, value in change.items()}
