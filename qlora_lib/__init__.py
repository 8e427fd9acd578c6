"""QLoRA, from a vector of four numbers to a fine-tuned language model."""

from qlora_lib.kernels.ops import dequantize, matmul, quantize
from qlora_lib.memory import estimate_memory
from qlora_lib.nn import Linear4bit
from qlora_lib.numerics import (
    FP4,
    INT4,
    NF4,
    TOY,
    Codebook,
    QuantizedTensor,
    normal_float,
)
from qlora_lib.optim import PagedAdamW

__version__ = "0.1.0"

__all__ = [
    "FP4",
    "INT4",
    "NF4",
    "TOY",
    "Codebook",
    "Linear4bit",
    "PagedAdamW",
    "QuantizedTensor",
    "dequantize",
    "estimate_memory",
    "matmul",
    "normal_float",
    "quantize",
]
