"""The operators of ``torch.library``, which ``torch.compile`` takes as they are.

Each has one implementation for every device, which leaves the choice of a kernel to
:mod:`qlora_lib.kernels.dispatch`, a fake one that knows shapes alone, and a formula for
the backward pass where there is one. They take the tensors of a
:class:`~qlora_lib.kernels.storage.Storage` part by part:

- ``quantize_blocks(numbers, values, ties, block_size) -> (packed, scales)``
- ``dequantize_blocks(*storage, count, dtype) -> numbers``
- ``matmul(input, *storage, out_features, bias) -> output``
- ``matmul_input_gradient(grad_output, *storage, in_features) -> grad_input``
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_lib.kernels import dispatch
from qlora_lib.kernels.storage import Storage
from qlora_lib.numerics import Codebook
from qlora_lib.numerics.packing import packed_size

# A Storage in the schema of an operator, in the order of its fields.
STORAGE = (
    "Tensor packed, Tensor scales, Tensor? nested_scales, Tensor? offset, "
    "Tensor values, Tensor? scale_values, SymInt block_size"
)
NO_GRADIENTS = (None,) * len(Storage._fields)


def _define(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
) -> torch._ops.OpOverload[..., Any]:
    # torch.library.custom_op would import the compiler when it is first called.
    qualified = f"qlora_lib::{name}"
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "default", implementation)
    torch.library.register_fake(qualified, fake)
    operator: torch._ops.OpOverload[..., Any]
    operator = getattr(torch.ops.qlora_lib, name).default
    return operator


def _quantize_blocks(
    numbers: Tensor, values: Sequence[float], ties: str, block_size: int
) -> tuple[Tensor, Tensor]:
    return dispatch.quantize(numbers, _codebook(tuple(values), ties), block_size)


def _quantize_blocks_fake(
    numbers: Tensor, values: Sequence[float], ties: str, block_size: int
) -> tuple[Tensor, Tensor]:
    count, bits = numbers.numel(), (len(values) - 1).bit_length()
    return (
        numbers.new_empty(packed_size(count, bits), dtype=torch.uint8),
        numbers.new_empty(-(-count // block_size), dtype=torch.float32),
    )


# The codebook comes as its numbers: the kernel makes tables of them on the host.
quantize_blocks = _define(
    "quantize_blocks",
    "(Tensor numbers, float[] values, str ties, SymInt block_size) "
    "-> (Tensor packed, Tensor scales)",
    _quantize_blocks,
    _quantize_blocks_fake,
)


def _dequantize_blocks(*arguments: Any) -> Tensor:
    *parts, count, dtype = arguments
    return dispatch.dequantize(Storage(*parts), count, dtype)


def _dequantize_blocks_fake(packed: Tensor, *arguments: Any) -> Tensor:
    *_, count, dtype = arguments
    return packed.new_empty(count, dtype=dtype)


dequantize_blocks = _define(
    "dequantize_blocks",
    f"({STORAGE}, SymInt count, ScalarType dtype) -> Tensor",
    _dequantize_blocks,
    _dequantize_blocks_fake,
)


def _matmul(input: Tensor, *arguments: Any) -> Tensor:
    *parts, out_features, bias = arguments
    rows = dispatch.multiply(as_rows(input), Storage(*parts), out_features, bias)
    return rows.view(*input.shape[:-1], out_features)


def _matmul_fake(input: Tensor, *arguments: Any) -> Tensor:
    *_, out_features, _bias = arguments
    return input.new_empty((*input.shape[:-1], out_features))


matmul = _define(
    "matmul",
    f"(Tensor input, {STORAGE}, SymInt out_features, Tensor? bias) -> Tensor",
    _matmul,
    _matmul_fake,
)


def _matmul_input_gradient(grad_output: Tensor, *arguments: Any) -> Tensor:
    *parts, in_features = arguments
    rows = as_rows(grad_output)
    grad_rows = dispatch.multiply_gradient(rows, Storage(*parts), in_features)
    return grad_rows.view(*grad_output.shape[:-1], in_features)


def _matmul_input_gradient_fake(grad_output: Tensor, *arguments: Any) -> Tensor:
    *_, in_features = arguments
    return grad_output.new_empty((*grad_output.shape[:-1], in_features))


matmul_input_gradient = _define(
    "matmul_input_gradient",
    f"(Tensor grad_output, {STORAGE}, SymInt in_features) -> Tensor",
    _matmul_input_gradient,
    _matmul_input_gradient_fake,
)


def multiply(rows: Tensor, storage: Storage, n: int, bias: Tensor | None) -> Tensor:
    """``matmul`` of ``[m, k]``, past PyTorch's dispatcher where nobody listens to it.

    For use inside of an autograd function. A training step multiplies hundreds of
    times, and finding the way to an operator in Python takes longer than a launch.
    """
    if _is_observed(rows):
        output: Tensor = matmul(rows, *storage, n, bias)
        return output
    return dispatch.multiply(rows, storage, n, bias)


def multiply_gradient(grad_rows: Tensor, storage: Storage, k: int) -> Tensor:
    """``matmul_input_gradient`` of ``[m, n]``, likewise."""
    if _is_observed(grad_rows):
        grad_input: Tensor = matmul_input_gradient(grad_rows, *storage, k)
        return grad_input
    return dispatch.multiply_gradient(grad_rows, storage, k)


def as_rows(tensor: Tensor) -> Tensor:
    """``[..., k]`` to ``[m, k]``; reshape(-1, k) could not tell m if k is 0."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _is_observed(rows: Tensor) -> bool:
    """Whether autograd, a compiler, a mode or a kind of tensor has to see operators."""
    return (
        type(rows) is not Tensor
        or rows.is_meta
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _save_for_matmul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, *parts, _, bias = inputs
    *tensors, ctx.block_size = parts
    ctx.save_for_backward(*tensors)
    ctx.in_features = input.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate_matmul(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = matmul_input_gradient(
            grad_output, *ctx.saved_tensors, ctx.block_size, ctx.in_features
        )
    if ctx.needs_input_grad[-1]:
        grad_bias = grad_output.sum_to_size(grad_output.shape[-1]).to(ctx.bias_dtype)
    return grad_input, *NO_GRADIENTS, None, grad_bias


def _save_for_input_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, *parts, _ = inputs
    *tensors, ctx.block_size = parts
    ctx.save_for_backward(*tensors)
    ctx.out_features = grad_output.shape[-1]


def _differentiate_input_gradient(
    ctx: Any, grad_grad_input: Tensor
) -> tuple[Tensor | None, ...]:
    grad_grad_output = matmul(
        grad_grad_input, *ctx.saved_tensors, ctx.block_size, ctx.out_features, None
    )
    return grad_grad_output, *NO_GRADIENTS, None


torch.library.register_autograd(
    matmul, _differentiate_matmul, setup_context=_save_for_matmul
)
torch.library.register_autograd(
    matmul_input_gradient,
    _differentiate_input_gradient,
    setup_context=_save_for_input_gradient,
)


@functools.lru_cache
def _codebook(values: tuple[float, ...], ties: Any) -> Codebook:
    return Codebook("", values, ties)
