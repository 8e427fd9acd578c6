"""Layers whose weights stay quantized."""

from qlora_lib.nn.linear import Linear4bit, quantize_linears
from qlora_lib.nn.loftq import loftq_split
from qlora_lib.nn.lora import lora_linear

__all__ = ["Linear4bit", "loftq_split", "lora_linear", "quantize_linears"]
