"""Time and memory of the reference on the CPU, beside bitsandbytes in the same run.

    python experiments/quantize_cpu.py    # two CPU cores, about a minute, Linux

A 4096 x 4096 float32 tensor is quantized to NF4 and dequantized by both in turn, with
and without double quantization. The peak of memory is what a fresh process needs beyond
the tensor itself. Writes experiments/results/quantize_cpu.json.
"""

import argparse
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from qlora_lib import NF4, quantize
from record import provenance, write_record

SHAPE = (4096, 4096)
THREADS = 2
SEED = 0
LAYOUTS = {"flat": False, "double": True}
# How each library quantizes, and dequantizes what it returned.
LIBRARIES: dict[str, tuple[Callable, Callable]] = {
    "qlora_lib": (
        lambda x, double: quantize(x, NF4, 64, double),
        lambda q: q.dequantize(),
    ),
    "bitsandbytes": (
        lambda x, double: bnb.quantize_4bit(
            x, quant_type="nf4", compress_statistics=double
        ),
        lambda q: bnb.dequantize_4bit(*q),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark the reference on the CPU.")
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(THREADS)
    load_before = os.getloadavg()[0]
    record = {
        **provenance(("torch", "bitsandbytes")),
        "shape": SHAPE,
        "dtype": "float32",
        "repeats": repeats,
        "seconds": {name: measure_time(name, repeats) for name in LAYOUTS},
        "peak_extra_memory_in_tensors": measure_memory(),
        "import_seconds_over_torch": measure_import(repeats),
        # The machine runs other work too: the mean number of runnable processes.
        "load_average": {"before": load_before, "after": os.getloadavg()[0]},
    }
    write_record("quantize_cpu", record)
    for layout, seconds in record["seconds"].items():
        for library, steps in seconds.items():
            print(layout, library, steps)
    print(record["peak_extra_memory_in_tensors"], record["import_seconds_over_torch"])


def make_tensor() -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(SHAPE, generator=generator)


def measure_time(layout: str, repeats: int) -> dict[str, Any]:
    """Seconds of each step and of their sum, for both libraries in alternation."""
    x = make_tensor()
    runs: dict[str, list[dict[str, float]]] = {library: [] for library in LIBRARIES}
    for repeat in range(repeats + 1):
        for library, (quantize_it, dequantize_it) in LIBRARIES.items():
            start = time.perf_counter()
            q = quantize_it(x, LAYOUTS[layout])
            middle = time.perf_counter()
            dequantize_it(q)
            end = time.perf_counter()
            seconds = {
                "quantize": middle - start,
                "dequantize": end - middle,
                "sum": end - start,
            }
            if repeat > 0:  # the first run also loads code
                runs[library].append(seconds)
    return {
        library: {
            step: summary([seconds[step] for seconds in of_library])
            for step in ("quantize", "dequantize", "sum")
        }
        for library, of_library in runs.items()
    }


def summary(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4)}


def measure_memory() -> dict[str, dict[str, dict[str, float]]]:
    """Peak memory of each step beyond the tensor, each measured in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        return {
            layout: {
                library: pool.submit(peak_memory, library, layout).result()
                for library in LIBRARIES
            }
            for layout in LAYOUTS
        }


def peak_memory(library: str, layout: str) -> dict[str, float]:
    """Peak of this process during each step, less what it held before the first.

    In units of the tensor; what the steps return counts as well.
    """
    torch.set_num_threads(THREADS)
    quantize_it, dequantize_it = LIBRARIES[library]
    dequantize_it(quantize_it(torch.randn(64, 64), LAYOUTS[layout]))  # loads code
    x = make_tensor()
    before = resident_bytes("VmRSS")
    reset_peak()
    q = quantize_it(x, LAYOUTS[layout])
    after_quantize = resident_bytes("VmHWM")
    reset_peak()
    dequantize_it(q)
    after_dequantize = resident_bytes("VmHWM")
    return {
        "quantize": round((after_quantize - before) / x.nbytes, 2),
        "dequantize": round((after_dequantize - before) / x.nbytes, 2),
    }


def resident_bytes(field: str) -> int:
    """VmRSS: resident memory of this process; VmHWM: its peak since the last reset."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found, "Linux counts the memory of a process in /proc/self/status"
    return 1024 * int(found[1])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure_import(repeats: int) -> dict[str, float]:
    """Seconds that `import qlora_lib` takes over `import torch`, in new processes."""
    code = (
        "import time, torch; start = time.perf_counter(); import qlora_lib; "
        "print(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", code]
    outputs = [subprocess.check_output(command, text=True) for _ in range(repeats)]
    return summary([float(output) for output in outputs])


if __name__ == "__main__":
    main()
