"""What a planned run needs, part by part, whether it fits, and what would."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from qlora_lib.memory.optimizers import DEFAULT_OPTIMIZER, OPTIMIZERS
from qlora_lib.memory.parts import (
    BEYOND_ALLOCATOR,
    GIB,
    Change,
    MemoryEstimate,
    MemoryParts,
)
from qlora_lib.memory.planned_model import planned_model
from qlora_lib.memory.rehearsal import rehearse
from qlora_lib.nn import Linear4bit
from qlora_lib.numerics import NF4, Codebook
from qlora_lib.numerics.quantized_tensor import check_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# cuBLAS has a workspace of this size for each thread that multiplies, that of the
# forward and that of the backward pass, from torch's allocator: on an H100 and its
# successors (ATen/cuda/CublasHandlePool.cpp); GPUs before have smaller ones.
CUBLAS_WORKSPACES = 2 * 32 * 2**20


@dataclass(frozen=True)
class _Run:
    """The settings that decide on memory and that a suggestion may change."""

    batch_size: int
    sequence_length: int
    rank: int
    optimizer: str
    gradient_checkpointing: bool
    gradient_accumulation: int


def estimate_memory(
    config_or_model: str | PreTrainedConfig | PreTrainedModel,
    *,
    batch_size: int = 1,
    sequence_length: int = 512,
    rank: int = 64,
    optimizer: str = DEFAULT_OPTIMIZER,
    gradient_checkpointing: bool = True,
    gradient_accumulation: int = 1,
    weights: Literal["4bit", "16bit"] = "4bit",
    trained: Literal["adapters", "all"] = "adapters",
    codebook: Codebook = NF4,
    block_size: int | None = 64,
    double_quant: bool = True,
    device_gib: float | None = None,
) -> MemoryEstimate:
    """Estimate the GPU memory of a fine-tuning step, without a GPU.

    The model is built on the meta device, where tensors have a shape and no numbers,
    with 4-bit weights and adapters on all linear layers. A step of it is run there, and
    every byte counted that it would have allocated. So nothing is downloaded, and the
    architecture may be any of transformers. Counted is a step after the first, when
    the optimizer has its state, in bfloat16 with float32 adapters (paper, section 3).

    A product with a 4-bit weight is taken to dequantize it as a whole, as it does with
    many rows. Dropout, whose masks live for one product, is not
    counted. Experts of a mixture that are fused to one parameter are
    counted in 16 bits and without adapters.

    Args:
        config_or_model: A configuration of transformers, a model of it, dense or with
            4-bit layers but without adapters, or the name of a model of the paper:
            ``"llama-7b"``, ``"llama-13b"``, ``"llama-33b"`` or ``"llama-65b"``.
        batch_size: Sequences that are computed at a time.
        sequence_length: Tokens of a sequence.
        rank: Rank of the adapters.
        optimizer: "qlora_paged_adamw_32bit" or "qlora_paged_adamw_8bit" for
            :class:`~qlora_lib.PagedAdamW`, whose state is paged as a whole; on the card
            it has to have room for four pages while it takes a step. Or a name from
            ``TrainingArguments(optim=...)``: "adamw_torch_fused", "adamw_torch", and of
            bitsandbytes "adamw_8bit", "paged_adamw_32bit" or "paged_adamw_8bit", which
            page large tensors only.
        gradient_checkpointing: Whether to keep only the input of each layer, and to
            compute the layer once more in the backward pass.
        gradient_accumulation: Batches whose gradients are added before the optimizer
            takes its step. Those after the first find gradients in memory.
        weights: Whether the weights of linear layers have 4 or 16 bits.
        trained: ``"adapters"``, or ``"all"`` for full fine-tuning of 16-bit weights
            with gradients in 16 bits. Adam's state is counted in 32 bits there too, as
            the paper counts.
        codebook: The data type of 4-bit weights; its width in bits matters.
        block_size: How many weights share a scale.
        double_quant: Whether the scales are quantized.
        device_gib: Memory of the card in GiB, to answer whether the run fits.

    Raises:
        TypeError: If ``config_or_model`` is none of these, ``codebook`` is no Codebook,
            or ``block_size`` no integer.
        ValueError: If a name is unknown, a number is below 1, weights of 4 bits shall
            be trained, or there is no linear layer to quantize.
    """
    run = _Run(
        batch_size,
        sequence_length,
        rank,
        optimizer,
        gradient_checkpointing,
        gradient_accumulation,
    )
    plan = {
        "weights": weights,
        "trained": trained,
        "codebook": codebook,
        "block_size": block_size,
        "double_quant": double_quant,
    }
    _check(run, weights, trained, device_gib)
    check_arguments(torch.zeros(1), codebook, block_size)
    estimate = _estimate(config_or_model, run, plan)
    if device_gib is None:
        return estimate
    device_bytes = int(device_gib * GIB)
    estimate = dataclasses.replace(estimate, device_bytes=device_bytes)
    if estimate.fits:
        return estimate
    suggestions = _suggest(config_or_model, run, plan, estimate.on_card, device_bytes)
    return dataclasses.replace(estimate, suggestions=suggestions)


def _estimate(source: Any, run: _Run, plan: dict[str, Any]) -> MemoryEstimate:
    model = planned_model(source, rank=run.rank, **plan)
    live = rehearse(
        model,
        run.batch_size,
        run.sequence_length,
        run.gradient_checkpointing,
        run.gradient_accumulation,
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = OPTIMIZERS[run.optimizer](trained)
    held = dataclasses.replace(
        _model_parts(model, plan["trained"]),
        optimizer_state=adam.state,
        workspace=CUBLAS_WORKSPACES,
    )
    phases = {phase: _add(held, parts) for phase, parts in live.peaks.items()}
    optimizing = live.live + Counter(workspace=adam.step)
    phases["optimizer"] = _add(held, optimizing)
    return MemoryEstimate(
        largest=_add(held, live.largest | optimizing),
        phases=phases,
        paged_state=adam.paged_state,
    )


def _model_parts(model: nn.Module, trained: str) -> MemoryParts:
    """The bytes of a model's parameters and buffers, each storage counted once."""
    sizes = dict.fromkeys(("weights", "scales", "sixteen_bit", "adapters"), 0)
    seen = set()
    output_layer = model.get_output_embeddings()  # type: ignore[operator]
    for module in model.modules():
        own = (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        )
        for name, tensor in own:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            part = "sixteen_bit"
            if trained == "adapters" and tensor.requires_grad:
                part = "adapters"
            elif isinstance(module, Linear4bit) and "scales" in name:
                part = "scales"
            elif isinstance(module, nn.Linear) and name == "weight":
                part = "sixteen_bit" if module is output_layer else "weights"
            sizes[part] += tensor.nbytes
    return MemoryParts(**sizes)


def _add(held: MemoryParts, parts: Mapping[str, int]) -> MemoryParts:
    added = {part: getattr(held, part) + size for part, size in parts.items()}
    return dataclasses.replace(held, **added)


def _suggest(
    source: Any, run: _Run, plan: dict[str, Any], on_card: int, device_bytes: int
) -> tuple[Change, ...]:
    """Each change that is enough by itself, or else the first sum of them that is.

    A sum has no change that saves nothing.
    """

    def needed_by(change: Change) -> int:
        changed = dataclasses.replace(run, **change)
        return _estimate(source, changed, plan).on_card

    def fits(change: Change) -> bool:
        return needed_by(change) <= device_bytes

    least = _model_parts(planned_model(source, rank=1, **plan), plan["trained"])
    if least.total + BEYOND_ALLOCATOR > device_bytes:
        return ()
    levers = _levers(run)
    enough = []
    for steps in levers:
        if steps and fits(steps[-1]):
            # The mildest change that is enough.
            enough.append(next(change for change in steps if fits(change)))
    if enough:
        return tuple(enough)
    together: Change = {}
    for steps in levers:
        for change in steps:
            needed = needed_by(together | change)
            if needed < on_card:
                together, on_card = together | change, needed
            if needed <= device_bytes:
                return (together,)
    return ()


def _levers(run: _Run) -> list[list[Change]]:
    """What can be changed, cheapest first, and how far."""
    levers: list[list[Change]] = []
    if not run.gradient_checkpointing:
        levers.append([{"gradient_checkpointing": True}])
    if run.optimizer != DEFAULT_OPTIMIZER:
        levers.append([{"optimizer": DEFAULT_OPTIMIZER}])
    for name, least in (("batch_size", 1), ("sequence_length", 128), ("rank", 8)):
        value, steps = getattr(run, name) // 2, []
        while value >= least:
            steps.append({name: value})
            value //= 2
        levers.append(steps)
    return levers


def _check(run: _Run, weights: str, trained: str, device_gib: float | None) -> None:
    for name in ("batch_size", "sequence_length", "rank", "gradient_accumulation"):
        value = getattr(run, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    choices = {
        "optimizer": (run.optimizer, tuple(OPTIMIZERS)),
        "weights": (weights, ("4bit", "16bit")),
        "trained": (trained, ("adapters", "all")),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    if (weights, trained) == ("4bit", "all"):
        raise ValueError(
            "trained='all' needs weights='16bit': weights in 4 bits are frozen, and "
            "adapters are trained beside them"
        )
    if device_gib is not None and not 0 < device_gib < math.inf:
        raise ValueError(
            f"device_gib must be the memory of the card in GiB, got {device_gib!r}"
        )
