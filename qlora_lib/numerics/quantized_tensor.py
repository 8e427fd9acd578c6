"""QuantizedTensor: packed codes and their scales, which may be quantized in turn."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_lib.numerics.blockwise import (
    absmax_scales,
    dequantize_blockwise,
    quantize_blockwise,
)
from qlora_lib.numerics.codebooks import DYNAMIC8, Codebook
from qlora_lib.numerics.packing import pack, unpack

# Double quantization stores the scales as 8-bit codes in blocks of 256 (paper, section
# 3).
SCALE_CODEBOOK = DYNAMIC8
SCALE_BLOCK_SIZE = 256

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor as codes and scales.

    ``x[i] = codebook.values[codes[i]] * scales[i // block_size] + offset``

    Attributes:
        packed: uint8 ``[ceil(count * codebook.bits / 8)]``, see
            :mod:`qlora_lib.numerics.packing`.
        scales: float32 ``[blocks]``, or after double quantization a QuantizedTensor of
            that shape.
        codebook: The values that the codes stand for.
        block_size: How many consecutive numbers share a scale; None for all of them.
        shape: Shape of the tensor that was quantized.
        dtype: Type of the tensor that was quantized, and of :meth:`dequantize` by
            default.
        offset: float32 scalar that was subtracted before quantization, or None. Only
            the scales of a doubly quantized tensor have one: their mean.
    """

    packed: Tensor
    scales: Tensor | QuantizedTensor
    codebook: Codebook
    block_size: int | None
    shape: torch.Size
    dtype: torch.dtype
    offset: Tensor | None = None

    @property
    def codes(self) -> Tensor:
        """The codes, unpacked, as uint8 of the tensor's shape."""
        count = self.shape.numel()
        return unpack(self.packed, self.codebook.bits, count).view(self.shape)

    @property
    def device(self) -> torch.device:
        """Where the codes and the scales are."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes held by packed codes, scales and offset.

        The codebook is not counted, since all tensors of a data type share one.
        """
        offset = 0 if self.offset is None else self.offset.nbytes
        return self.packed.nbytes + self.scales.nbytes + offset

    @property
    def bits_per_parameter(self) -> float:
        """``8 * nbytes / count``; 0 for an empty tensor."""
        count = self.shape.numel()
        return 8 * self.nbytes / count if count else 0.0

    @property
    def has_standard_scales(self) -> bool:
        """Whether the scales are laid out as :func:`quantize` leaves them.

        They are float, or after double quantization 8-bit codes in blocks of 256 with
        an offset; the tensor itself has no offset.
        """
        scales = self.scales
        return self.offset is None and (
            isinstance(scales, Tensor)
            or (
                scales.block_size == SCALE_BLOCK_SIZE
                and scales.codebook.bits == SCALE_CODEBOOK.bits
                and isinstance(scales.scales, Tensor)
                and scales.offset is not None
            )
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the numbers that the codes stand for.

        This is the reference, in plain PyTorch on every device;
        :func:`qlora_lib.dequantize` gives the same bits, and faster on a GPU.

        Args:
            dtype: Float type of the result; None for the type of the original tensor.
                Products and the offset are float32, and the sum is rounded once.

        Returns:
            Tensor of the original shape.

        Raises:
            TypeError: If ``dtype`` is no float type.
        """
        dtype = dtype or self.dtype
        if not dtype.is_floating_point:
            raise TypeError(
                f"dtype must be a float type, got {dtype}: the integer codes are in "
                ".codes"
            )
        scales = self.scales
        if isinstance(scales, QuantizedTensor):
            scales = scales.dequantize()
        count = self.shape.numel()
        numbers = dequantize_blockwise(
            self.codes.view(-1),
            scales,
            self.codebook.table(self.device)[: len(self.codebook)],
            self.block_size or max(count, 1),
            dtype if self.offset is None else torch.float32,
        )
        if self.offset is not None:
            numbers = (numbers + self.offset).to(dtype)
        return numbers.view(self.shape)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """Return the same tensor with its codes and scales on ``device``.

        Raises:
            TypeError: If ``device`` is a dtype, which ``Tensor.to`` would take as well.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(
                f"device must be a device, got {device}: codes and scales have fixed "
                "types, pass the dtype to dequantize()"
            )
        return dataclasses.replace(
            self,
            packed=self.packed.to(device),
            scales=self.scales.to(device),
            offset=None if self.offset is None else self.offset.to(device),
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

    This is the reference, in plain PyTorch on every device; :func:`qlora_lib.quantize`
    gives the same bits, and faster on a GPU.

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
    numbers = tensor.reshape(-1)
    count = numbers.numel()
    size = block_size or max(count, 1)
    scales = absmax_scales(numbers, size)
    check_finite(scales, numbers, size)
    codes = quantize_blockwise(numbers, scales, codebook, size)
    zero_code = int(codebook.nearest(torch.zeros(1, dtype=torch.float32, device="cpu")))
    return QuantizedTensor(
        packed=pack(codes, codebook.bits, padding=zero_code),
        scales=quantize_scales(scales) if double_quant else scales,
        codebook=codebook,
        block_size=block_size,
        shape=tensor.shape,
        dtype=tensor.dtype,
    )


def quantize_scales(scales: Tensor) -> QuantizedTensor:
    """Quantize scales after subtracting their mean, since they are all positive."""
    offset = scales.mean() if len(scales) else scales.new_zeros(())
    if bool(offset.isinf()):  # the sum left the range of float32; the mean lies in it
        offset = scales.double().mean().float()
    centered = quantize(scales - offset, SCALE_CODEBOOK, SCALE_BLOCK_SIZE)
    return dataclasses.replace(centered, offset=offset)


def check_arguments(tensor: Tensor, codebook: Codebook, block_size: int | None) -> None:
    """Raise for arguments that :func:`quantize` cannot take; see there."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOAT_DTYPES:
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(
            "tensor must be a float16, bfloat16, float32 or float64 tensor, got "
            f"{found}: convert it with .float()"
        )
    if tensor.is_meta:
        raise ValueError(
            "tensor is on the meta device and holds no numbers: load them first"
        )
    if not isinstance(codebook, Codebook):
        raise TypeError(f"codebook must be a Codebook such as NF4, got {codebook!r}")
    if block_size is None:
        return
    if not isinstance(block_size, int) or isinstance(block_size, bool):
        raise TypeError(f"block_size must be an integer or None, got {block_size!r}")
    if block_size < 1:
        raise ValueError(
            f"block_size must be at least 1, got {block_size}; use None for one scale "
            "for the whole tensor"
        )


def check_finite(scales: Tensor, numbers: Tensor, block_size: int) -> None:
    """Name the first number that has no place in a block; the scales already know."""
    bad_blocks = ~torch.isfinite(scales)
    if not bool(bad_blocks.any()):
        return
    start = int(bad_blocks.nonzero()[0]) * block_size
    block = numbers[start : start + block_size]
    index = int((~torch.isfinite(block.float())).nonzero()[0])
    raise ValueError(
        f"tensor holds {float(block[index])} at flat index {start + index}, which has "
        "no finite float32 value: remove NaN and infinity, or scale the tensor down"
    )
