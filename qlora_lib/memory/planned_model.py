"""The model of a planned run, built on the meta device: shapes without numbers."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from qlora_lib.nn import Linear4bit
from qlora_lib.numerics import Codebook

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

# The models of the paper's tables, from their published configurations (LLaMA, arXiv
# 2302.13971, table 2): hidden size, intermediate size, layers, attention heads.
LLAMA_SHAPES = {
    "llama-7b": (4096, 11008, 32, 32),
    "llama-13b": (5120, 13824, 40, 40),
    "llama-33b": (6656, 17920, 60, 52),
    "llama-65b": (8192, 22016, 80, 64),
}
LLAMA_VOCABULARY = 32000
DTYPE = torch.bfloat16


def llama_config(name: str) -> LlamaConfig:
    """The configuration of a LLaMA that the paper fine-tunes.

    Args:
        name: ``"llama-7b"``, ``"llama-13b"``, ``"llama-33b"`` or ``"llama-65b"``.

    Raises:
        ValueError: If there is no such model.
    """
    from transformers import LlamaConfig

    if name not in LLAMA_SHAPES:
        raise ValueError(
            f"name must be one of {', '.join(LLAMA_SHAPES)}, got {name!r}: for another "
            "model pass its configuration, transformers.AutoConfig.from_pretrained(...)"
        )
    hidden, intermediate, layers, heads = LLAMA_SHAPES[name]
    return LlamaConfig(
        vocab_size=LLAMA_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=False,
    )


def planned_model(
    source: str | PreTrainedConfig | PreTrainedModel,
    *,
    weights: Literal["4bit", "16bit"],
    trained: Literal["adapters", "all"],
    rank: int,
    codebook: Codebook,
    block_size: int | None,
    double_quant: bool,
) -> nn.Module:
    """The model as it would be trained, in bfloat16 and on the meta device.

    It takes no memory for its numbers, and asks no hub. Linear layers become
    :class:`~qlora_lib.Linear4bit` but for the output layer; layers that ``source``
    holds in 4 bits already are taken over as they are. The arguments are those of
    :func:`qlora_lib.estimate_memory`.

    Raises:
        TypeError: If ``source`` is none of the three types.
        ValueError: If ``source`` names no known model, has adapters already, or has no
            layer to quantize.
    """
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    given = source if isinstance(source, nn.Module) else None
    config = llama_config(source) if isinstance(source, str) else source
    config = getattr(config, "config", config)
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            "config_or_model must be a configuration of transformers, a model of it, "
            f"or a name such as 'llama-7b', got {type(source).__name__}"
        )
    if getattr(given, "peft_config", None):
        raise ValueError(
            "config_or_model has adapters already: pass the model without them, or its "
            "configuration"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=DTYPE)
    model.config.use_cache = False
    model.requires_grad_(trained == "all")
    if weights == "4bit":
        _quantize(model, given, codebook, block_size, double_quant)
    return model if trained == "all" else _with_adapters(model, rank)


def _quantize(
    model: PreTrainedModel,
    given: nn.Module | None,
    codebook: Codebook,
    block_size: int | None,
    double_quant: bool,
) -> None:
    """Replace the linear layers, or those that are replaced in ``given`` already."""
    from qlora_lib.integrations.transformers.layers import (
        empty_weight,
        linear_layers,
        replace_layer,
    )

    layers = dict(given.named_modules()) if given is not None else {}
    in_4_bits = {name for name, m in layers.items() if isinstance(m, Linear4bit)}
    names = [
        name for name in linear_layers(model, ()) if not in_4_bits or name in in_4_bits
    ]
    for name in names:
        layer = layers.get(name)
        if isinstance(layer, Linear4bit):
            weight = layer.quantized_weight.to("meta")
        else:
            weight = empty_weight(
                model.get_submodule(name), codebook, block_size, double_quant, DTYPE
            )
        replace_layer(model, name, weight)
    if not names:
        raise ValueError(
            f"config_or_model is a {type(model).__name__}, which has no linear layer "
            "to quantize: pass a causal language model with linear layers"
        )


def _with_adapters(model: PreTrainedModel, rank: int) -> nn.Module:
    """Adapters on all linear layers but the output layer (paper, section 4)."""
    import peft

    import qlora_lib.integrations.peft  # noqa: F401 - tells peft about Linear4bit

    output_layer = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output_layer
    ]
    lora = peft.LoraConfig(r=rank, target_modules=names, task_type="CAUSAL_LM")
    with torch.device("meta"), warnings.catch_warnings():
        # That no adapters were found for fused experts, which are to have none.
        warnings.simplefilter("ignore", RuntimeWarning)
        # And that this version of peft asks transformers by an old name.
        warnings.simplefilter("ignore", FutureWarning)
        adapted: nn.Module = peft.get_peft_model(model, lora)
    return adapted
