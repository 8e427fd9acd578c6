"""Storage: the raw tensors of a 4-bit tensor, as kernels and operators take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qlora_lib.numerics import QuantizedTensor


class Storage(NamedTuple):
    """The parts of a QuantizedTensor on one device, without its Python objects.

    Attributes:
        packed: uint8 ``[ceil(count * bits / 8)]``; at 4 bits two codes a byte, the
            first in the high half.
        scales: float32 ``[blocks]``, or after double quantization their uint8 codes.
        nested_scales: float32 ``[ceil(blocks / 256)]``, the scales of the scales; None
            for float scales.
        offset: float32 scalar, the mean of the scales; None for float scales.
        values: float32 ``[2**bits]``, the codebook, ``[16]`` where there are kernels.
            Shorter codebooks are padded with zeros.
        scale_values: float32 ``[256]``, the codebook of the scales; None for float
            scales.
        block_size: How many consecutive codes share a scale.
    """

    packed: Tensor
    scales: Tensor
    nested_scales: Tensor | None
    offset: Tensor | None
    values: Tensor
    scale_values: Tensor | None
    block_size: int

    def in_words(self) -> tuple[Tensor | None, ...]:
        """The tensors as the matmul kernels take them, codes as int32 words of 8."""
        return self.packed.view(torch.int32), *self[1:-1]


def storage_of(q: QuantizedTensor) -> Storage:
    """The tensors of ``q``; scales that are quantized in an unusual way are decoded."""
    scales, nested_scales, offset, scale_values = q.scales, None, None, None
    if isinstance(scales, QuantizedTensor):
        if q.has_standard_scales:
            assert isinstance(scales.scales, Tensor)  # has_standard_scales says so
            nested_scales, offset = _flat(scales.scales), scales.offset
            scale_values = scales.codebook.table(scales.device)
            scales = scales.packed
        else:
            scales = scales.dequantize()
    return Storage(
        packed=_flat(q.packed),
        scales=_flat(scales),
        nested_scales=nested_scales,
        offset=offset,
        values=q.codebook.table(q.device),
        scale_values=scale_values,
        block_size=q.block_size or max(q.shape.numel(), 1),
    )


def _flat(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1)
