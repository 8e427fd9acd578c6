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
from qlora_lib.kernels.adamw import (  # noqa: E402
    PROGRAM,
    ParameterTable,
    update_pages,
)
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
    for state_bits in (32, 8):
        for dtype in (torch.float32, torch.bfloat16):
            update_two_parameters(dtype, state_bits, (8, 2056), aligned=True)
            update_two_parameters(dtype, state_bits, (13, 2049), aligned=False)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


def update_two_parameters(
    dtype: torch.dtype, state_bits: int, counts: tuple[int, int], aligned: bool
) -> None:
    """The first step of AdamW, in three programs of two pages; the fourth is unused."""
    parameters = [torch.ones(count, device=DEVICE, dtype=dtype) for count in counts]
    gradients = [torch.randn_like(parameter) for parameter in parameters]
    page_size = 2 * PROGRAM
    page_bytes = page_size * 8 if state_bits == 32 else page_size * 2 + page_size // 32
    pages = [
        torch.zeros(page_bytes, device=DEVICE, dtype=torch.uint8) for _ in range(2)
    ]
    addresses = [[each.data_ptr() for each in rows] for rows in (parameters, gradients)]
    # Decay, 1 - beta1, beta2, 1 - beta2, root correction, eps, step size.
    factors = [1.0, 0.1, 0.999, 0.001, 0.001**0.5, 1e-8, 0.25 / 0.1]
    table = ParameterTable(
        torch.tensor([0, 1, 1, -1], dtype=torch.int32, device=DEVICE),
        torch.tensor([0, 1], device=DEVICE),
        torch.tensor(counts, device=DEVICE),
        torch.tensor(addresses, device=DEVICE),
        torch.tensor([[each] * 2 for each in factors], dtype=torch.float64).to(DEVICE),
    )
    update_pages(
        torch.tensor([1, 0], dtype=torch.int32, device=DEVICE),
        torch.tensor([pages[1].data_ptr(), pages[0].data_ptr()], device=DEVICE),
        table,
        dtype,
        page_size,
        state_bits,
        aligned,
    )
    # In the first step each number moves by the learning rate.
    for parameter, gradient in zip(parameters, gradients, strict=True):
        check(parameter, 1 - 0.25 * gradient.float().sign())


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    difference = torch.linalg.vector_norm(actual.float() - expected)
    assert difference < 0.01 * torch.linalg.vector_norm(expected)


if __name__ == "__main__":
    main()
