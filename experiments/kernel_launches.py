"""How the library launches its kernels: what compile_kernels.py compiles.

The launches of the matmuls are recorded from the launchers themselves, so that what is
compiled is what runs.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from qlora_lib.kernels import (
    adamw,
    adding,
    arranging,
    dequantize,
    matmul_few_rows,
    matmul_gradient,
    matmul_many_rows,
    quantize,
    tiles,
)
from qlora_lib.kernels.matmul_few_rows import ARRANGED_ROWS
from qlora_lib.kernels.parameter_table import PROGRAM, ParameterTable
from qlora_lib.kernels.storage import Storage
from qlora_lib.kernels.tiles import Tiling

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
# Of the weights that the compiled matmuls multiply, unless an entry says otherwise.
ROWS_OF_W = 4096


@dataclass(frozen=True)
class Entry:
    """One kernel as it is launched.

    Attributes:
        name: What it is called in the table.
        kernel: The ``@triton.jit`` function.
        signature: The Triton type of each run-time argument. Pointers count as aligned
            to 16 bytes and integers as divisible by 16, as they are in a model.
        constants: The value of each ``constexpr`` argument. ``SHARED`` follows the
            target.
        weights: How many weights the counted instructions treat: those of one program,
            or with ``in_loop`` those of one turn of its longest loop.
        options: Launch options, such as ``num_warps``.
        in_loop: Whether to count the longest loop alone.
        not_divisible: Pointers that are not aligned, and integers that are not
            divisible by 16, after all.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    weights: int
    options: Mapping[str, Any]
    in_loop: bool = False
    not_divisible: frozenset[str] = frozenset()


def quantize_entry(dtype: str, block_size: int, buckets: int) -> Entry:
    return Entry(
        f"quantize {dtype}, block {block_size}, {buckets} buckets",
        quantize.quantize_kernel,
        {
            "numbers": f"*{dtype}",
            "words": "*i32",
            "scales": "*fp32",
            "tables": "*i32",
            "count": "i32",
            "word_count": "i32",
        },
        {
            "BLOCK_SIZE": block_size,
            "BLOCKS": quantize.NUMBERS_PER_PROGRAM // block_size,
            "RUN": quantize.run_length(block_size),
            "BUCKETS": buckets,
        },
        quantize.NUMBERS_PER_PROGRAM,
        {"num_warps": quantize.WARPS, "enable_fp_fusion": False},
    )


def dequantize_entry(dtype: str, block_size: int, nested: bool) -> Entry:
    signature = {
        "packed": "*u8",
        "scales": "*u8" if nested else "*fp32",
        "values": "*fp32",
        "numbers": f"*{dtype}",
        "count": "i32",
        "byte_count": "i32",
    }
    only_nested = ("nested_scales", "offset", "scale_values")
    signature |= dict.fromkeys(only_nested, "*fp32") if nested else {}
    return Entry(
        f"dequantize {dtype}, block {block_size}, {'nested' if nested else 'flat'}",
        dequantize.dequantize_kernel,
        signature,
        {
            "BLOCK_SIZE": block_size,
            "RUNS": dequantize.NUMBERS_PER_PROGRAM // int(dequantize.RUN),
            "NESTED": nested,
            **({} if nested else dict.fromkeys(only_nested)),
        },
        dequantize.NUMBERS_PER_PROGRAM,
        {"num_warps": dequantize.WARPS, "enable_fp_fusion": False},
    )


class Launches:
    """Stands in for a kernel, and keeps the arguments of its last launch."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._keep

    def _keep(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options

    def entry(self, name: str, kernel: Any, weights: int, in_loop: bool) -> Entry:
        """How Triton would compile the kernel for these arguments, alignment too."""
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        not_divisible = set()
        for parameter, value in zip(kernel.params, self.arguments, strict=False):
            argument, general = parameter.name, parameter.do_not_specialize
            if isinstance(value, torch.Tensor):
                signature[argument] = f"*{TYPES[value.dtype]}"
                if value.data_ptr() % 16 or general:
                    not_divisible.add(argument)
            elif value is None or (value == 1 and not general):
                constants[argument] = value
            else:
                signature[argument] = "i32"
                if value % 16 or general:
                    not_divisible.add(argument)
        options = dict(self.options)
        for argument in kernel.arg_names[len(self.arguments) :]:
            constants[argument] = options.pop(argument)
        return Entry(
            name,
            kernel,
            signature,
            constants,
            weights,
            options,
            in_loop,
            frozenset(not_divisible),
        )


def storage(block_size: int, nested: bool) -> Storage:
    """Of the types that a launch looks at; its numbers are never read."""
    number = torch.empty(1)
    parts = (number, number, number) if nested else (None, None, None)
    nested_scales, offset, scale_values = parts
    scales = number.to(torch.uint8) if nested else number
    packed = torch.empty(16, dtype=torch.uint8)
    return Storage(
        packed, scales, nested_scales, offset, number, scale_values, block_size
    )


@contextmanager
def recording(module: ModuleType, name: str) -> Iterator[Launches]:
    """Launch nothing, and keep how the kernel of that name would be launched."""
    with (
        patch.object(arranging, "arrange_kernel", Launches()),
        patch.object(adding, "add_kernel", Launches()),
        patch.object(module, name, Launches()) as launch,
    ):
        yield launch


def launch_entry(
    module: ModuleType,
    name: str,
    m: int,
    k: int,
    tiling: Tiling | None = None,
    block_size: int = 64,
    nested: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    n: int = ROWS_OF_W,
) -> Entry:
    """The launch of a matmul's kernel by a weight of n rows."""
    rows = torch.empty(m, k, dtype=dtype)
    weight = storage(block_size, nested)
    with ExitStack() as stack:
        launch = stack.enter_context(recording(module, name))
        if tiling is not None:
            only = dict.fromkeys(module.TILINGS, (tiling,))
            stack.enter_context(patch.object(module, "TILINGS", only))
        if module is matmul_gradient:
            module.matmul_gradient(torch.empty(m, n, dtype=dtype), weight, k)
        else:
            multiply = getattr(module, module.__name__.rpartition(".")[2])
            multiply(rows, weight, n, torch.empty(n, dtype=dtype) if bias else None)
    layout = f"{TYPES[dtype]}, block {block_size}, {'nested' if nested else 'flat'}"
    if tiling is not None:
        layout += f", {tiling.outputs} outputs, {tiling.warps} warps"
    if n != ROWS_OF_W:
        layout += f", n {n}"
    kind, padded = name.removesuffix("_kernel"), launch.options["ROWS"]
    text = f"{kind}, {padded} rows, k {k}, {layout}" + ", bias" * bias
    weights = weights_of_a_turn(launch.options)
    return launch.entry(text, getattr(module, name), weights, in_loop=True)


def weights_of_a_turn(options: Mapping[str, Any]) -> int:
    """What a program multiplies in one turn of its loop."""
    chunk = int(tiles.CHUNK)
    if "SPAN" in options:  # each warp has its own columns
        return options["WARPS"] * options["OUTPUTS"] * options["SPAN"] * chunk
    return options.get("OUTPUTS", int(matmul_gradient.STEP)) * chunk


def tuned_entries() -> Iterator[Entry]:
    """The matmuls in every tuned tiling, for bfloat16 in nested blocks of 64."""
    for rows, tilings in matmul_few_rows.TILINGS.items():
        for tiling in tilings:
            yield few_rows_entry(rows - 1, 8192, tiling)
    for rows, tilings in matmul_many_rows.TILINGS.items():
        for tiling in tilings:
            yield many_rows_entry(rows - 1, 8192, tiling)
    yield gradient_entry(63, 8192)


def few_rows_entry(m: int, k: int, tiling: Tiling, **rest: Any) -> Entry:
    return launch_entry(matmul_few_rows, "few_rows_kernel", m, k, tiling, **rest)


def many_rows_entry(m: int, k: int, tiling: Tiling, **rest: Any) -> Entry:
    return launch_entry(matmul_many_rows, "many_rows_kernel", m, k, tiling, **rest)


def gradient_entry(m: int, k: int, **rest: Any) -> Entry:
    return launch_entry(matmul_gradient, "gradient_kernel", m, k, **rest)


def arrange_entry(tile: int, for_a_warp: bool) -> Entry:
    with recording(arranging, "arrange_kernel") as launch:
        arranging.arrange(torch.empty(tile - 1, 8192).bfloat16(), tile, for_a_warp)
    name = f"arrange, {tile} rows for {'a warp' if for_a_warp else 'all warps'}"
    numbers = tile * int(arranging.CHUNK)
    return launch.entry(name, arranging.arrange_kernel, numbers, in_loop=False)


def add_entry(slices: int) -> Entry:
    with recording(adding, "add_kernel") as launch:
        sums, bias = torch.empty(slices, 64, 4096), torch.empty(4096).bfloat16()
        adding.add_slices(sums, bias, bias.dtype)
    name = f"add, {slices} slices"
    return launch.entry(name, adding.add_kernel, adding.NUMBERS_PER_PROGRAM, False)


def adamw_entry(dtype: torch.dtype, state_bits: int, aligned: bool = True) -> Entry:
    number = torch.empty(1)
    table = ParameterTable(
        number.int(),
        first_program=number.long(),
        counts=number.long(),
        addresses=number.long(),
        factors=number.double(),
    )
    pages = number.int(), number.long()
    with recording(adamw, "adamw_kernel") as launch:
        adamw.update_pages(*pages, table, dtype, PROGRAM, state_bits, aligned=aligned)
    name = f"adamw {TYPES[dtype]}, {state_bits}-bit state" + ", unaligned" * (
        not aligned
    )
    return launch.entry(name, adamw.adamw_kernel, PROGRAM, in_loop=False)


FEW = matmul_few_rows.TILINGS
MANY = matmul_many_rows.TILINGS
TUNED = list(tuned_entries())
ARRANGE = [
    *(arrange_entry(rows, True) for rows in FEW if rows >= ARRANGED_ROWS),
    *(arrange_entry(rows, False) for rows in MANY),
]

# What every target compiles, and what sm_90 compiles besides.
ENTRIES = [
    quantize_entry("bf16", 64, 32),
    dequantize_entry("bf16", 64, nested=True),
    few_rows_entry(7, 8192, FEW[8][0]),
    many_rows_entry(63, 8192, MANY[64][0]),
    many_rows_entry(127, 8192, MANY[128][0]),
    gradient_entry(63, 8192),
    ARRANGE[0],
    ARRANGE[-1],
    add_entry(2),
    adamw_entry(torch.float32, 32),
    adamw_entry(torch.bfloat16, 8),
]
MORE_ENTRIES = [
    quantize_entry("fp16", 64, 32),
    quantize_entry("fp32", 64, 32),
    quantize_entry("bf16", 32, 32),
    quantize_entry("bf16", 256, 128),
    quantize_entry("bf16", 64, 0),
    dequantize_entry("bf16", 64, nested=False),
    dequantize_entry("fp16", 64, nested=True),
    dequantize_entry("fp32", 64, nested=True),
    dequantize_entry("bf16", 32, nested=True),
    dequantize_entry("bf16", 256, nested=True),
    *TUNED,
    *ARRANGE,
    *(few_rows_entry(7, 11008, tiling) for tiling in FEW[8]),  # a remainder
    few_rows_entry(1, 8192, FEW[8][0]),
    few_rows_entry(15, 11008, FEW[16][0]),
    few_rows_entry(31, 11008, FEW[32][0]),
    *(few_rows_entry(7, 8192, tiling, nested=False) for tiling in FEW[8]),
    few_rows_entry(7, 8192, FEW[8][0], block_size=32),
    few_rows_entry(7, 8192, FEW[8][0], block_size=256),
    few_rows_entry(7, 8192, FEW[8][0], dtype=torch.float16, bias=True),
    few_rows_entry(31, 8192, FEW[32][0], dtype=torch.float16, nested=False),
    many_rows_entry(63, 8192, MANY[64][0], nested=False),
    many_rows_entry(127, 8192, MANY[128][0], dtype=torch.float16, bias=True),
    many_rows_entry(127, 8192, MANY[128][0], block_size=256, nested=False),
    add_entry(4),
    add_entry(matmul_gradient.SLICES),
    gradient_entry(15, 8192),
    gradient_entry(31, 8192),
    gradient_entry(15, 8192, nested=False),
    gradient_entry(31, 8192, nested=False),
    gradient_entry(63, 8192, nested=False),
    gradient_entry(63, 8192, dtype=torch.float16, block_size=32),
    # The fewest steps of a loop, where the compiler might do without one.
    *(gradient_entry(m, 8192, n=512) for m in (15, 31, 63)),
    *(gradient_entry(m, 8192, n=64, nested=False) for m in (15, 31, 63)),
    *(adamw_entry(dtype, 32) for dtype in (torch.bfloat16, torch.float16)),
    *(adamw_entry(dtype, 8) for dtype in (torch.float32, torch.float16)),
    *(
        adamw_entry(dtype, state_bits, aligned=False)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for state_bits in (32, 8)
    ),
    many_rows_entry(63, 128, MANY[32][0]),
    many_rows_entry(63, 256, MANY[64][1]),
]
