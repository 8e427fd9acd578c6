"""An estimate, part by part and phase by phase."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

GIB = 2**30

# Arguments of estimate_memory, and what to pass for them instead.
Change = dict[str, Any]

# What a card holds beyond the bytes in use: the CUDA context, the code of the
# libraries, and cached memory in pieces too small for the next tensor. An allowance;
# experiments/memory.py measures it.
BEYOND_ALLOCATOR = 3 * GIB // 2


@dataclass(frozen=True)
class MemoryParts:
    """Bytes on the GPU, by what they are for.

    Attributes:
        weights: Weights of the linear layers: packed codes, or 16 bits each.
        scales: What dequantizes the codes: scales, their own scales and their mean.
        sixteen_bit: What stays in 16 bits: embeddings, norms, biases, output layer.
        adapters: LoRA matrices, in float32.
        optimizer_state: Adam's two moments, where they are not paged.
        gradients: Of what is trained, in its type.
        checkpoints: Inputs of layers, kept to compute the layer once more.
        activations: What layers keep for their backward pass, of one layer at a time
            with gradient checkpointing, and their temporaries.
        logits: Logits, their float32 copy, log-probabilities, and their gradients.
        workspace: A weight dequantized for one product, the workspace of cuBLAS, and,
            while the optimizer takes its step, its temporaries, or the pages of state
            that come and go.
    """

    weights: int = 0
    scales: int = 0
    sixteen_bit: int = 0
    adapters: int = 0
    optimizer_state: int = 0
    gradients: int = 0
    checkpoints: int = 0
    activations: int = 0
    logits: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        """Sum of the parts in bytes."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run takes of a GPU; sizes in bytes.

    Attributes:
        largest: The most that each part ever has. They do not come together, so their
            sum is above the peak.
        phases: The parts when most is in use, in each phase of a step after the first:
            ``"forward"`` up to the loss, ``"backward"``, and ``"optimizer"``.
        paged_state: Optimizer state in pages, which move to the host when the card is
            full and are no part of the peak. The host needs room for all of it;
            :class:`~qlora_lib.PagedAdamW` takes that room in its first step.
        device_bytes: Memory of the card to fit on, or None.
        suggestions: Changes of the arguments of :func:`estimate_memory` with which the
            run fits, each estimated; empty if it fits already, or if none was found.
    """

    largest: MemoryParts
    phases: dict[str, MemoryParts]
    paged_state: int = 0
    device_bytes: int | None = None
    suggestions: tuple[Change, ...] = ()

    @property
    def peak_phase(self) -> str:
        """The phase in which most is in use."""
        return max(self.phases, key=lambda phase: self.phases[phase].total)

    @property
    def at_peak(self) -> MemoryParts:
        """The parts when most is in use."""
        return self.phases[self.peak_phase]

    @property
    def peak(self) -> int:
        """Most bytes in use at a time, as ``torch.cuda.max_memory_allocated`` has."""
        return self.at_peak.total

    @property
    def on_card(self) -> int:
        """Bytes that the card needs: the peak, and an allowance for what comes with it.

        Paged state is not in it, since it gives way.
        """
        return self.peak + BEYOND_ALLOCATOR

    @property
    def fits(self) -> bool | None:
        """Whether the card is large enough; None if no card was named."""
        return None if self.device_bytes is None else self.on_card <= self.device_bytes
