"""Layers whose weights stay quantized."""

from qlora_lib.nn.linear import Linear4bit, quantize_linears

__all__ = ["Linear4bit", "quantize_linears"]
