"""The quantizer that transformers calls while it loads and saves a model."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_lib.integrations.transformers.config import QLoRAConfig
from qlora_lib.integrations.transformers.layers import (
    check_layers,
    linear_layers,
    replace_layer,
    weight_shape,
)
from qlora_lib.kernels.ops import quantize
from qlora_lib.nn import Linear4bit
from qlora_lib.numerics import QuantizedTensor

logger = logging.getLogger(__name__)


@register_quantizer("qlora_lib")
class QLoRAQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model with a QLoRAConfig.

    A dense checkpoint is quantized weight by weight: a weight is read, moved to its
    device, quantized there and freed before the next one is read. So the peak is the
    quantized model and one weight, and on a CPU also the unpacked codes of that weight,
    a byte each, and a fixed workspace of about 10 MB. What is not quantized may stay
    mapped to the file on a CPU, as transformers maps it.
    """

    quantization_config: QLoRAConfig

    def __init__(
        self, quantization_config: QuantizationConfigMixin, **kwargs: Any
    ) -> None:
        super().__init__(quantization_config, **kwargs)
        self.layers: list[str] = []
        # What could not be quantized or read: the name of the weight, and why.
        self.errors: dict[str, str] = {}

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained beside the frozen weights."""
        return True

    def is_serializable(self) -> bool:
        """``save_pretrained`` may write the model."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to spread a model over a GPU and slower memory.

        Raises:
            ValueError: If ``device_map`` has modules on the disk, or on the CPU beside
                a GPU.
        """
        device_map = kwargs.get("device_map")
        devices = (
            {str(device) for device in device_map.values()}
            if isinstance(device_map, dict)
            else set()
        )
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise ValueError(
                f"device_map places modules on {', '.join(sorted(devices))}, and a "
                "quantized model is not offloaded: pass device_map='cpu', or use GPUs "
                "with more memory"
            )

    def update_device_map(self, device_map: dict[str, Any] | None) -> Any:
        """Choose the current GPU if nothing was chosen."""
        if device_map is None and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Load everything in ``compute_dtype``, and say so if that changes anything."""
        compute_dtype = self.quantization_config.dtype
        if dtype != compute_dtype:
            logger.warning(
                "dtype is %s, as asked for or as the model's config says, but "
                "compute_dtype is %s: what is not quantized is loaded in %s. To change "
                "it, pass QLoRAConfig(compute_dtype=...)",
                *(dtype, compute_dtype, compute_dtype),
            )
        return compute_dtype

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether this is the weight, or another entry, of a quantized layer."""
        layer, _, entry = param_name.rpartition(".")
        return entry != "bias" and layer in self.layers

    def param_element_size(
        self, model: PreTrainedModel, param_name: str, param: Tensor
    ) -> float:
        """Bytes of an element once it is quantized, with its share of the scales."""
        if not self.param_needs_quantization(model, param_name) or self.pre_quantized:
            return param.element_size()
        layer = model.get_submodule(param_name.rpartition(".")[0])
        return self.quantization_config.empty_weight(layer).nbytes / param.numel()

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that transformers applies to a weight it has just read."""
        return _QuantizeWeight(self)

    def install(
        self,
        model: PreTrainedModel,
        name: str,
        make: Callable[[], QuantizedTensor],
        missing_keys: set[str] | None,
    ) -> None:
        """Put the quantized weight that ``make()`` returns in the model.

        An error is kept for the end of the loading: transformers would log it and
        raise another one that does not tell the weight.
        """
        layer = name.rpartition(".")[0]
        try:
            new = replace_layer(model, layer, make())
        except (TypeError, ValueError) as error:
            self.errors[name] = str(error)
            return
        for _, parameter in _entries(new):
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        if missing_keys is not None:
            missing_keys.discard(name)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        # So that peft knows Linear4bit; later, since not everyone who reads a config
        # wants peft.
        importlib.import_module("qlora_lib.integrations.peft")
        skip_modules = self.quantization_config.skip_modules or []
        if not self.pre_quantized:
            check_layers(model, skip_modules)
        self.layers = linear_layers(model, skip_modules)
        if self.pre_quantized:
            self._prepare_layers(model)

    def _prepare_layers(self, model: PreTrainedModel) -> None:
        """Put empty Linear4bit layers where the checkpoint has quantized ones."""
        for name in self.layers:
            layer = model.get_submodule(name)
            replace_layer(model, name, self.quantization_config.empty_weight(layer))

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        self._check_is_complete(model)
        for name in self.layers:
            bias = model.get_submodule(name).bias
            if isinstance(bias, nn.Parameter):
                bias.requires_grad_(False)
        return model

    def _check_is_complete(self, model: PreTrainedModel) -> None:
        """Raise for what transformers only warns of: missing entries, other shapes."""
        source = model.config.name_or_path
        self._raise_errors(source)
        missing = _missing(model, self.layers, all_of_them=self.pre_quantized)
        if missing:
            raise ValueError(
                f"{source} is not complete, it has no {', '.join(missing[:5])}"
                f"{_and_more(len(missing) - 5)}: copy or download it again"
            )
        for name in self.layers:
            layer = model.get_submodule(name)
            expected = Linear4bit(self.quantization_config.empty_weight(layer))
            for (entry, found), (_, empty) in zip(
                _entries(layer), _entries(expected), strict=True
            ):
                if (found.shape, found.dtype) != (empty.shape, empty.dtype):
                    raise ValueError(
                        f"{source} has {name}.{entry} of {found.dtype} "
                        f"{tuple(found.shape)}, where a layer of shape "
                        f"{tuple(weight_shape(layer))} needs {empty.dtype} "
                        f"{tuple(empty.shape)}: its config.json belongs to another "
                        "checkpoint"
                    )

    def _raise_errors(self, source: str | None) -> None:
        if self.errors:
            name, reason = next(iter(self.errors.items()))
            raise ValueError(
                f"{source} cannot be loaded: {name}: {reason}"
                + _and_more(len(self.errors) - 1)
            )


class _QuantizeWeight(ConversionOps):
    """Quantize weights as they come, and put their layers in the model."""

    def __init__(self, quantizer: QLoRAQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        model: PreTrainedModel,
        missing_keys: set[str] | None = None,
        **unused: Any,
    ) -> dict[str, Any]:
        config = self.quantizer.quantization_config
        left = {}
        for name, tensors in input_dict.items():
            if not self.quantizer.param_needs_quantization(model, name):
                left[name] = tensors
                continue
            (tensor,) = tensors if isinstance(tensors, list) else [tensors]
            if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D):
                tensor = tensor.T
            self.quantizer.install(
                model,
                name,
                partial(
                    quantize,
                    tensor,
                    config.values,
                    config.block_size,
                    config.double_quant,
                ),
                missing_keys,
            )
        return left


def _entries(layer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Codes and scales of a Linear4bit."""
    return [(name, p) for name, p in layer.named_parameters() if name != "bias"]


def _missing(
    model: PreTrainedModel, layers: Collection[str], all_of_them: bool
) -> list[str]:
    """Names of the parameters that were not in the checkpoint.

    A quantized checkpoint was written whole, so everything must be there, if the class
    is the one that was saved; another class may begin with a new head.
    """
    saved_classes = model.config.architectures or []
    is_whole = all_of_them and type(model).__name__ in saved_classes
    return [
        name
        for name, parameter in model.named_parameters()
        if (is_whole or name.rpartition(".")[0] in layers)
        and not getattr(parameter, "_is_hf_initialized", False)
    ]


def _and_more(count: int) -> str:
    return f" (and {count} more)" if count > 0 else ""
