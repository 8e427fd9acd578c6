"""Time every way to multiply, in every tiling, and quantize and dequantize.

    python experiments/tune_kernels.py [--out DIR]    # one GPU, about 2 minutes

The tables in qlora_lib/kernels are to be filled from what this prints: CROSSOVERS and
GRADIENT_CROSSOVERS in dispatch.py, TILINGS and STAGES of the matmuls, the numbers per
program of quantize and dequantize. Columns are not cut into slices here. How many
programs share a multiprocessor follows from the registers and the memory that
compile_kernels.py prints. Every candidate is compared with a float32 product before it
is timed. Writes kernel_tilings.json.
"""

import argparse
import functools
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from matmul_report import SHAPES
from qlora_lib.kernels import dequantize, quantize
from qlora_lib.kernels import matmul_few_rows as few
from qlora_lib.kernels import matmul_gradient as gradient
from qlora_lib.kernels import matmul_many_rows as many
from qlora_lib.kernels.dispatch import dequantize as dequantized
from qlora_lib.kernels.ops import quantize as quantize_tensor
from qlora_lib.kernels.storage import Storage, storage_of
from qlora_lib.kernels.tiles import Tiling
from qlora_lib.numerics import NF4
from record import RESULTS, provenance, write_record
from timing import capture, copies_needed, seconds_per_call

DEVICE = "cuda"
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
TOLERANCE = 1e-2
PROCESSES = 12
CODEC_SIDE = 16384

FEW_TILINGS = [
    Tiling(outputs, warps, sharing=1, registers=registers)
    for outputs, warps, registers in (
        (16, 4, 96),
        (16, 4, None),
        (16, 8, 96),
        (32, 4, 168),
        (32, 4, None),
    )
]
# Rows of x in a tile, tiling, stages.
MANY_TILINGS = [
    (tile, Tiling(outputs, warps, sharing=1), stages)
    for tile, outputs, warps, stages in (
        (32, 64, 4, 5),
        (32, 128, 4, 4),
        (64, 64, 4, 3),
        (64, 128, 4, 3),
        (64, 128, 8, 3),
        (128, 64, 4, 3),
        (128, 128, 8, 3),
        (128, 128, 8, 4),
        (128, 256, 8, 3),
        (256, 128, 8, 2),
    )
]
SLICES = (4, 8, 16)


@dataclass(frozen=True)
class Candidate:
    """A way to multiply: what is called, and the constants replaced meanwhile."""

    kernel: str
    configuration: str
    call: Callable[[Tensor, Storage, int, int], Tensor]
    constants: tuple[tuple[Any, str, Any], ...] = ()
    is_gradient: bool = False

    def __call__(self, rows: Tensor, storage: Storage, n: int, k: int) -> Tensor:
        patches = [mock.patch.object(*constant) for constant in self.constants]
        for patch in patches:
            patch.start()
        try:
            return self.call(rows, storage, n, k)
        finally:
            for patch in patches:
                patch.stop()


def candidates(m: int) -> Iterator[Candidate]:
    """What is worth trying for m rows."""
    padded = max(8, 2 ** math.ceil(math.log2(m)))
    yield Candidate("dense", "bf16", lambda x, s, n, k: torch.empty(0))
    yield Candidate("dequantize", "then multiply", _dequantize_then_multiply)
    if padded in few.TILINGS:
        for tiling in FEW_TILINGS:
            tilings = (few, "TILINGS", {padded: (tiling,)})
            name = f"{tiling.outputs}, {tiling.warps} warps, {tiling.registers}"
            yield Candidate("few rows", name, _few, (tilings,))
    for tile, tiling, stages in MANY_TILINGS:
        if tile <= max(32, padded) <= 4 * tile:
            constants = (
                (many, "TILINGS", {tile: (tiling,)}),
                (many, "STAGES", {tile: stages}),
                (many, "SLICES", (1,)),
            )
            name = f"{tile}, {tiling.outputs}, {tiling.warps} warps, {stages}"
            yield Candidate("many rows", name, _many, constants)
    yield Candidate("gradient: dequantize", "", _dense_gradient, (), True)
    if m <= gradient.MAX_ROWS:
        for slices in SLICES:
            constants = ((gradient, "SLICES", slices),)
            name = f"{slices} slices"
            yield Candidate("gradient: kernel", name, _gradient, constants, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    folder = parser.parse_args().out
    torch.manual_seed(0)
    compile_ahead()
    record: dict[str, Any] = {**provenance(("torch", "triton")), "rows": []}
    for n, k in SHAPES:
        for m in TOKENS:
            rows = measure_rows(m, n, k)
            record["rows"] += rows
            print_best(rows)
        write_record("kernel_tilings", record, folder)
    record["bandwidth"] = measure_codecs()
    write_record("kernel_tilings", record, folder)


def compile_ahead() -> None:
    """Fill Triton's cache from several processes; failures come again when timed."""
    context = multiprocessing.get_context("spawn")
    jobs = [(m, n, k) for m in TOKENS for n, k in SHAPES]
    with ProcessPoolExecutor(PROCESSES, context) as pool:
        for future in as_completed([pool.submit(run_once, *job) for job in jobs]):
            future.result()


def run_once(m: int, n: int, k: int) -> None:
    """Call every candidate once, so that it is compiled."""
    storage = random_storage(n, k)
    for candidate in candidates(m):
        rows = random_rows(m, n if candidate.is_gradient else k)
        try:
            candidate(rows, storage, n, k)
        except Exception as error:
            print(candidate.kernel, candidate.configuration, repr(error)[:120])


def measure_rows(m: int, n: int, k: int) -> list[dict[str, Any]]:
    """Microseconds of each candidate for m rows, if it is right."""
    storages = [random_storage(n, k) for _ in range(copies_needed(n * k // 2))]
    weight = dequantized(storages[0], n * k, torch.float32).view(n, k)
    dense = [torch.randn(n, k, device=DEVICE).bfloat16() for _ in range(2)]
    measured = []
    for candidate in candidates(m):
        row = {"kernel": candidate.kernel, "configuration": candidate.configuration}
        row |= {"n": n, "k": k, "m": m}
        rows = random_rows(m, n if candidate.is_gradient else k)
        try:
            if candidate.kernel == "dense":
                calls = [functools.partial(_linear, rows, w) for w in dense]
            else:
                expected = rows.float() @ (
                    weight if candidate.is_gradient else weight.T
                )
                found = candidate(rows, storages[0], n, k).float()
                error = float((found - expected).norm() / expected.norm())
                if not error < TOLERANCE:
                    raise ArithmeticError(f"relative error {error}")
                calls = [
                    functools.partial(_outputs, candidate, rows, storage, n, k)
                    for storage in storages
                ]
            row["us"] = round(1e6 * seconds_per_call(capture(calls)), 2)
        except Exception as error:
            row["error"] = repr(error)[:200]
            torch.cuda.synchronize()  # raises if the device is lost, and ends the run
        measured.append(row)
    return measured


def measure_codecs() -> list[dict[str, Any]]:
    """Bandwidth of quantize and dequantize in programs of several sizes."""
    weight = torch.randn(CODEC_SIDE, CODEC_SIDE, device=DEVICE).bfloat16()
    numbers, count = weight.view(-1), weight.numel()
    storage = random_storage(CODEC_SIDE, CODEC_SIDE)
    calls = {
        "quantize": (quantize, lambda: quantize.quantize_blocks(numbers, NF4, 64)),
        "dequantize": (
            dequantize,
            lambda: (dequantize.dequantize_blocks(storage, count, torch.bfloat16),),
        ),
    }
    measured = []
    for name, (module, call) in calls.items():
        for size in (2048, 4096, 8192):
            for warps in (4, 8):
                with (
                    mock.patch.object(module, "NUMBERS_PER_PROGRAM", size),
                    mock.patch.object(module, "WARPS", warps),
                ):
                    seconds = seconds_per_call(capture([call]))
                row = {"operation": name, "numbers_per_program": size, "warps": warps}
                row["tb_s"] = round(2.5 * count / seconds / 1e12, 3)
                measured.append(row)
                print(row, flush=True)
    return measured


def print_best(rows: list[dict[str, Any]]) -> None:
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.get("us", math.inf) < best.get(row["kernel"], {}).get("us", math.inf):
            best[row["kernel"]] = row
    where = "{n}x{k} M={m}".format(**rows[0])
    found = (f"{r['kernel']} {r['us']} {r['configuration']}" for r in best.values())
    print(where, *found, sep=" | ", flush=True)


def random_storage(n: int, k: int) -> Storage:
    weight = torch.randn(n, k, device=DEVICE).bfloat16()
    return storage_of(quantize_tensor(weight, NF4, 64, double_quant=True))


def random_rows(m: int, width: int) -> Tensor:
    return torch.randn(m, width, device=DEVICE).bfloat16()


def _outputs(candidate: Candidate, *arguments: Any) -> tuple[Tensor]:
    return (candidate(*arguments),)


def _linear(rows: Tensor, weight: Tensor) -> tuple[Tensor]:
    return (F.linear(rows, weight),)


def _few(rows: Tensor, storage: Storage, n: int, k: int) -> Tensor:
    return few.matmul_few_rows(rows, storage, n, None)


def _many(rows: Tensor, storage: Storage, n: int, k: int) -> Tensor:
    return many.matmul_many_rows(rows, storage, n, None)


def _gradient(rows: Tensor, storage: Storage, n: int, k: int) -> Tensor:
    return gradient.matmul_gradient(rows, storage, k)


def _dequantize_then_multiply(rows: Tensor, storage: Storage, n: int, k: int) -> Tensor:
    return F.linear(rows, dequantized(storage, n * k, rows.dtype).view(n, k))


def _dense_gradient(rows: Tensor, storage: Storage, n: int, k: int) -> Tensor:
    return rows @ dequantized(storage, n * k, rows.dtype).view(n, k)


if __name__ == "__main__":
    main()
