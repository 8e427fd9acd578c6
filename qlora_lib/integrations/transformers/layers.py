"""Which layers of a transformers model are quantized, and how they are replaced."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_lib.nn import Linear4bit
from qlora_lib.numerics import Codebook, QuantizedTensor
from qlora_lib.numerics.packing import packed_size
from qlora_lib.numerics.quantized_tensor import SCALE_BLOCK_SIZE, SCALE_CODEBOOK

CONVOLUTIONS = nn.modules.conv._ConvNd


def linear_layers(model: PreTrainedModel, skip_modules: Collection[str]) -> list[str]:
    """Return the names of the layers that are quantized, in the model's order.

    These are the linear layers, GPT-2's ``Conv1D`` among them, of the base model.
    Heads beside it, the output layer, weights tied to others and what the model's
    class keeps in float32 stay as they are; so do ``skip_modules``.

    Args:
        model: The model, which may be on the meta device.
        skip_modules: Names of modules or parameters, whole or consecutive parts of
            them: ``"down_proj"``, ``"layers.0.mlp"``, ``"experts"``.
    """
    is_kept = _is_kept(model, skip_modules)
    return [
        name
        for name, module in model.named_modules()
        if _is_linear(module) and not is_kept(name)
    ]


def check_layers(model: PreTrainedModel, skip_modules: Collection[str]) -> None:
    """Refuse a model in which matrices would stay in 16 bits without a word.

    Raises:
        ValueError: If there is no layer to quantize, a name of ``skip_modules`` is not
            found in the model, or the base model has weights of several dimensions
            outside linear layers (fused experts) or subclasses of ``nn.Linear``.
    """
    name = type(model).__name__
    entries = [
        *(module_name for module_name, _ in model.named_modules()),
        *(parameter_name for parameter_name, _ in model.named_parameters()),
    ]
    for skipped in skip_modules:
        if not any(_is_in(entry, [skipped]) for entry in entries if entry):
            raise ValueError(
                f"skip_modules has {skipped!r}, but {name} has no module of that name: "
                "use names as print(model) shows them, or their last parts"
            )
    is_kept = _is_kept(model, skip_modules)
    unknown = [entry for entry in _other_weights(model) if not is_kept(entry)]
    if unknown:
        shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        parts = sorted({_last_module(entry, model) for entry in unknown})
        raise ValueError(
            f"{name} has weights that are no plain linear layers and cannot be "
            f"quantized: {shown}. Pass QLoRAConfig(skip_modules={parts}) to leave them "
            "in 16 bits on purpose"
        )
    if not linear_layers(model, skip_modules):
        raise ValueError(
            f"{name} has no linear layer to quantize"
            + (f" outside skip_modules={list(skip_modules)}" if skip_modules else "")
            + ": load it without quantization_config"
        )


def empty_weight(
    layer: nn.Module,
    codebook: Codebook,
    block_size: int | None,
    double_quant: bool,
    dtype: torch.dtype,
) -> QuantizedTensor:
    """Return the quantized weight of a layer on the meta device: sizes, no numbers."""
    shape = weight_shape(layer)
    count = shape.numel()
    blocks = 1 if block_size is None else math.ceil(count / block_size)
    scales: Tensor | QuantizedTensor
    if double_quant:
        nested_blocks = math.ceil(blocks / SCALE_BLOCK_SIZE)
        scales = QuantizedTensor(
            packed=_meta(blocks, torch.uint8),
            scales=_meta(nested_blocks, torch.float32),
            codebook=SCALE_CODEBOOK,
            block_size=SCALE_BLOCK_SIZE,
            shape=torch.Size((blocks,)),
            dtype=torch.float32,
            offset=_meta(1, torch.float32),
        )
    else:
        scales = _meta(blocks, torch.float32)
    packed = _meta(packed_size(count, codebook.bits), torch.uint8)
    return QuantizedTensor(packed, scales, codebook, block_size, shape, dtype)


def weight_shape(layer: nn.Module) -> torch.Size:
    """``[out_features, in_features]`` of a linear layer."""
    assert isinstance(layer.weight, Tensor)
    if isinstance(layer, Linear4bit):
        return torch.Size((layer.out_features, layer.in_features))
    # Conv1D of GPT-2 stores the transpose.
    return torch.Size(
        reversed(layer.weight.shape)
        if isinstance(layer, Conv1D)
        else layer.weight.shape
    )


def replace_layer(
    model: PreTrainedModel, name: str, weight: QuantizedTensor
) -> Linear4bit:
    """Put a Linear4bit with this weight in a linear layer's place; it keeps the bias.

    Raises:
        ValueError: If the layer has another shape, or is no linear layer.
    """
    old = model.get_submodule(name)
    if not _is_linear(old):
        raise ValueError(
            f"{name} is a {type(old).__name__} in this model and cannot hold a "
            "quantized weight: load the checkpoint with the class that saved it"
        )
    if weight.shape != weight_shape(old):
        raise ValueError(
            f"{name}.weight has shape {tuple(weight.shape)} in the checkpoint and "
            f"{tuple(weight_shape(old))} in {type(model).__name__}: use the config "
            "that the checkpoint was saved with"
        )
    layer = Linear4bit(weight)
    # The same parameter: it may be loaded already, and is marked as such.
    assert old.bias is None or isinstance(old.bias, nn.Parameter)
    layer.bias = old.bias
    # transformers initializes layers anew that do not say so.
    layer._is_hf_initialized = True  # type: ignore[assignment]
    model.set_submodule(name, layer)
    return layer


def _is_linear(module: nn.Module) -> bool:
    # Subclasses of nn.Linear may compute something else.
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def _other_weights(model: PreTrainedModel) -> Iterator[str]:
    """Names of what holds matrices but is no plain linear layer."""
    for name, module in model.named_modules():
        if _is_linear(module) or isinstance(module, CONVOLUTIONS):
            continue
        if isinstance(module, nn.Linear):
            yield name
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            # Experts are [experts, out, in]; position embeddings are [1, length, size].
            if parameter.dim() >= 3 and parameter.shape[0] > 1:
                yield f"{name}.{parameter_name}".lstrip(".")


def _is_kept(
    model: PreTrainedModel, skip_modules: Collection[str]
) -> Callable[[str], bool]:
    """Tell of a module or parameter whether it is left in 16 bits."""
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    output = model.get_output_embeddings()
    left = {name for name, module in model.named_modules() if module is output}
    tied = model.all_tied_weights_keys
    left |= {key.rpartition(".")[0] for key in (*tied.keys(), *tied.values())}
    partial = {
        *skip_modules,
        *(model._keep_in_fp32_modules or ()),
        *(model._keep_in_fp32_modules_strict or ()),
    }
    return lambda name: (
        not name.startswith(base)
        or f"{name}.".startswith(tuple(f"{module}." for module in left))
        or _is_in(name, partial)
    )


def _is_in(name: str, modules: Collection[str]) -> bool:
    """Whether ``name`` is, or lies in, what one of these (partial) names stands for."""
    return any(f".{module}." in f".{name}." for module in modules)


def _last_module(entry: str, model: PreTrainedModel) -> str:
    """Last part of the name of the module that ``entry`` is, or belongs to."""
    modules = dict(model.named_modules())
    owner = entry if entry in modules else entry.rpartition(".")[0]
    return owner.rpartition(".")[2]


def _meta(count: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(count, dtype=dtype, device="meta")
