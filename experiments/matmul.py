"""Time a 4-bit linear layer beside bf16 and the layers of other libraries, in one run.

    python experiments/matmul.py                      # one GPU, up to 8 minutes
    python experiments/matmul.py --quick --out DIR    # less of everything

Over four weights of LLaMA models and 1 to 4096 tokens, forward, and forward with the
gradient to the input. Before a layer is timed, its captured calls are checked against
a float32 product with the weight that the layer itself dequantizes. Then 268 million
weights are quantized and dequantized. Writes matmul.json after each shape; what could
not be measured is listed there under "failed", with the reason.

bitsandbytes, torchao and gemlite are timed if they are installed.
"""

import argparse
import functools
import importlib.metadata
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matmul_report import BOTH, FORWARD, SHAPES, TOKENS, cells, report, targets
from peers import CODECS, COMPILED_BY_TRITON, MAKERS, Layer
from record import RESULTS, provenance, write_record
from timing import (
    REPLAYS,
    REPLAYS_OF_SLOW_CALLS,
    ROTATED_BYTES,
    Captured,
    Outputs,
    capture,
    ceilings,
    copies_needed,
    seconds_as_called,
    seconds_per_call,
)

QUICK_SHAPES = SHAPES[:2]
QUICK_TOKENS = (1, 16, 64, 256, 4096)

CODEC_SIDE = 16384
BYTES_PER_WEIGHT = 2.5  # 2 for bf16 and 0.5 for the code; scales are left out
CODEC_TOLERANCE = 0.2  # NF4 in blocks of 64 leaves about 0.09 of a normal weight

DEVICE = "cuda"
PACKAGES = ("torch", "triton", "bitsandbytes", "torchao", "gemlite")
WEIGHT_STD = 0.02
SEED = 0
COMPILING_PROCESSES = 8
METHOD = {
    "timing": f"median of {REPLAYS} replays of a CUDA graph, by events on the device; "
    f"of {REPLAYS_OF_SLOW_CALLS} replays for calls that take over 1 ms",
    "weights": f"random, in as many copies as exceed {ROTATED_BYTES / 1e6:.0f} MB, "
    "one call for each in a graph",
    "activations": "bf16, random normal",
    FORWARD: "the product alone",
    BOTH: "the product and the gradient to its input; the weight is frozen. gemlite "
    "and tinygemm have no backward pass and are left out",
    "check": "before timing, the replayed outputs, overwritten beforehand, against a "
    "float32 product with the weight that the layer itself dequantizes",
    "gemlite": "configurations that it ships for the H100, of the nearest shape and "
    "size; no search of its own",
    "bandwidth": f"{BYTES_PER_WEIGHT} bytes a weight; dequantize with double "
    "quantization, quantize without; 'quantize' is the public call from Python with "
    "its checks, 'quantize_kernel' the device's part of it in a CUDA graph, which that "
    "of bitsandbytes cannot enter",
}


class Run:
    """The record of a run, and the time it may take."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder = folder
        self.minutes = minutes
        self.start = time.monotonic()
        self.record: dict[str, Any] = {
            **provenance(installed(PACKAGES)),
            "method": METHOD,
            "ceilings": {},
            "bytes_per_weight": {},
            "rows": [],
            "bandwidth": [],
            "targets": [],
            "failed": [],
        }

    def failed(self, error: Exception, **where: Any) -> None:
        message = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        self.record["failed"].append({**where, "error": message})
        print(*where.values(), message, flush=True)

    def write(self) -> None:
        self.record["targets"] = targets(self.record)
        self.record["seconds"] = round(time.monotonic() - self.start)
        write_record("matmul", self.record, self.folder)

    def check_time(self) -> None:
        if time.monotonic() - self.start > 60 * self.minutes:
            raise TimeoutError(f"not measured within --minutes {self.minutes:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="two shapes, five sizes, forward only"
    )
    parser.add_argument("--layers", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--minutes", type=float, default=8, help="start nothing later")
    parser.add_argument("--out", type=Path, help="where to write, if not to results/")
    arguments = parser.parse_args()
    partial = arguments.quick or len(set(arguments.layers)) < len(MAKERS)
    if partial and arguments.out is None:
        parser.error("--quick and --layers need --out: results/ holds whole runs")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device, and there is none")

    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("highest")  # the reference is no TF32 product
    quick = arguments.quick
    shapes, tokens = (QUICK_SHAPES, QUICK_TOKENS) if quick else (SHAPES, TOKENS)
    directions = (FORWARD,) if quick else (FORWARD, BOTH)
    run = Run(arguments.out or RESULTS, arguments.minutes)
    layers = usable(run, arguments.layers)
    compile_ahead(layers, shapes, tokens, directions)
    run.record["ceilings"] = ceilings()
    for library in [name for name in layers if name in CODECS]:
        measure_codec(run, library)
    run.write()
    for n, k in shapes:
        for layer in layers:
            measure_layer(run, layer, n, k, tokens, directions)
        run.write()
        print(f"{n}x{k} done after {run.record['seconds']} s", flush=True)
    print(report(run.record))


def installed(packages: Iterable[str]) -> tuple[str, ...]:
    known = {found.name.lower() for found in importlib.metadata.distributions()}
    return tuple(name for name in packages if name in known)


def usable(run: Run, names: Sequence[str]) -> list[str]:
    """Those layers that can be made from a small weight; the others are reported."""
    found = []
    for name in names:
        try:
            MAKERS[name](random_weight(256, 256))
            found.append(name)
        except Exception as error:  # whatever a peer raises, the others are measured
            run.failed(error, layer=name)
    return found


def compile_ahead(
    names: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    directions: Sequence[str],
) -> None:
    """Fill Triton's cache on disk from several processes, where one would take long.

    What fails here fails again in the run, and is reported there.
    """
    jobs = [
        (name, n, k, tokens[half::2], directions)
        for name in names
        if name in COMPILED_BY_TRITON
        for n, k in shapes
        for half in (0, 1)
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(COMPILING_PROCESSES, context) as pool:
        for future in as_completed([pool.submit(call_once, *job) for job in jobs]):
            if error := future.exception():
                print("compiling ahead:", repr(error)[:200], flush=True)


def call_once(
    name: str, n: int, k: int, tokens: Sequence[int], directions: Sequence[str]
) -> None:
    layer = MAKERS[name](random_weight(n, k))
    for m in tokens:
        x, grad_y = random_activations(m, n, k)
        for direction in directions:
            if direction == FORWARD or layer.differentiable:
                step(layer, direction, x, grad_y)
    torch.cuda.synchronize()


def measure_layer(
    run: Run,
    name: str,
    n: int,
    k: int,
    tokens: Sequence[int],
    directions: Sequence[str],
) -> None:
    """Add the rows of a layer on one shape to the record, or why there are none."""
    torch.cuda.empty_cache()
    try:
        run.check_time()
        first = MAKERS[name](random_weight(n, k))
        more = range(copies_needed(first.nbytes) - 1)
        layers = [first, *(MAKERS[name](random_weight(n, k)) for _ in more)]
        dense = first.dense()
        run.record["bytes_per_weight"][name] = round(first.nbytes / (n * k), 4)
    except Exception as error:
        run.failed(error, layer=name, n=n, k=k)
        return
    for cell in cells([name], [(n, k)], tokens, directions):
        if cell["direction"] == BOTH and first.differentiable is None:
            continue
        try:
            run.check_time()
            measured = measure(layers, dense, cell["m"], cell["direction"])
            run.record["rows"].append({**cell, **measured})
        except Exception as error:
            run.failed(error, **cell)
            torch.cuda.synchronize()  # raises if the device is lost, and ends the run


def measure(
    layers: Sequence[Layer], dense: Tensor, m: int, direction: str
) -> dict[str, float]:
    """Microseconds of a call, and the error of what the timed graph computes."""
    x, grad_y = random_activations(m, *dense.shape)
    calls = [functools.partial(step, layer, direction, x, grad_y) for layer in layers]
    captured = capture(calls)
    captured.poison()
    captured.graph.replay()
    expected = reference(dense, direction, x, grad_y)
    error = largest_error(captured.outputs[0], expected, layers[0].tolerance)
    check_finite(captured)
    return {
        "us": round(1e6 * seconds_per_call(captured), 3),
        "relative_error": float(f"{error:.2g}"),
    }


def step(layer: Layer, direction: str, x: Tensor, grad_y: Tensor) -> Outputs:
    """The work that is timed: the product, and with BOTH the gradient to its input."""
    if direction == FORWARD:
        return (layer.forward(x),)
    assert layer.differentiable is not None
    x = x.detach().requires_grad_()
    y = layer.differentiable(x)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    return y.detach(), grad_x


def reference(dense: Tensor, direction: str, x: Tensor, grad_y: Tensor) -> Outputs:
    """What ``step`` should return, in float32."""
    y = x.float() @ dense.T
    return (y,) if direction == FORWARD else (y, grad_y.float() @ dense)


def largest_error(outputs: Outputs, expected: Outputs, tolerance: float) -> float:
    """The largest relative error of an output in the Frobenius norm.

    Raises:
        ArithmeticError: If it is above the tolerance, or NaN.
    """
    errors = [
        float((output.float() - wanted).norm() / wanted.norm())
        for output, wanted in zip(outputs, expected, strict=True)
    ]
    if not all(error <= tolerance for error in errors):  # also false for NaN
        raise ArithmeticError(f"relative errors {errors} are above {tolerance}")
    return max(errors)


def check_finite(captured: Captured) -> None:
    for outputs in captured.outputs:
        if not all(bool(torch.isfinite(output).all()) for output in outputs):
            raise ArithmeticError("an output was left unwritten, or is not finite")


def measure_codec(run: Run, library: str) -> None:
    """Add the bandwidth of dequantize and quantize to the record."""
    torch.cuda.empty_cache()
    weight = random_weight(CODEC_SIDE, CODEC_SIDE)

    def add(operation: str, work: Callable[[], float]) -> None:
        try:
            seconds = work()
        except Exception as error:
            run.failed(error, layer=library, operation=operation)
            torch.cuda.synchronize()
            return
        run.record["bandwidth"].append(
            {
                "library": library,
                "operation": operation,
                "us": round(1e6 * seconds, 2),
                "tb_s": round(BYTES_PER_WEIGHT * weight.numel() / seconds / 1e12, 3),
            }
        )

    try:
        codec = CODECS[library]()
        flat, double = codec.quantize(weight), codec.double_quantize(weight)
        wanted = (weight.float(),)
        largest_error((codec.dequantize(flat),), wanted, CODEC_TOLERANCE)
    except Exception as error:
        run.failed(error, layer=library, operation="quantize and dequantize")
        return

    def dequantize_seconds() -> float:
        captured = capture([lambda: (codec.dequantize(double),)])
        captured.poison()
        captured.graph.replay()
        largest_error(captured.outputs[0], wanted, CODEC_TOLERANCE)
        return seconds_per_call(captured)

    def kernel_seconds() -> float:
        captured = capture([functools.partial(codec.kernel, weight)])
        captured.poison()
        captured.graph.replay()
        packed, scales = captured.outputs[0]
        if not torch.equal(packed.view(-1), codec.packed(flat).view(-1)):
            raise ArithmeticError("the kernel's codes differ from those of quantize")
        if not bool(torch.isfinite(scales).all()):
            raise ArithmeticError("a scale was left unwritten")
        return seconds_per_call(captured)

    add("dequantize", dequantize_seconds)
    add("quantize", lambda: seconds_as_called(lambda: codec.quantize(weight)))
    if codec.kernel is not None:
        add("quantize_kernel", kernel_seconds)


def random_weight(n: int, k: int) -> Tensor:
    return WEIGHT_STD * torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16)


def random_activations(m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Input ``[m, k]`` and gradient of the output ``[m, n]``."""
    x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    return x, torch.randn(m, n, device=DEVICE, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
