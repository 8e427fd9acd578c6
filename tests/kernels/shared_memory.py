"""What shared memory a matmul's kernel asks Triton for, launch by launch.

    PYTHONPATH=experiments python tests/kernels/shared_memory.py gradient sm_90

Prints JSON: bytes by the name of the launch. Triton loads ahead, and keeps shared
memory for, only what it can copy in pieces of at least 4 bytes. Whether it can depends
on addresses and strides, so the launchers get tensors of every layout.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor

from compile_kernels import compile_ahead
from kernel_launches import Entry, recording, storage
from qlora_lib.kernels import matmul_few_rows, matmul_gradient, matmul_many_rows
from qlora_lib.kernels.storage import Storage

DTYPES = (torch.float16, torch.bfloat16)
BLOCK_SIZES = (32, 64, 128, 256)
LAUNCHES = {
    "few_rows": lambda: product_launches(matmul_few_rows, (4352,)),
    # With a single chunk of 128 columns nothing is loaded ahead.
    "many_rows": lambda: product_launches(matmul_many_rows, (128, 256, 8192)),
    "gradient": lambda: gradient_launches(),
}


def main() -> None:
    kind, target = sys.argv[1:]
    entries: list[Entry] = []
    for entry in LAUNCHES[kind]():
        # Those that are compiled for the same are one.
        if all(entry != dataclasses.replace(e, name=entry.name) for e in entries):
            entries.append(entry)
    asked = {e.name: compile_ahead(e, target).metadata.shared for e in entries}
    assert len(asked) == len(entries)
    json.dump(asked, sys.stdout)


def gradient_launches() -> Iterator[Entry]:
    """Every number of rows that the kernel is compiled for, and every kind of steps."""
    # One row, a number that is no multiple of 16 and one that is; of W the fewest steps
    # and eight.
    ms = (1, 25, 64)
    ns = (65, 8 * matmul_gradient.SLICES * int(matmul_gradient.STEP))
    for m, n, dtype in product(ms, ns, DTYPES):
        for layout, grad in layouts(m, n, dtype):
            yield from record(
                matmul_gradient,
                f"{layout} [{m}, {n}] {dtype}",
                lambda weight, grad=grad: matmul_gradient.matmul_gradient(
                    grad, weight, 8192
                ),
                BLOCK_SIZES,
            )


def product_launches(module: ModuleType, ks: tuple[int, ...]) -> Iterator[Entry]:
    """Every tiling, with and without a partial tile of rows."""
    multiply = getattr(module, module.__name__.rpartition(".")[2])
    for rows, tilings in module.TILINGS.items():
        for tiling, k in product(tilings, ks):
            only = {**module.TILINGS, rows: (tiling,)}
            for m, dtype in ((rows, DTYPES[0]), (rows - 1, DTYPES[1])):
                for layout, x in layouts(m, k, dtype):
                    with patch.object(module, "TILINGS", only):
                        yield from record(
                            module,
                            f"{layout} [{m}, {k}] {dtype}, {tiling}",
                            lambda weight, x=x: multiply(x, weight, 4096, None),
                            [size for size in (32, 256) if k % size == 0],
                        )


def layouts(m: int, n: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Rows that begin at multiples of 16 bytes, or of 2, or have gaps."""
    yield "contiguous", torch.empty(m, n, dtype=dtype)
    yield "unaligned", torch.empty(m * n + 1, dtype=dtype)[1:].view(m, n)
    yield "row stride", torch.empty(m, n + 1, dtype=dtype)[:, :n]
    yield "column stride", torch.empty(m, 2 * n, dtype=dtype)[:, ::2]
    yield "transposed", torch.empty(n, m, dtype=dtype).T
    yield "expanded", torch.empty((), dtype=dtype).expand(m, n)


def record(
    module: ModuleType,
    name: str,
    launch: Callable[[Storage], Tensor],
    block_sizes: Iterable[int],
) -> Iterator[Entry]:
    """What the launcher gives its kernel, for every layout of scales."""
    kernel_name = module.__name__.rpartition(".")[2].removeprefix("matmul_") + "_kernel"
    kernel = getattr(module, kernel_name)
    for block_size, nested in product(block_sizes, (False, True)):
        with recording(module, kernel_name) as launches:
            launch(storage(block_size, nested))
        layout = f"block {block_size}, {'nested' if nested else 'flat'}"
        yield launches.entry(f"{name}, {layout}", kernel, weights=1, in_loop=True)


if __name__ == "__main__":
    main()
