"""Merging: an adapter becomes part of the weights, in 16 bits or in 4."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_lib.integrations.peft.layer import (
    LoraLinear4bit,
    check_adapters,
    dense_linear,
)
from qlora_lib.kernels.ops import dequantize, quantize
from qlora_lib.nn import Linear4bit


@dataclass(frozen=True)
class MergeError:
    """What rounding a merged weight to codes again has cost.

    Attributes:
        weight: ``||Q(W + U) - (W + U)|| / ||W + U||``, Frobenius norms, with ``W`` the
            dequantized weight, ``U`` the update of the adapter and ``Q`` quantization.
        update: The same error over ``||U||``. At 1 the error is as large as what was
            learned; infinite if there is an error but no update.
    """

    weight: float
    update: float


@dataclass(frozen=True)
class MergeReport:
    """A model that an adapter was merged into in 4 bits, and the price.

    Attributes:
        model: The base model, its layers quantized as before.
        layers: The error of each layer, by its name.
        total: The error over all of these layers together.
    """

    model: nn.Module
    layers: dict[str, MergeError]
    total: MergeError


def merge_dequantized(model: PeftModel) -> nn.Module:
    """Merge the active adapters into a dense model, the default way.

    ``W + scaling * B A`` is computed in float32 from the dequantized weight and rounded
    once, to the type of the weight that was quantized. The result is an ordinary model:
    all 4-bit layers are dense, all parameters have the type that its config names, but
    those that its class keeps in float32, and ``save_pretrained`` writes a checkpoint
    without ``quantization_config``. The same as ``model.merge_and_unload()``, with
    adapters checked before the first is merged.

    Args:
        model: A model with adapters, which is taken apart.

    Returns:
        The base model, dense.

    Raises:
        TypeError: If ``model`` is no PeftModel.
        ValueError: If an adapter holds NaN or infinity; nothing is merged then.
        RuntimeError: If an adapter has a bias and a layer has none; likewise.
    """
    check_is_peft_model(model)
    merged: nn.Module = model.merge_and_unload(safe_merge=True)
    return merged


@torch.no_grad()
def merge_into_4bit(model: PeftModel) -> MergeReport:
    """Merge the active adapters and quantize the sum as the weights were.

    Most updates are smaller than the distance between two codes, and much of what was
    learned is rounded away with them: look at :class:`MergeError` before this model is
    used, and prefer :func:`merge_dequantized`.

    Args:
        model: A model with adapters, which is taken apart.

    Returns:
        The model, still in 4 bits, and the errors.

    Raises:
        TypeError: If ``model`` is no PeftModel.
        ValueError: If an adapter holds NaN or infinity, or no 4-bit layer has an
            adapter; nothing is merged then.
        RuntimeError: If an adapter has a bias and a layer has none; likewise.
    """
    check_is_peft_model(model)
    base = model.get_base_model()
    check_adapters(base)
    targets = {
        name: (layer, _adapters_to_merge(layer))
        for name, layer in base.named_modules()
        if isinstance(layer, LoraLinear4bit) and _adapters_to_merge(layer)
    }
    if not targets:
        raise ValueError(
            "model has no active adapter beside a 4-bit layer: activate one with "
            "set_adapter, or use merge_and_unload"
        )
    errors, squares = {}, torch.zeros(3, dtype=torch.float64)
    for name, (layer, adapters) in targets.items():
        merged, square = _requantize(layer, adapters)
        base.set_submodule(name, merged)
        errors[name] = _merge_error(square)
        squares += square
    # Inactive adapters are dropped: beside them peft's merge would leave no codes.
    for name, module in list(base.named_modules()):
        if isinstance(module, LoraLinear4bit):
            base.set_submodule(name, module.quantized_layer)
    # What is left are adapters of other layers, and modules that were trained whole.
    merged_model = model.merge_and_unload(safe_merge=True)
    return MergeReport(merged_model, errors, _merge_error(squares))


@torch.no_grad()
def make_dense(model: nn.Module) -> nn.Module:
    """Dequantize the 4-bit layers that are left, and forget that there were any."""
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, Linear4bit):
            weight = dequantize(layer.quantized_weight)
            model.set_submodule(name, dense_linear(weight, layer.bias))
    if isinstance(model, PreTrainedModel):
        _restore_transposed(model)
        _cast_to_config(model)
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None:
            quantizer.remove_quantization_config(model)
    return model


def check_is_peft_model(model: PeftModel) -> None:
    """Raise TypeError for anything else, such as a model without adapters."""
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"model must be a PeftModel, got {type(model).__name__}: load the adapter "
            "with qlora_lib.integrations.peft.load_adapter first"
        )


def _adapters_to_merge(layer: LoraLinear4bit) -> list[str]:
    names = [*layer.merged_adapters, *layer.active_adapters]
    return [name for name in dict.fromkeys(names) if name in layer.lora_A]


def _requantize(
    layer: LoraLinear4bit, adapters: list[str]
) -> tuple[Linear4bit, Tensor]:
    """The merged layer, and the squared norms of its error, its weight, its update."""
    base = layer.quantized_layer
    weight = layer.dense_weight(adapters)
    update = weight - dequantize(base.quantized_weight, torch.float32)
    double_quant = base.nested_scales is not None
    quantized = quantize(weight, base.codebook, base.block_size, double_quant)
    error = dequantize(quantized, torch.float32) - weight
    norms = [tensor.double().square().sum() for tensor in (error, weight, update)]
    merged = Linear4bit(
        replace(quantized, dtype=base.weight_dtype), layer.dense_bias(adapters)
    )
    return merged, torch.stack(norms).cpu()


def _merge_error(squares: Tensor) -> MergeError:
    error, weight, update = squares.sqrt().tolist()
    return MergeError(
        weight=error / weight if error else 0.0,
        update=error / update if update else math.inf if error else 0.0,
    )


def _restore_transposed(model: PreTrainedModel) -> None:
    """GPT-2 stores its weights as [in, out], and so its checkpoints."""
    with torch.device("meta"):
        original = type(model)(model.config)
    for name, module in original.named_modules():
        if not isinstance(module, Conv1D):
            continue
        linear = model.get_submodule(name)
        if isinstance(linear, nn.Linear):
            module.weight = nn.Parameter(linear.weight.T.contiguous(), False)
            module.bias = linear.bias
            model.set_submodule(name, module)


def _cast_to_config(model: PreTrainedModel) -> None:
    """Undo casts for the training: peft's preparation makes all but codes float32."""
    dtype = model.config.dtype
    kept = {
        *(model._keep_in_fp32_modules or ()),
        *(model._keep_in_fp32_modules_strict or ()),
    }
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
