"""The linear layers that are timed side by side: this library's and its peers'.

Each is made from a bf16 weight by the calls that its own users make. A peer is imported
when its layer is made, so one that is not installed can be reported and left out.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP_SIZE = 64


@dataclass(frozen=True)
class Layer:
    """A linear layer with a frozen weight ``[n, k]``.

    Attributes:
        forward: ``[m, k]`` -> ``[m, n]`` without gradients.
        differentiable: The same for an input that requires its gradient; None if the
            peer has no backward pass.
        dense: The weight that the layer stands for, in float32.
        nbytes: What a product reads of the weight.
        tolerance: Relative error of its outputs that rounding explains.
    """

    forward: Callable[[Tensor], Tensor]
    differentiable: Callable[[Tensor], Tensor] | None
    dense: Callable[[], Tensor]
    nbytes: int
    tolerance: float = 1e-2


def make_qlora_lib(weight: Tensor) -> Layer:
    """NF4 in blocks of 64 with double quantization."""
    from qlora_lib import NF4, Linear4bit, quantize
    from qlora_lib.kernels.ops import matmul

    quantized = quantize(weight, NF4, 64, double_quant=True)
    return Layer(
        lambda x: matmul(x, quantized),
        Linear4bit(quantized),
        lambda: quantized.dequantize(torch.float32),
        quantized.nbytes,
    )


def make_bf16(weight: Tensor) -> Layer:
    """The layer that 4 bits replace: cuBLAS on a GPU."""

    def linear(x: Tensor) -> Tensor:
        return F.linear(x, weight)

    return Layer(linear, linear, weight.float, weight.nbytes)


def make_bitsandbytes(weight: Tensor) -> Layer:
    """What bitsandbytes' Linear4bit does: NF4, blocks of 64, double quantization."""
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )

    def linear(x: Tensor) -> Tensor:
        return bnb.matmul_4bit(x, packed, quant_state=state)

    return Layer(
        linear,
        linear,
        lambda: bnb.functional.dequantize_4bit(packed, state).float(),
        packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes,
    )


def make_torchao(weight: Tensor) -> Layer:
    """NF4 in blocks of 64 with double quantization, for QLoRA recipes."""
    from torchao.dtypes.nf4tensor import linear_nf4, to_nf4

    quantized = to_nf4(weight, block_size=64, scaler_block_size=256)

    def linear(x: Tensor) -> Tensor:
        return linear_nf4(x, quantized)

    return Layer(
        linear,
        linear,
        lambda: quantized.get_original_weight().float(),
        quantized.quantized_data.nbytes + quantized.quantized_scalers.nbytes,
    )


def make_gemlite(weight: Tensor) -> Layer:
    """Weight-only 4-bit integers with a scale and a zero in each group of 64."""
    from gemlite.helper import A16Wn

    use_shipped_configurations(*weight.shape)
    codes, scales, minimum = quantize_affine(weight)
    layer = A16Wn(weight.device, weight.dtype).from_weights(
        codes, scales, -minimum / scales, W_nbits=4, group_size=GROUP_SIZE
    )

    def dense() -> Tensor:  # from what the layer stores: code * scale + zero
        groups = codes.float().view(*scales.shape, GROUP_SIZE)
        scale, zero = (
            part.t().float()[..., None] for part in (layer.scales, layer.zeros)
        )
        return (groups * scale + zero).view(weight.shape)

    nbytes = layer.W_q.nbytes + layer.scales.nbytes + layer.zeros.nbytes
    # Its split kernels add up to hundreds of partial sums in bf16.
    return Layer(layer.forward, None, dense, nbytes, tolerance=5e-2)


def make_tinygemm(weight: Tensor) -> Layer:
    """PyTorch's own 4-bit product: integers with a scale and a zero per group of 64."""
    codes, scales, minimum = quantize_affine(weight)
    zeros = minimum + 8 * scales  # the value of code 8
    packed = torch.ops.aten._convert_weight_to_int4pack(
        codes[:, ::2] << 4 | codes[:, 1::2], 8
    )
    scales_and_zeros = torch.stack([scales, zeros], -1).transpose(0, 1).contiguous()

    def linear(x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(
            x, packed, GROUP_SIZE, scales_and_zeros
        )

    def dense() -> Tensor:
        groups = codes.float().view(*scales.shape, GROUP_SIZE)
        values = (groups - 8) * scales.float()[..., None] + zeros.float()[..., None]
        return values.view(weight.shape)

    return Layer(linear, None, dense, packed.nbytes + scales_and_zeros.nbytes)


MAKERS: dict[str, Callable[[Tensor], Layer]] = {
    "qlora_lib": make_qlora_lib,
    "bf16": make_bf16,
    "bitsandbytes": make_bitsandbytes,
    "torchao": make_torchao,
    "gemlite": make_gemlite,
    "tinygemm": make_tinygemm,
}
COMPILED_BY_TRITON = ("qlora_lib", "gemlite")


@dataclass(frozen=True)
class Codec:
    """How a library quantizes a tensor to NF4 in blocks of 64, and back.

    Attributes:
        quantize: The public call, with float scales.
        double_quantize: The same with double quantization.
        dequantize: What either returned, back to bf16.
        kernel: The device's part of ``quantize``, as ``(packed, scales)``; None if it
            cannot be captured in a CUDA graph.
        packed: The packed codes in what ``quantize`` returned.
    """

    quantize: Callable[[Tensor], Any]
    double_quantize: Callable[[Tensor], Any]
    dequantize: Callable[[Any], Tensor]
    kernel: Callable[[Tensor], tuple[Tensor, Tensor]] | None
    packed: Callable[[Any], Tensor]


def qlora_lib_codec() -> Codec:
    from qlora_lib import NF4, quantize
    from qlora_lib.kernels.ops import dequantize

    values = NF4.values.tolist()
    return Codec(
        lambda x: quantize(x, NF4, 64),
        lambda x: quantize(x, NF4, 64, double_quant=True),
        lambda q: dequantize(q, torch.bfloat16),
        lambda x: torch.ops.qlora_lib.quantize_blocks(x.view(-1), values, NF4.ties, 64),
        lambda q: q.packed,
    )


def bitsandbytes_codec() -> Codec:
    import bitsandbytes.functional as bnb

    def quantize(x: Tensor, double: bool) -> Any:
        return bnb.quantize_4bit(
            x, blocksize=64, compress_statistics=double, quant_type="nf4"
        )

    return Codec(
        lambda x: quantize(x, False),
        lambda x: quantize(x, True),
        lambda q: bnb.dequantize_4bit(*q),
        None,  # it runs on the default stream, whichever is current
        lambda q: q[0],
    )


CODECS: dict[str, Callable[[], Codec]] = {
    "qlora_lib": qlora_lib_codec,
    "bitsandbytes": bitsandbytes_codec,
}


def quantize_affine(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 15, and the scale and minimum of each group, of the weight's dtype.

    ``weight = code * scale + minimum``
    """
    groups = weight.float().view(weight.shape[0], -1, GROUP_SIZE)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = ((high - low) / 15).to(weight.dtype)
    minimum = low.to(weight.dtype)
    codes = ((groups - minimum.float()) / scales.float()).round().clamp(0, 15)
    packable = codes.to(torch.uint8).view(weight.shape)
    return packable, scales.squeeze(-1), minimum.squeeze(-1)


def use_shipped_configurations(n: int, k: int) -> None:
    """Let gemlite use what it ships for the H100, at the nearest shape and M.

    It ships none for the H200, and would search for a minute at each shape and M.
    The H100 has the same multiprocessors, and gemlite's authors searched longer there.
    """
    import gemlite

    file = Path(gemlite.__file__).parent / "configs" / "h100.json"
    shipped = json.loads(file.read_text())
    for kernel in ("GEMV_REVSPLITK", "GEMM_SPLITK", "GEMM"):
        known = {tuple(json.loads(f"[{key[1:-1]}]")): key for key in shipped[kernel]}
        chosen = gemlite.core.GEMLITE_TRITON_CONFIG_CACHE.setdefault(kernel, {})
        for m in (2**exponent for exponent in range(13)):
            nearest = nearest_key(known, m, n, k)
            # A key ends with group size, codes per word, and types of input and weight.
            chosen[str((m, n, k, *nearest[3:]))] = shipped[kernel][known[nearest]]


def nearest_key(keys: Iterable[tuple[int, ...]], m: int, n: int, k: int) -> Any:
    """The key ``(m, n, k, 64, 8, 104)`` with the least ratios to the wanted sizes.

    In gemlite 104 stands for 16-bit inputs and 4-bit weights, packed 8 to a word.
    """

    def distance(key: tuple[int, ...]) -> float:
        return sum(
            abs(math.log(has / wanted))
            for has, wanted in zip(key, (m, n, k), strict=False)
        )

    return min((key for key in keys if key[3:] == (GROUP_SIZE, 8, 104)), key=distance)
