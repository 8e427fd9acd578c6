"""Dispatch: which kernel does the work, and where the reference does it.

Triton is imported by the modules that hold kernels, and those only once one of them is
chosen.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lib.kernels.storage import Storage
from qlora_lib.numerics import Codebook
from qlora_lib.numerics import quantize as quantize_by_reference
from qlora_lib.numerics.blockwise import dequantize_blockwise
from qlora_lib.numerics.packing import unpack
from qlora_lib.numerics.quantized_tensor import SCALE_BLOCK_SIZE

# What there are kernels for.
KERNEL_BITS = 4
KERNEL_BLOCK_SIZES = (32, 64, 128, 256)
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Ways to multiply rows [m, k] by W^T, which is stored [n, k], and to add a bias [n].
Product = Callable[[Tensor, Storage, int, Tensor | None], Tensor]
# Ways to multiply the gradient [m, n] of such a product by W, for that of the rows.
Gradient = Callable[[Tensor, Storage, int], Tensor]
Way = TypeVar("Way", Product, Gradient)

# What the matmul kernels take, and where: they need the 227 KiB of shared memory that
# a program can get on an H100 or B200 (compute capability 9.x and 10.x); on a GPU of
# 12.x it is 99 KiB. W has a multiple of so many columns.
MATMUL_ARCHITECTURES = (9, 10)
MATMUL_DTYPES = (torch.float16, torch.bfloat16)
MATMUL_COLUMNS = 128


def _multiply_few_rows(
    rows: Tensor, storage: Storage, n: int, bias: Tensor | None
) -> Tensor:
    from qlora_lib.kernels.matmul_few_rows import matmul_few_rows

    return matmul_few_rows(rows, storage, n, bias)


def _multiply_many_rows(
    rows: Tensor, storage: Storage, n: int, bias: Tensor | None
) -> Tensor:
    from qlora_lib.kernels.matmul_many_rows import matmul_many_rows

    return matmul_many_rows(rows, storage, n, bias)


def _dequantize_then_multiply(
    rows: Tensor, storage: Storage, n: int, bias: Tensor | None
) -> Tensor:
    k = rows.shape[1]
    weight = dequantize(storage, n * k, rows.dtype).view(n, k)
    return F.linear(rows, weight, bias)


def _multiply_gradient(grad_rows: Tensor, storage: Storage, k: int) -> Tensor:
    from qlora_lib.kernels.matmul_gradient import matmul_gradient

    return matmul_gradient(grad_rows, storage, k)


def _dequantize_then_multiply_gradient(
    grad_rows: Tensor, storage: Storage, k: int
) -> Tensor:
    n = grad_rows.shape[1]
    return grad_rows @ dequantize(storage, n * k, grad_rows.dtype).view(n, k)


# The first line whose limits are not exceeded, of the rows of x and of the weights of
# W, says how to multiply. Measured on an H200, without slices of columns: with 32 rows
# the first kernel was faster at 4096 x 4096 and 4096 x 11008, and the second by 2 % at
# 11008 x 4096 and by a quarter at 28672 x 8192; with 512 rows a dense copy of W costs
# about as much as decoding it once for every 128 rows
# (experiments/results/kernel_tilings.json). What there are no kernels for goes the last
# way, which takes every device, block size and type.
CROSSOVERS: tuple[tuple[float, float, Product], ...] = (
    # rows, weights, way
    (16, math.inf, _multiply_few_rows),
    (32, 2**26, _multiply_few_rows),
    (256, math.inf, _multiply_many_rows),
    (math.inf, math.inf, _dequantize_then_multiply),
)
# The same for the gradient, where only the smallest weight and more than 16 rows made
# the dense copy the faster way.
GRADIENT_CROSSOVERS: tuple[tuple[float, float, Gradient], ...] = (
    # rows, weights, way
    (16, math.inf, _multiply_gradient),
    (64, 2**24, _dequantize_then_multiply_gradient),
    (64, math.inf, _multiply_gradient),
    (math.inf, math.inf, _dequantize_then_multiply_gradient),
)


def multiply(rows: Tensor, storage: Storage, n: int, bias: Tensor | None) -> Tensor:
    """``rows W^T + bias``, from ``[m, k]`` to ``[m, n]`` with ``W [n, k]``."""
    m, k = rows.shape
    bias = None if bias is None else bias.to(rows.dtype).contiguous()
    way = _choose(CROSSOVERS, m, n, k, rows.dtype, storage)
    return way(rows, storage, n, bias)


def multiply_gradient(grad_rows: Tensor, storage: Storage, k: int) -> Tensor:
    """``grad_rows W``, from ``[m, n]`` to ``[m, k]`` with ``W [n, k]``."""
    m, n = grad_rows.shape
    way = _choose(GRADIENT_CROSSOVERS, m, n, k, grad_rows.dtype, storage)
    return way(grad_rows, storage, k)


def quantize(
    numbers: Tensor, codebook: Codebook, block_size: int
) -> tuple[Tensor, Tensor]:
    """Packed codes and float32 scales of a flat tensor.

    The reference raises for NaN and infinity; the kernel leaves scales that are not
    finite.
    """
    if has_kernel(numbers.device, codebook.bits, block_size, numbers.dtype):
        from qlora_lib.kernels.quantize import quantize_blocks

        return quantize_blocks(numbers, codebook, block_size)
    q = quantize_by_reference(numbers, codebook, block_size)
    assert isinstance(q.scales, Tensor)  # not quantized in turn
    return q.packed, q.scales


def dequantize(storage: Storage, count: int, dtype: torch.dtype) -> Tensor:
    """The first ``count`` numbers that a storage stands for, ``[count]``."""
    bits = _bits(storage)
    if has_kernel(storage.packed.device, bits, storage.block_size, dtype):
        from qlora_lib.kernels.dequantize import dequantize_blocks

        return dequantize_blocks(storage, count, dtype)
    scales = storage.scales
    if storage.nested_scales is not None:
        assert storage.scale_values is not None and storage.offset is not None
        centered = dequantize_blockwise(
            scales, storage.nested_scales, storage.scale_values, SCALE_BLOCK_SIZE
        )
        scales = centered + storage.offset
    codes = unpack(storage.packed, bits, count)
    return dequantize_blockwise(
        codes, scales, storage.values, storage.block_size, dtype
    )


def has_kernel(
    device: torch.device, bits: int, block_size: int | None, dtype: torch.dtype
) -> bool:
    """Whether kernels take such codes and blocks there, and numbers of this type."""
    return (
        bits == KERNEL_BITS
        and block_size in KERNEL_BLOCK_SIZES
        and dtype in KERNEL_DTYPES
        and runs_triton(device)
    )


def runs_triton(device: torch.device) -> bool:
    """Whether Triton is there and compiles for a device.

    It does for NVIDIA GPUs from the A100 on, and for those of AMD.
    """
    return (
        device.type == "cuda"
        and _has_triton()
        and (torch.version.hip is not None or _capability(device) >= (8, 0))
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    # PyTorch looks it up anew for every product, which costs more than the launch.
    return torch.cuda.get_device_capability(device)


def _choose(
    crossovers: tuple[tuple[float, float, Way], ...],
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    storage: Storage,
) -> Way:
    way = next(
        way for rows, weights, way in crossovers if m <= rows and n * k <= weights
    )
    fallback = crossovers[-1][-1]
    if way is fallback or _has_matmul_kernel(m, n, k, dtype, storage):
        return way
    return fallback


def _has_matmul_kernel(
    m: int, n: int, k: int, dtype: torch.dtype, storage: Storage
) -> bool:
    packed = storage.packed
    return (
        has_kernel(packed.device, _bits(storage), storage.block_size, dtype)
        and _runs_matmuls(packed.device)
        and dtype in MATMUL_DTYPES
        and min(m, n, k) > 0
        and k % MATMUL_COLUMNS == 0
        and k % storage.block_size == 0
        # Codes are loaded 16 bytes at a time, and those of scales 8.
        and packed.is_contiguous()
        and packed.data_ptr() % 16 == 0
        and storage.scales.data_ptr() % 8 == 0
    )


def _runs_matmuls(device: torch.device) -> bool:
    is_nvidia = torch.version.hip is None
    major, _ = _capability(device)
    return is_nvidia and major in MATMUL_ARCHITECTURES


def _bits(storage: Storage) -> int:
    """The width of a code: the table of the values has ``2**bits`` entries."""
    return (len(storage.values) - 1).bit_length()
