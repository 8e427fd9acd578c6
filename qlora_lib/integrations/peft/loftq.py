"""LoftQ initialization of adapters beside a model that is quantized already."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor

from qlora_lib.integrations.peft.layer import LoraLinear4bit
from qlora_lib.integrations.peft.merging import check_is_peft_model
from qlora_lib.kernels.ops import dequantize
from qlora_lib.nn import Linear4bit, loftq_split

INDEX = "model.safetensors.index.json"


@torch.no_grad()
def loftq_init(
    model: PeftModel,
    weights: str | os.PathLike[str] | Mapping[str, Tensor],
    iterations: int = 1,
) -> None:
    """Start the active adapter at what quantization has rounded away.

    See :func:`qlora_lib.nn.loftq_split` for how ``A`` and ``B`` are found. The original
    weights are needed for it, which the 4-bit model no longer has; they are read one at
    a time. peft's own ``init_lora_weights="loftq"`` is refused for that reason: make
    the adapter with the default and call this afterwards.

    With one iteration the 4-bit weights stay as they are, and the adapter is an
    ordinary one for this base model. With more they are replaced, and the adapter fits
    only the model that is saved with ``save_pretrained`` after this.

    Args:
        model: The 4-bit model with an adapter.
        weights: The weights it was quantized from: a folder with a safetensors
            checkpoint, or ``state_dict()`` of the dense model.
        iterations: How often weight and adapter are found in turn; the paper uses 5.

    Raises:
        TypeError: If ``model`` is no PeftModel.
        FileNotFoundError: If the folder has no safetensors checkpoint.
        ValueError: If a weight is missing, has another shape or cannot be the one that
            was quantized, a rank exceeds the smaller dimension of a weight,
            its scaling is not above 0, ``iterations`` is below 1, there is not one
            active adapter, no 4-bit layer has it, or it is merged. Nothing is changed
            then.
    """
    check_is_peft_model(model)
    if not isinstance(weights, Mapping):
        weights = _Checkpoint(Path(weights))
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"model must have one active adapter, got {model.active_adapters}: the "
            "correction is made once; choose with set_adapter"
        )
    (adapter,) = model.active_adapters
    layers = {
        name: layer
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLinear4bit) and adapter in layer.lora_A
    }
    if not layers:
        raise ValueError(
            f"model has no 4-bit layer with adapter {adapter}: load it in 4 bits, and "
            "make an adapter with target_modules='all-linear'"
        )
    if any(layer.merged for layer in layers.values()):
        raise ValueError(
            f"adapter {adapter} is merged into the weights: call unmerge_adapter first"
        )
    for name, layer in layers.items():
        _check_weight(name, layer, adapter, weights)
    for name, layer in layers.items():
        _initialize(layer, adapter, weights[f"{name}.weight"], iterations)


class _Checkpoint(Mapping[str, Tensor]):
    """The tensors of a safetensors checkpoint, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX
        if index.is_file():
            self.files = json.loads(index.read_text())["weight_map"]
        elif (folder / "model.safetensors").is_file():
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                self.files = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise FileNotFoundError(
                f"weights has neither model.safetensors nor {INDEX}: {folder}. Pass "
                "the folder of the 16-bit checkpoint"
            )
        self.folder = folder

    def __getitem__(self, key: str) -> Tensor:
        with safe_open(self.folder / self.files[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _check_weight(
    name: str, layer: LoraLinear4bit, adapter: str, weights: Mapping[str, Tensor]
) -> None:
    base = layer.quantized_layer
    shape = (base.out_features, base.in_features)
    if layer.r[adapter] > min(shape):
        raise ValueError(
            f"adapter {adapter} has rank {layer.r[adapter]} at {name}, whose weight of "
            f"{shape} has no such correction: lower it with rank_pattern"
        )
    if f"{name}.weight" not in weights:
        raise ValueError(
            f"weights has no {name}.weight: pass those of the model that was quantized"
        )
    weight = weights[f"{name}.weight"]
    if weight.shape != shape or not weight.is_floating_point():
        raise ValueError(
            f"weights has {name}.weight of {weight.dtype} {tuple(weight.shape)}, and "
            f"the model was quantized from floats of {shape}: pass those"
        )
    own = base.quantized_weight.dequantize(torch.float32)
    weight = weight.to(own)
    if (own - weight).norm() > weight.norm():
        raise ValueError(
            f"weights has a {name}.weight that is farther from the model's than zero: "
            "pass those of the model that was quantized"
        )


def _initialize(
    layer: LoraLinear4bit, adapter: str, weight: Tensor, iterations: int
) -> None:
    base = layer.quantized_layer
    a, b = layer.matrices(adapter)
    q, new_a, new_b = loftq_split(
        weight.to(base.weight.device, base.weight_dtype),
        base.codebook,
        base.block_size,
        base.nested_scales is not None,
        rank=layer.r[adapter],
        scaling=layer.scaling[adapter],
        iterations=iterations,
    )
    a.copy_(new_a)
    b.copy_(new_b)
    if iterations > 1:
        q = dataclasses.replace(q, dtype=base.weight_dtype)
        layer.base_layer = Linear4bit(q, base.bias)
    if adapter in layer.lora_variant:
        # DoRA's magnitude is the norm of what it begins with, as peft sets it.
        magnitude = layer.lora_magnitude_vector[adapter].weight
        assert isinstance(magnitude, Tensor)
        start = torch.addmm(
            dequantize(q, torch.float32), new_b, new_a, alpha=layer.scaling[adapter]
        )
        magnitude.copy_(start.norm(dim=1).view_as(magnitude))
