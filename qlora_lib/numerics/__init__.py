"""The numbers: codebooks, blocks, packing and the QuantizedTensor, in plain PyTorch.

This is the reference that everything faster is compared with.
"""

from qlora_lib.numerics.codebooks import (
    DYNAMIC8,
    DYNAMIC8_UNSIGNED,
    FP4,
    FP4_BITSANDBYTES,
    FP4_E3M0,
    INT4,
    NF4,
    TOY,
    Codebook,
    dynamic,
    floating_point,
    integer,
    normal_float,
)
from qlora_lib.numerics.lloyd_max import lloyd_max
from qlora_lib.numerics.names import codebook_by_name
from qlora_lib.numerics.packing import pack, unpack
from qlora_lib.numerics.quantized_tensor import QuantizedTensor, quantize

__all__ = [
    "DYNAMIC8",
    "DYNAMIC8_UNSIGNED",
    "FP4",
    "FP4_BITSANDBYTES",
    "FP4_E3M0",
    "INT4",
    "NF4",
    "TOY",
    "Codebook",
    "QuantizedTensor",
    "codebook_by_name",
    "dynamic",
    "floating_point",
    "integer",
    "lloyd_max",
    "normal_float",
    "pack",
    "quantize",
    "unpack",
]
