"""Loading an adapter, after a look at whether it belongs to the model."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import _get_in_out_features, check_target_module_exists
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def load_adapter(
    model: PreTrainedModel, folder: str | os.PathLike[str], is_trainable: bool = False
) -> PeftModel:
    """Load a LoRA adapter beside a model, if it was trained for one like it.

    Names and shapes of the adapter's weights are compared with the model's layers
    before either is changed. Where they fit, but the adapter names another base model,
    there is a warning: the model may have been moved or renamed, or may be a relative
    with the same shapes, for which the adapter is noise.

    Args:
        model: The base model, in 4 bits or dense.
        folder: What ``save_pretrained`` of a PeftModel has written.
        is_trainable: Whether the adapter is to be trained further.

    Raises:
        TypeError: If ``model`` has adapters already.
        FileNotFoundError: If the folder, its config or its weights are missing.
        ValueError: If the config or the weights cannot be read, the adapter is none of
            LoRA, or the model has no layer of a name and shape that the adapter has, or
            the adapter has no weights for a layer that its config names.
    """
    if isinstance(model, PeftModel):
        raise TypeError(
            "model has adapters already: load another beside them with "
            "model.load_adapter(folder, adapter_name)"
        )
    folder = Path(folder)
    config = _read_config(folder)
    shapes = _read_shapes(folder / WEIGHTS)
    found = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    expected = str(config.base_model_name_or_path or "")
    bases = (
        f"the adapter in {folder} was trained for {expected or 'an unnamed model'}, "
        f"and the model is {found or 'an unnamed one'}: load the base model of the "
        "adapter"
    )
    _check_shapes(model, shapes, bases)
    _check_targets(model, config, shapes, bases)
    if expected and found and Path(expected).name != Path(found).name:
        warnings.warn(f"shapes fit, but {bases}", stacklevel=2)
    return PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)


def _read_config(folder: Path) -> LoraConfig:
    for path in (folder / CONFIG, folder / WEIGHTS):
        if not path.is_file():
            raise FileNotFoundError(
                f"folder has no {path.name}: {folder}. Pass the folder that "
                "save_pretrained of the adapted model has written"
            )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder / CONFIG} cannot be read, {error}: copy the adapter again"
        ) from error
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"{folder / CONFIG} has peft_type {config.peft_type}, and only LORA is "
            "supported beside 4-bit layers"
        )
    return config


def _read_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes from the header; no weight is read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {
                key.removeprefix(PREFIX): file.get_slice(key).get_shape()
                for key in file.keys()  # noqa: SIM118, the file is no mapping
            }
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read, {error}: it may be cut short; copy it again"
        ) from error


def _check_shapes(model: nn.Module, shapes: dict[str, list[int]], bases: str) -> None:
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    for key, shape in shapes.items():
        layer, _, part = key.partition(".lora_")
        if not part:  # a bias, or a module that was trained whole
            own = list(parameters[key].shape) if key in parameters else None
        elif layer not in modules:
            own = None
        else:
            in_features, out_features = _get_in_out_features(modules[layer])
            # A is [rank, in, ...]; B and all others begin with the outputs.
            is_a = part.startswith(("A", "embedding_A"))
            features = in_features if is_a else out_features
            own = list(shape)
            if features is not None:
                own[int(is_a)] = features
        if own is None:
            raise ValueError(f"the model has no layer {layer}; {bases}")
        if own != shape:
            raise ValueError(
                f"{key} has shape {tuple(shape)} in the adapter, and the model's layer "
                f"needs {tuple(own)}; {bases}"
            )


def _check_targets(
    model: nn.Module, config: LoraConfig, shapes: dict[str, list[int]], bases: str
) -> None:
    """What the adapter lacks, peft would fill with new weights and a warning."""
    for name, _ in model.named_modules():
        if not check_target_module_exists(config, name):
            continue
        for part in "AB":
            keys = {f"{name}.lora_{part}.weight", f"{name}.lora_embedding_{part}"}
            if keys.isdisjoint(shapes):
                raise ValueError(
                    f"the adapter has no weights {name}.lora_{part}; {bases}"
                )
