"""Every kernel once or twice on few numbers, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python tests/kernels/sanitized.py

Each tensor is an allocation of its own, right behind which memory belongs to no one.
Without a GPU the kernels run in Triton's interpreter.
"""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels are defined

from qlora_lib import NF4  # noqa: E402
from qlora_lib.kernels.dequantize import dequantize_blocks  # noqa: E402
from qlora_lib.kernels.matmul_few_rows import matmul_few_rows  # noqa: E402
from qlora_lib.kernels.matmul_gradient import matmul_gradient  # noqa: E402
from qlora_lib.kernels.matmul_many_rows import matmul_many_rows  # noqa: E402
from qlora_lib.kernels.quantize import quantize_blocks  # noqa: E402
from qlora_lib.kernels.storage import storage_of  # noqa: E402
from qlora_lib.numerics import quantize  # noqa: E402

# Rows of W, columns, block size, whether scales are quantized: with and without
# a remainder for programs, warps and spans.
WEIGHTS = [(17, 384, 32, True), (16, 1280, 256, False), (70, 512, 64, True)]


def main() -> None:
    torch.manual_seed(0)
    for count in (1, 63, 1001):
        packed, _ = quantize_blocks(torch.randn(count, device=DEVICE), NF4, 32)
        assert len(packed) == -(-count // 2)
    for n, k, block_size, double_quant in WEIGHTS:
        weight = torch.randn(n, k)
        q = quantize(weight, NF4, block_size, double_quant).to(DEVICE)
        storage = storage_of(q)
        dense = dequantize_blocks(storage, n * k, torch.float32).view(n, k)
        for m, product in (
            (3, matmul_few_rows),
            (17, matmul_few_rows),
            (33, matmul_many_rows),
            (129, matmul_many_rows),
        ):
            x = torch.randn(m, k, device=DEVICE, dtype=torch.float16)
            bias = torch.randn(n, device=DEVICE, dtype=torch.float16)
            check(product(x, storage, n, bias), x.float() @ dense.T + bias)
        for m in (1, 17, 64):
            grad = torch.randn(m, n, device=DEVICE, dtype=torch.bfloat16)
            check(matmul_gradient(grad, storage, k), grad.float() @ dense)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    difference = torch.linalg.vector_norm(actual.float() - expected)
    assert difference < 0.01 * torch.linalg.vector_norm(expected)


if __name__ == "__main__":
    main()
