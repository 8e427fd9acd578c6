"""Linear4bit: a linear layer whose weight is frozen as codes and scales."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lib.kernels.ops import dequantize, matmul, quantize
from qlora_lib.numerics import NF4, Codebook, QuantizedTensor
from qlora_lib.numerics.quantized_tensor import SCALE_BLOCK_SIZE, SCALE_CODEBOOK


class Linear4bit(nn.Linear):
    """A linear layer with a quantized, frozen weight.

    ``y = x W^T + b`` with ``W = quantized_weight.dequantize(x.dtype)``

    The weight is decoded for the product and not kept; the backward pass decodes it
    once more, ``dL/dx = dL/dy W``. The weight itself gets no gradient: gradients pass
    through it to the adapters (paper, section 3, equations 5 and 6). How it is
    multiplied, and where a GPU rounds it otherwise, says :func:`qlora_lib.matmul`.
    Build a layer with :meth:`from_linear`.

    Codes and scales are frozen uint8 parameters; those that are floats are held as
    their bytes. So ``model.half()`` and mixed-precision wrappers, which cast every
    floating parameter, leave them as they are.

    Args:
        weight: The quantized weight, of shape ``[out_features, in_features]``, as
            :func:`qlora_lib.quantize` returns it.
        bias: float ``[out_features]``, or None.

    Attributes:
        weight: uint8, the packed codes.
        scales: uint8, the bytes of the float32 scales, or their 8-bit codes after
            double quantization.
        nested_scales: uint8, the bytes of the float32 scales of the scales, or None.
        scales_offset: uint8 ``[4]``, the bytes of the float32 mean of the scales, or
            None.

    Raises:
        TypeError: If ``weight`` is no QuantizedTensor.
        ValueError: If ``weight`` is not a matrix, has an offset, or has scales that are
            quantized otherwise than by ``double_quant``; or if ``bias`` has another
            shape.
    """

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None) -> None:
        # nn.Linear's own constructor would allocate the weight in full precision.
        nn.Module.__init__(self)
        _check_arguments(weight, bias)
        self.out_features, self.in_features = weight.shape
        self.codebook = weight.codebook
        self.block_size = weight.block_size
        self.weight_dtype = weight.dtype
        self.weight = _frozen_bytes(weight.packed)
        self.nested_scales: nn.Parameter | None = None
        self.scales_offset: nn.Parameter | None = None
        self.scales_codebook = SCALE_CODEBOOK
        scales = weight.scales
        if isinstance(scales, QuantizedTensor):
            self.scales = _frozen_bytes(scales.packed)
            self.nested_scales = _frozen_bytes(scales.scales)
            self.scales_offset = _frozen_bytes(scales.offset)
            # One that was read from a file may differ in its last bits.
            self.scales_codebook = scales.codebook
        else:
            self.scales = _frozen_bytes(scales)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias, requires_grad=False)
        )
        self._known_places: tuple[int, ...] = ()
        self._known_weight: QuantizedTensor | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        codebook: Codebook = NF4,
        block_size: int | None = 64,
        double_quant: bool = True,
    ) -> Linear4bit:
        """Quantize the weight of a linear layer; the layer itself is left as it is.

        Args:
            linear: The layer to take weight and bias from. The bias is copied and
                frozen in its own type.
            codebook: The data type of the weight.
            block_size: How many consecutive numbers of a row-major weight share a
                scale.
            double_quant: Whether to quantize the scales as well.

        Raises:
            TypeError: If ``linear`` is no ``nn.Linear`` or is quantized already, or as
                in :func:`qlora_lib.quantize`.
            ValueError: If the weight holds NaN or infinity, or as in
                :func:`qlora_lib.quantize`.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, Linear4bit):
            raise TypeError(
                "linear must be an nn.Linear that is not quantized yet, got "
                f"{type(linear).__name__}: pass the layer of the dense model"
            )
        weight = quantize(linear.weight, codebook, block_size, double_quant)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(weight, bias)

    @property
    def quantized_weight(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor that shares memory with the parameters."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self._as_quantized_tensor()
        # Putting it together takes longer than a launch, so it is kept as long as the
        # parameters are where they were. They cannot move unseen: what is kept holds
        # their memory.
        parameters = self._parameters.values()
        places = tuple([0 if p is None else p.data_ptr() for p in parameters])
        if self._known_weight is None or places != self._known_places or not places[0]:
            # A tensor of inference mode could not be kept for a backward pass later.
            with torch.inference_mode(False):
                self._known_weight = self._as_quantized_tensor()
            self._known_places = places
        return self._known_weight

    @property
    def W_q(self) -> Tensor:
        """The codes, under the name by which peft knows that a layer can dequantize."""
        return self.weight

    def dequantize(self) -> Tensor:
        """Return the weight as it is multiplied, ``[out_features, in_features]``."""
        return dequantize(self.quantized_weight)

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features)`` -> ``(..., out_features)``, of the type of ``input``.

        Under ``torch.autocast`` the product is computed and returned in its type.

        Raises:
            TypeError: If ``input`` is no float tensor.
            ValueError: If the last dimension of ``input`` is not ``in_features``, or it
                is on another device.
        """
        return matmul(input, self.quantized_weight, self.bias)

    def extra_repr(self) -> str:
        """Name the layer's shape and data type in the model's printout."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, codebook={self.codebook.name}, "
            f"block_size={self.block_size}, "
            f"double_quant={self.nested_scales is not None}"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickled layer shall hold its parameters once.
        return {**self.__dict__, "_known_weight": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Linear4bit:
        # Moved to another device, the layer must not hold the memory of the old one.
        self._known_weight = None
        return super()._apply(fn, recurse)

    def _as_quantized_tensor(self) -> QuantizedTensor:
        scales: Tensor | QuantizedTensor
        if self.nested_scales is None or self.scales_offset is None:
            scales = self.scales.detach().view(torch.float32)
        else:
            scales = QuantizedTensor(
                packed=self.scales.detach(),
                scales=self.nested_scales.detach().view(torch.float32),
                codebook=self.scales_codebook,
                block_size=SCALE_BLOCK_SIZE,
                shape=self.scales.shape,
                dtype=torch.float32,
                offset=self.scales_offset.detach().view(torch.float32)[0],
            )
        return QuantizedTensor(
            packed=self.weight.detach(),
            scales=scales,
            codebook=self.codebook,
            block_size=self.block_size,
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=self.weight_dtype,
        )


def quantize_linears(
    model: nn.Module,
    codebook: Codebook = NF4,
    block_size: int | None = 64,
    double_quant: bool = True,
    skip: Collection[str] = ("lm_head",),
) -> list[str]:
    """Replace the linear layers of a model by :class:`Linear4bit`, in place.

    All layers are quantized before the first is replaced, so the model is unchanged if
    one of them cannot be. A layer that stands in several places is quantized once and
    stays shared. Subclasses of ``nn.Linear`` are left alone, since they may compute
    something else.

    Args:
        model: The model to change.
        codebook: The data type of the weights.
        block_size: How many consecutive numbers share a scale.
        double_quant: Whether to quantize the scales as well.
        skip: Layers to leave alone, by the last part of their name. The output layer is
            left in 16 bits by the paper's implementation, and so it is here.

    Returns:
        The names of the replaced layers.

    Raises:
        TypeError: If ``model`` is itself a linear layer, ``skip`` is a string, or as in
            :func:`qlora_lib.quantize`.
        ValueError: If a weight holds NaN or infinity, no layer was found to replace, or
            as in :func:`qlora_lib.quantize`.
    """
    if type(model) is nn.Linear:
        raise TypeError(
            "model must contain linear layers, got an nn.Linear, which cannot be "
            "replaced in place: use Linear4bit.from_linear"
        )
    if isinstance(skip, str):
        raise TypeError(
            f"skip must be a collection of names, got the string {skip!r}: pass "
            f"({skip!r},)"
        )
    quantized: dict[nn.Module, Linear4bit] = {}
    replacements: dict[str, Linear4bit] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is not nn.Linear or name.rpartition(".")[2] in skip:
            continue
        try:
            if module not in quantized:
                quantized[module] = Linear4bit.from_linear(
                    module, codebook, block_size, double_quant
                )
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"model cannot be quantized at layer {name}: {error}"
            ) from error
        replacements[name] = quantized[module]
    if not replacements:
        raise ValueError(
            f"model has no nn.Linear to replace outside skip={tuple(skip)}; it may be "
            "quantized already"
        )
    for name, layer in replacements.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return list(replacements)


def _check_arguments(weight: QuantizedTensor, bias: Tensor | None) -> None:
    if not isinstance(weight, QuantizedTensor):
        raise TypeError(
            f"weight must be a QuantizedTensor, got {type(weight).__name__}: build the "
            "layer with Linear4bit.from_linear, or quantize the weight first"
        )
    if len(weight.shape) != 2:
        raise ValueError(
            "weight must be quantized from a matrix [out_features, in_features], got "
            f"shape {tuple(weight.shape)}"
        )
    if not weight.has_standard_scales:
        raise ValueError(
            "weight has an offset, or scales that are quantized otherwise than by "
            "quantize(..., double_quant=True): quantize it that way"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must have shape ({weight.shape[0]},), one number for each row of "
            f"weight, got {tuple(bias.shape)}"
        )


def _frozen_bytes(tensor: Tensor | QuantizedTensor | None) -> nn.Parameter:
    assert isinstance(tensor, Tensor)  # _check_arguments has seen to it
    flat_bytes = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    return nn.Parameter(flat_bytes, requires_grad=False)
