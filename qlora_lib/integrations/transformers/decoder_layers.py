"""What is done to each decoder layer of a model before it is trained."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Keep only the input of each decoder layer for the backward pass.

    What else the backward pass needs of a layer is computed once more when it comes to
    it (paper, section 3, "Memory requirement of parameter-efficient finetuning").

    Args:
        model: A model of transformers, with adapters of peft or without.
    """
    # transformers renamed the method; the old name warns in 5.23.
    renamed = hasattr(model, "activation_checkpointing_enable")
    name = "activation" if renamed else "gradient"
    enable: Callable[..., None] = getattr(model, f"{name}_checkpointing_enable")
    enable({"use_reentrant": False})


def compile_decoder_layers(model: nn.Module) -> None:
    """Compile each decoder layer with ``torch.compile``.

    A training step calls thousands of short functions from Python, which takes longer
    than a GPU needs to compute them. A compiled layer is one call. All decoder layers
    share one compiled program, so the first step takes a minute longer and not one for
    each layer; another length of sequences compiles a second one, for any length.

    Args:
        model: As for :func:`enable_gradient_checkpointing`.

    Raises:
        ValueError: If the model has no decoder layers that transformers knows as such.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"model is a {type(model).__name__}, which has no decoder layers to "
            "compile: train it as it is"
        )
    for layer in layers:
        layer.compile()
