"""LoRA: a trained low-rank update beside a frozen 4-bit weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lib.kernels import operators
from qlora_lib.kernels.ops import (
    AUTOCAST_DEVICES,
    autocast_input,
    check_is_quantized,
    check_product,
    is_transformed,
    matmul,
)
from qlora_lib.kernels.storage import Storage, storage_of
from qlora_lib.numerics import QuantizedTensor
from qlora_lib.numerics.quantized_tensor import FLOAT_DTYPES


def lora_linear(
    input: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Multiply by a frozen 4-bit weight and by a low-rank update of it.

    ``y = x W^T + b + scaling * (dropout(x) A^T) B^T``, with
    ``W = weight.dequantize(x.dtype)`` (QLoRA, equations 5 and 6; LoRA,
    arXiv 2106.09685, equation 3).

    Products are computed in the type of ``input``: A and B are rounded to it for the
    call, and so is ``scaling * dropout(x) A^T``. Their gradients are returned in their
    own type. On a GPU a gradient is summed in float32 and not rounded before that; on a
    CPU its sum is rounded to the type of ``input`` first.

    What is kept for the backward pass is ``input`` itself, the codes and scales of
    ``weight``, A, B and ``[..., rank]`` numbers: no dense ``W``, no copy of ``input``
    and no dropout mask, which is drawn once more from its seed. The seed comes from
    PyTorch's default generator on the CPU, so that a GPU need not be waited for, and
    ``torch.utils.checkpoint``, which restores that generator, finds the same mask.
    Under ``torch.compile`` dropout is PyTorch's own.

    Differentiable as often as needed. Under ``torch.autocast`` an input that is not
    float64 is cast to its type first, and so is the result. Second derivatives and,
    within ``torch.func`` transforms and forward-mode differentiation, the product are
    computed by a composition of PyTorch's functions, which keeps more.

    Args:
        input: float16, bfloat16, float32 or float64 ``[..., in_features]``.
        weight: The frozen matrix, quantized from ``[out_features, in_features]``.
        bias: float ``[out_features]``, or None.
        lora_a: float ``[rank, in_features]``, float32 in the paper's recipe.
        lora_b: float ``[out_features, rank]``, likewise.
        scaling: Factor of the update: ``alpha / rank``, or ``alpha / sqrt(rank)`` for
            rank-stabilized LoRA.
        dropout: Share of the elements of ``input`` that the update does not see; the
            others are divided by ``1 - dropout``.

    Returns:
        ``[..., out_features]``, of the type of ``input``.

    Raises:
        TypeError: If ``weight`` is no QuantizedTensor, or another tensor is not of one
            of the float types.
        ValueError: If shapes do not fit, tensors are on different devices, or
            ``dropout`` is not in ``[0, 1)``.
    """
    check_is_quantized(weight)
    check_product(input, weight, bias)
    _check_adapter(weight, lora_a, lora_b, dropout)
    input = autocast_input(input)
    if dropout and torch.compiler.is_compiling():
        # A compiler cannot follow a generator of our own, and keeps or repeats the mask
        # of PyTorch's as it sees fit.
        update = _update(F.dropout(input, dropout), lora_a, lora_b, scaling)
        return matmul(input, weight, bias) + update
    seed = int(torch.randint(2**62, (), device="cpu")) if dropout else 0
    if is_transformed():
        mask = _mask(input.shape, input.device, dropout, seed) if dropout else None
        scale = scaling / (1 - dropout)
        update = _update(_drop(input, mask), lora_a, lora_b, scale)
        return matmul(input, weight, bias) + update
    output: Tensor = _LoraLinear.apply(
        input,
        lora_a,
        lora_b,
        bias,
        scaling / (1 - dropout),
        dropout,
        seed,
        weight.shape[0],
        storage_of(weight),
    )
    return output


class _LoraLinear(torch.autograd.Function):
    """The product with its gradients; sums are made in place, not added afterwards."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        scale: float,
        dropout: float,
        seed: int,
        out_features: int,
        storage: Storage,
    ) -> Tensor:
        rows = operators.as_rows(input)
        mask = _mask(rows.shape, rows.device, dropout, seed) if dropout else None
        hidden = _product(_drop(rows, mask), lora_a.to(input.dtype).t(), scale)
        output = operators.multiply(rows, storage, out_features, bias)
        output.addmm_(hidden, lora_b.to(input.dtype).t())

        # Gradient checkpointing calls functions of Python for each saved tensor, so
        # those that outlive the step are held here.
        ctx.storage = storage
        trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(
            input if trains else None, hidden if ctx.needs_input_grad[2] else None
        )
        ctx.matrices, ctx.versions = (lora_a, lora_b), _versions(lora_a, lora_b)
        ctx.scale, ctx.dropout, ctx.seed = scale, dropout, seed
        ctx.input_shape, ctx.dtype = input.shape, input.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output.view(*input.shape[:-1], out_features)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        kind = grad_output.device.type
        if kind in AUTOCAST_DEVICES and torch.is_autocast_enabled(kind):
            # The forward pass has settled the types.
            with torch.autocast(kind, enabled=False):
                return _LoraLinear.backward(ctx, grad_output)
        input, hidden = ctx.saved_tensors
        lora_a, lora_b = ctx.matrices
        if ctx.versions and _versions(lora_a, lora_b) != ctx.versions:
            raise RuntimeError(
                "lora_a or lora_b was changed in place between the forward and the "
                "backward pass, whose gradients would be wrong: call backward first"
            )
        needs_input, needs_a, needs_b, needs_bias = ctx.needs_input_grad[:4]
        grad = operators.as_rows(grad_output)
        a, b = lora_a.to(ctx.dtype), lora_b.to(ctx.dtype)
        grad_input = grad_a = grad_b = grad_bias = None

        mask = None
        if ctx.dropout:
            shape = (grad.shape[0], ctx.input_shape[-1])
            mask = _mask(shape, grad.device, ctx.dropout, ctx.seed)
        grad_hidden = _product(grad, b, ctx.scale)
        if needs_a or needs_b:
            seen = _drop(operators.as_rows(input), mask)
            if torch.is_grad_enabled():
                # A second derivative has to see how this came from input and A.
                hidden = _product(seen, a.t(), ctx.scale)
            grad_a = (
                _sum_over_rows(grad_hidden, seen, lora_a.dtype) if needs_a else None
            )
            grad_b = _sum_over_rows(grad, hidden, lora_b.dtype) if needs_b else None
        if needs_input:
            grad_rows = operators.multiply_gradient(
                grad, ctx.storage, ctx.input_shape[-1]
            )
            if torch.is_grad_enabled():
                # Autograd lets no result of an operator be changed in place.
                grad_rows = grad_rows + _drop(_product(grad_hidden, a), mask)
            elif mask is None:
                grad_rows.addmm_(grad_hidden, a)
            else:
                grad_rows.add_(_product(grad_hidden, a).mul_(mask))
            grad_input = grad_rows.view(ctx.input_shape)
        if needs_bias:
            grad_bias = grad.sum(0).to(ctx.bias_dtype)
        others = (None,) * (len(ctx.needs_input_grad) - 4)
        return grad_input, grad_a, grad_b, grad_bias, *others


def _update(seen: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """``scale * (seen A^T) B^T`` as PyTorch composes it."""
    hidden = F.linear(seen, lora_a.to(seen.dtype)) * scale
    return F.linear(hidden, lora_b.to(seen.dtype))


def _versions(*tensors: Tensor) -> list[int]:
    """How often each has been changed in place; a compiler sees to that itself."""
    if torch.compiler.is_compiling():
        return []
    return [tensor._version for tensor in tensors]


def _drop(tensor: Tensor, mask: Tensor | None) -> Tensor:
    return tensor if mask is None else tensor * mask


def _mask(
    shape: Sequence[int], device: torch.device, dropout: float, seed: int
) -> Tensor:
    """What dropout lets through: the same for the same shape, device and seed."""
    generator = torch.Generator(device).manual_seed(seed)
    mask = torch.empty(shape, dtype=torch.bool, device=device)
    return mask.bernoulli_(1 - dropout, generator=generator)


def _product(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * left right`` in one kernel, which ``torch.autocast`` leaves alone."""
    product = left.new_empty(left.shape[0], right.shape[1])
    return product.addmm_(left, right, beta=0, alpha=scale)


def _sum_over_rows(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left^T right``, the gradient of a weight, in the type of that weight."""
    half = left.dtype in (torch.float16, torch.bfloat16)
    if half and left.is_cuda and not torch.is_grad_enabled():
        # Not rounded on its way from the float32 sum to a float32 gradient.
        return torch.mm(left.t(), right, out_dtype=torch.float32).to(dtype)
    return _product(left.t(), right).to(dtype)


def _check_adapter(
    weight: QuantizedTensor, lora_a: Tensor, lora_b: Tensor, dropout: float
) -> None:
    out_features, in_features = weight.shape
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name} must be a float tensor, got {tensor.dtype}: convert it to "
                "float32"
            )
        if tensor.device != weight.device:
            raise ValueError(
                f"{name} must be on the device of weight, {weight.device}, got "
                f"{tensor.device}: move one of them with .to(device)"
            )
    if lora_a.dim() != 2 or lora_a.shape[1] != in_features:
        raise ValueError(
            f"lora_a must have shape [rank, {in_features}], a column for each column "
            f"of weight, got {tuple(lora_a.shape)}"
        )
    if lora_b.shape != (out_features, lora_a.shape[0]):
        raise ValueError(
            f"lora_b must have shape ({out_features}, {lora_a.shape[0]}), a row for "
            "each row of weight and a column for each row of lora_a, got "
            f"{tuple(lora_b.shape)}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(
            f"dropout must be at least 0 and below 1, got {dropout}: it is the share "
            "that is dropped"
        )
