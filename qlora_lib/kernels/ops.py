"""What can be done with a quantized tensor: quantize, dequantize and multiply by it.

These functions check their arguments and call the operators of
:mod:`qlora_lib.kernels.operators`, which run kernels on a GPU and the reference of
:mod:`qlora_lib.numerics` elsewhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from qlora_lib.kernels import dispatch, operators
from qlora_lib.kernels.storage import storage_of
from qlora_lib.numerics import Codebook, QuantizedTensor
from qlora_lib.numerics import quantize as quantize_by_reference
from qlora_lib.numerics.quantized_tensor import (
    FLOAT_DTYPES,
    check_arguments,
    check_finite,
    quantize_scales,
)

# Asked once: the compiler of PyTorch 2.11 cannot look into the function.
AUTOCAST_DEVICES = frozenset(
    kind
    for kind in ("cpu", "cuda", "hpu", "mps", "mtia", "xpu")
    if torch.amp.is_autocast_available(kind)
)


@torch.no_grad()
def quantize(
    tensor: Tensor,
    codebook: Codebook,
    block_size: int | None = 64,
    double_quant: bool = False,
) -> QuantizedTensor:
    """Quantize a tensor block by block.

    Each block is divided by its largest magnitude, and each number is replaced by the
    code of the nearest value of the codebook (paper, equations 1 and 2). With
    ``double_quant`` the scales, less their mean, are quantized too: 8-bit codes of the
    signed dynamic map in blocks of 256.

    On a GPU one kernel finds scales and codes of a 4-bit codebook in blocks of 32, 64,
    128 or 256. Codes and float scales have the same bits on every device. The mean of
    the scales is summed in the order that suits the device, so its last bit may differ
    between devices, and with it a few codes of the scales.

    A block of zeros dequantizes to zeros if the codebook has a zero, and with any
    codebook if the scales are not quantized; else to numbers close to zero.

    Args:
        tensor: float16, bfloat16, float32 or float64 of any shape. Normalization is
            computed in float32.
        codebook: The data type to quantize to.
        block_size: How many consecutive numbers, in row-major order, share a scale;
            None for one scale for the whole tensor.
        double_quant: Whether to quantize the scales.

    Returns:
        A QuantizedTensor on the device of ``tensor``; an empty one if ``tensor`` is
        empty.

    Raises:
        TypeError: If ``tensor`` is not one of the float types, ``codebook`` is not a
            Codebook, or ``block_size`` is not an integer.
        ValueError: If ``block_size`` is below 1, or ``tensor`` holds NaN, infinity, or
            a number beyond the range of float32, or is on the meta device.
    """
    check_arguments(tensor, codebook, block_size)
    if block_size is None or not dispatch.has_kernel(
        tensor.device, codebook.bits, block_size, tensor.dtype
    ):
        return quantize_by_reference(tensor, codebook, block_size, double_quant)
    numbers = tensor.reshape(-1)
    values = codebook.values.tolist()
    packed, scales = operators.quantize_blocks(
        numbers, values, codebook.ties, block_size
    )
    check_finite(scales, numbers, block_size)
    return QuantizedTensor(
        packed=packed,
        scales=quantize_scales(scales) if double_quant else scales,
        codebook=codebook,
        block_size=block_size,
        shape=tensor.shape,
        dtype=tensor.dtype,
    )


def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the numbers that the codes stand for, in one pass where there is a kernel.

    ``x[i] = codebook.values[codes[i]] * scales[i // block_size]``, multiplied in
    float32 and rounded once to ``dtype``: the same bits as
    :meth:`QuantizedTensor.dequantize <qlora_lib.QuantizedTensor.dequantize>`, which is
    plain PyTorch on every device. The kernel takes 4-bit codes in blocks of 32, 64, 128
    or 256 on a GPU, double-quantized scales included, to any ``dtype`` but float64.

    Args:
        q: The quantized tensor.
        dtype: Float type of the result; None for the type of the original tensor.

    Returns:
        Tensor of the original shape.

    Raises:
        TypeError: If ``q`` is no QuantizedTensor or ``dtype`` is no float type.
    """
    check_is_quantized(q)
    dtype = dtype or q.dtype
    if q.offset is not None or dtype not in FLOAT_DTYPES:
        return q.dequantize(dtype)
    numbers: Tensor = operators.dequantize_blocks(
        *storage_of(q), q.shape.numel(), dtype
    )
    return numbers.view(q.shape)


def matmul(input: Tensor, q: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by the transpose of a quantized matrix, as a linear layer does.

    ``y = input W^T + bias`` with ``W = q.dequantize(input.dtype)``

    Differentiable, as often as needed, in ``input`` and ``bias``. Neither pass keeps a
    dense ``W``: the gradient ``dL/dinput = dL/dy W`` decodes the codes once more
    (paper, section 3, equations 5 and 6). ``W`` itself gets no gradient.

    Where kernels multiply, for a 16-bit input of up to 256 rows and its gradient of up
    to 64 on an H100 and its successors, the scales are rounded to its type first: an
    element of ``W`` can then differ from that of ``dequantize`` by the rounding of its
    scale and of its value.
    Products are summed in float32 (float64 for such an input) and the bias, rounded to
    the type of ``input``, is added before the sum is rounded. Under ``torch.autocast``
    an input that is not float64 is cast to its type first, and so is the result.

    Within ``torch.func`` transforms and forward-mode differentiation, of which the
    operators know nothing, the product is that of ``torch.nn.functional.linear`` and
    keeps ``W``.

    Args:
        input: float16, bfloat16, float32 or float64 ``[..., in_features]`` of any
            leading shape and strides.
        q: The matrix, quantized from shape ``[out_features, in_features]``.
        bias: float ``[out_features]``, or None.

    Returns:
        ``[..., out_features]``, of the type of ``input``.

    Raises:
        TypeError: If ``q`` is no QuantizedTensor, or ``input`` or ``bias`` is not one
            of the float types.
        ValueError: If ``q`` is not a matrix or has an offset, if the last dimension of
            ``input`` or the shape of ``bias`` does not fit it, or if they are on
            different devices.
    """
    check_is_quantized(q)
    check_product(input, q, bias)
    input = autocast_input(input)
    if is_transformed():
        weight = dequantize(q, input.dtype)
        return F.linear(input, weight, None if bias is None else bias.to(input.dtype))
    output: Tensor = operators.matmul(input, *storage_of(q), q.shape[0], bias)
    return output


def autocast_input(input: Tensor) -> Tensor:
    """Cast as ``torch.autocast`` casts the inputs of a product, if it is enabled."""
    kind = input.device.type
    if kind not in AUTOCAST_DEVICES or input.dtype == torch.float64:
        return input
    if not torch.is_autocast_enabled(kind):
        return input
    return input.to(torch.get_autocast_dtype(kind))


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work.

    An operator with a formula for the backward pass alone would answer some of them
    with an error and others, without a word, with a tangent of zero.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def check_is_quantized(q: QuantizedTensor) -> None:
    """Raise TypeError if ``q`` is no QuantizedTensor."""
    if not isinstance(q, QuantizedTensor):
        raise TypeError(
            f"q must be a QuantizedTensor, got {type(q).__name__}: quantize it first"
        )


def check_product(input: Tensor, q: QuantizedTensor, bias: Tensor | None) -> None:
    """Raise what :func:`matmul` raises for arguments that do not fit."""
    for name, tensor in (("input", input), ("bias", bias)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOAT_DTYPES:
            found = getattr(tensor, "dtype", type(tensor).__name__)
            raise TypeError(
                f"{name} must be a float tensor, got {found}: convert it to float16, "
                "bfloat16, float32 or float64"
            )
        if tensor.device != q.device:
            raise ValueError(
                f"{name} must be on the device of q, {q.device}, got {tensor.device}: "
                "move one of them with .to(device)"
            )
    if len(q.shape) != 2:
        raise ValueError(
            "q must be quantized from a matrix [out_features, in_features], got shape "
            f"{tuple(q.shape)}"
        )
    if q.offset is not None:
        raise ValueError(
            "q has an offset, as only the scales of a doubly quantized tensor have: "
            "multiply by q.dequantize() with torch.nn.functional.linear"
        )
    if input.dim() == 0 or input.shape[-1] != q.shape[1]:
        raise ValueError(
            f"input must have {q.shape[1]} numbers in its last dimension, as many as "
            f"a row of q, got shape {tuple(input.shape)}"
        )
    if bias is not None and bias.shape != q.shape[:1]:
        raise ValueError(
            f"bias must have shape ({q.shape[0]},), one number for each row of q, got "
            f"{tuple(bias.shape)}"
        )
