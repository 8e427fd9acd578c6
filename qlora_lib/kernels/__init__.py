"""The kernels: quantize, dequantize and multiply 4-bit tensors on a GPU.

:mod:`qlora_lib.kernels.ops` is the entrance; it imports Triton on the first use with a
GPU.
"""
