"""Write a checkpoint that transformers with bitsandbytes can read."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_lib.integrations.bitsandbytes import CODEBOOKS, to_state_dict
from qlora_lib.integrations.transformers.config import QLoRAConfig
from qlora_lib.integrations.transformers.quantizer import QLoRAQuantizer
from qlora_lib.nn import Linear4bit


def save_bitsandbytes(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    max_shard_size: int | str = "50GB",
) -> None:
    """Save a model so that transformers with bitsandbytes, and so vLLM, can load it.

    Codes and scales are written as they are: bitsandbytes dequantizes each weight to
    the same bits. The model itself is left as it is.

    Args:
        model: A model of transformers with Linear4bit layers, quantized to ``NF4`` or
            ``FP4_BITSANDBYTES`` in blocks of 32, 64, ..., 4096.
        folder: Where to write ``config.json`` and the safetensors files.
        max_shard_size: Bytes a file may have, as in ``save_pretrained``.

    Raises:
        TypeError: If ``model`` is no model of transformers, such as one with adapters.
        ValueError: If it has no Linear4bit, has one with adapters around it, or the
            format has no place for one: another codebook, block size or dtype. Nothing
            is written then.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a PreTrainedModel, got {type(model).__name__}: merge its "
            "adapters, or pass its base model"
        )
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }
    if not layers:
        raise ValueError(
            f"model must have Linear4bit layers, and this {type(model).__name__} has "
            "none: save it with save_pretrained"
        )
    entries: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if name.endswith(".base_layer"):
            raise ValueError(
                f"model has an adapter around {name}, which the format has no place "
                "for: merge or unload it first"
            )
        try:
            entries |= to_state_dict(layer.quantized_weight, f"{name}.weight")
        except ValueError as error:
            raise ValueError(f"{name} cannot be saved: {error}") from error
    own = {
        f"{name}.{entry}"
        for name, layer in layers.items()
        for entry, _ in layer.named_parameters()
        if entry != "bias"
    }
    dense = {key: value for key, value in model.state_dict().items() if key not in own}
    _save_with(
        model,
        _BitsandbytesWriter(dense | entries),
        _their_config(model, layers),
        folder,
        max_shard_size,
    )


class _BitsandbytesWriter(QLoRAQuantizer):
    """Hands ``save_pretrained`` the entries in place of the model's own."""

    def __init__(self, entries: dict[str, Tensor]) -> None:
        super().__init__(QLoRAConfig())
        self.entries = entries

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        return self.entries, {}


def _their_config(
    model: PreTrainedModel, layers: dict[str, Linear4bit]
) -> dict[str, Any]:
    """``quantization_config`` of config.json as transformers writes it."""
    layer = next(iter(layers.values()))
    (quant_type,) = [key for key, each in CODEBOOKS.items() if each == layer.codebook]
    dense = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not isinstance(module, Linear4bit)
    ]
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": layer.nested_scales is not None,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": dense,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def _save_with(
    model: PreTrainedModel,
    quantizer: QLoRAQuantizer,
    quantization_config: dict[str, Any],
    folder: str | os.PathLike[str],
    max_shard_size: int | str,
) -> None:
    """``save_pretrained`` with another quantizer and config, put back afterwards."""
    missing = object()
    old_quantizer = getattr(model, "hf_quantizer", missing)
    old_config = getattr(model.config, "quantization_config", missing)
    try:
        model.hf_quantizer = quantizer  # type: ignore[assignment]
        model.config.quantization_config = quantization_config
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        for owner, name, old in (
            (model, "hf_quantizer", old_quantizer),
            (model.config, "quantization_config", old_config),
        ):
            if old is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, old)
