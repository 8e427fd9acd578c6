"""Read a checkpoint that bitsandbytes and transformers wrote."""

from __future__ import annotations

import os
import re
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    register_quantization_config,
    register_quantizer,
)

from qlora_lib.integrations.bitsandbytes import CODEBOOKS, from_state_dict
from qlora_lib.integrations.transformers.config import QLoRAConfig
from qlora_lib.integrations.transformers.quantizer import QLoRAQuantizer
from qlora_lib.nn import Linear4bit

# What the state dict of bitsandbytes has beside a weight, longest first: transformers
# takes the first that matches.
ENTRIES = [
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
    "weight.nested_quant_map",
    "weight.nested_absmax",
    "weight.quant_map",
    "weight.absmax",
    "weight",
]
# Arguments of from_pretrained that say where the files are.
SOURCE_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def load_bitsandbytes(
    folder_or_id: str | os.PathLike[str], **kwargs: Any
) -> PreTrainedModel:
    """Load a 4-bit causal language model that bitsandbytes and transformers saved.

    The codes and scales are taken as they are, so each weight dequantizes to the same
    bits as in bitsandbytes. The model computes in one type, ``dtype``; what
    bitsandbytes keeps as ``bnb_4bit_compute_dtype`` is not used. It is a model of this
    library in every respect: ``save_pretrained`` writes this library's format.

    Args:
        folder_or_id: A local folder, or the id of a repository of the hub.
        **kwargs: Arguments of ``AutoModelForCausalLM.from_pretrained``, such as
            ``device_map``; ``dtype`` is by default that of the checkpoint's config.

    Raises:
        OSError: If the checkpoint is not found or one of its files is missing.
        ValueError: If the checkpoint is not a 4-bit one of bitsandbytes, an entry is
            missing or damaged, or its layers are not all quantized in the same way.
    """
    source = {key: kwargs[key] for key in SOURCE_ARGUMENTS if key in kwargs}
    try:
        config = AutoConfig.from_pretrained(folder_or_id, **source)
    except OSError as error:
        error.add_note(
            f"folder_or_id={str(folder_or_id)!r} was not found: without a connection "
            "to the hub pass the folder of a checkpoint on this machine"
        )
        raise
    theirs = getattr(config, "quantization_config", None) or {}
    if theirs.get("quant_method") != "bitsandbytes" or not theirs.get("load_in_4bit"):
        method = theirs.get("quant_method") or "no quantization"
        raise ValueError(
            f"{folder_or_id} must be a 4-bit checkpoint of bitsandbytes, and its "
            f"config.json says {method}: load it with from_pretrained"
        )
    dtype = kwargs.pop("dtype", "auto")
    if dtype == "auto":
        dtype = config.dtype or torch.get_default_dtype()
    quant_type = theirs.get("bnb_4bit_quant_type")
    if quant_type not in CODEBOOKS:
        raise ValueError(
            f"{folder_or_id} must have bnb_4bit_quant_type {' or '.join(CODEBOOKS)}, "
            f"got {quant_type!r}"
        )
    config.quantization_config = _BitsandbytesConfig(
        codebook=CODEBOOKS[quant_type].name,
        double_quant=bool(theirs.get("bnb_4bit_use_double_quant")),
        compute_dtype=dtype,
    ).to_dict()
    return AutoModelForCausalLM.from_pretrained(
        folder_or_id, config=config, dtype=dtype, **kwargs
    )


@register_quantization_config("qlora_lib/bitsandbytes")
class _BitsandbytesConfig(QLoRAConfig):
    """Of a model that is being read from a checkpoint of bitsandbytes."""

    quant_method = "qlora_lib/bitsandbytes"


@register_quantizer("qlora_lib/bitsandbytes")
class _BitsandbytesReader(QLoRAQuantizer):
    """Builds the layers from bitsandbytes' entries, wherever there are some."""

    def get_weight_conversions(self) -> list[WeightConverter]:
        return [WeightConverter(ENTRIES, "weight", [_ReadWeight(self)])]

    def param_element_size(
        self, model: PreTrainedModel, param_name: str, param: Tensor
    ) -> float:
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        layer = model.get_submodule(param_name.rpartition(".")[0])
        return self.quantization_config.empty_weight(layer).nbytes / param.numel()

    def _prepare_layers(self, model: PreTrainedModel) -> None:
        """Leave the linear layers until their entries come."""

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, Linear4bit)
        }
        dense = [name for name in self.layers if name not in layers]
        self.layers = list(layers)
        source = model.config.name_or_path
        # Found first: without layers there would be nothing to describe.
        self._raise_errors(source)
        if not layers:
            raise ValueError(f"{source} has no weight quantized by bitsandbytes")
        kinds = {
            (layer.codebook.name, layer.block_size, layer.nested_scales is not None)
            for layer in layers.values()
        }
        if len(kinds) > 1:
            raise ValueError(
                f"{source} has layers that are quantized in several ways, (codebook, "
                f"block_size, double_quant) of {sorted(kinds)}: only one is supported"
            )
        ((codebook, block_size, double_quant),) = kinds
        config = QLoRAConfig(
            codebook,
            block_size,
            double_quant,
            self.quantization_config.compute_dtype,
            skip_modules=dense or None,
        )
        self.quantization_config = model.config.quantization_config = config
        # It would write the entries of bitsandbytes again.
        conversions: Any = model._weight_conversions
        model._weight_conversions = [  # type: ignore[assignment]
            conversion
            for conversion in conversions
            if not any(
                isinstance(operation, _ReadWeight)
                for operation in getattr(conversion, "operations", ())
            )
        ]
        return super()._process_model_after_weight_loading(model, **kwargs)


class _ReadWeight(ConversionOps):
    """Turn the entries of a weight into a Linear4bit; let dense weights pass."""

    def __init__(self, quantizer: _BitsandbytesReader) -> None:
        # Under this name transformers knows that entries are not to be cast.
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _ReadWeight:
        # transformers copies it for each weight, and the quantizer is one.
        return self

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        model: PreTrainedModel,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **unused: Any,
    ) -> dict[str, Any]:
        entries = {
            key: value[0] if isinstance(value, list) else value
            for key, value in input_dict.items()
        }
        weight = entries.get("weight")
        if len(entries) == 1 and weight is not None and weight.is_floating_point():
            return {"weight": _cast_dense(weight, full_layer_name, model)}
        self.hf_quantizer.install(
            model, full_layer_name, partial(from_state_dict, entries), missing_keys
        )
        return {}


def _cast_dense(weight: Tensor, name: str, model: PreTrainedModel) -> Tensor:
    """A weight that is not quantized, in the type that the model computes in."""
    dtype = model.get_parameter(name).dtype
    float32_names = model._get_dtype_plan(dtype)
    if any(re.search(pattern, name) for pattern in float32_names):
        return weight.float()
    return weight.to(dtype)
