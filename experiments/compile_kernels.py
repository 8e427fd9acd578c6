"""Compile every kernel ahead of time for many GPUs, and count what the code costs.

    python experiments/compile_kernels.py [--json PATH]   # no GPU needed, minutes

For each kernel in its tuned configuration: registers and spilled bytes a thread on each
target, and the shared memory of a program, dynamic (what Triton asks for) and static
(the tables of lookup.py); for sm_90 (H100, H200) the machine instructions a weight
takes, by the pipe that executes them. The integer pipe has half the rate of the others.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from qlora_lib.kernels import (
    dequantize,
    matmul_few_rows,
    matmul_gradient,
    matmul_many_rows,
    quantize,
)
from qlora_lib.kernels.storage import Storage
from qlora_lib.kernels.tiles import Tiling
from record import provenance

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
COUNTED = "sm_90"
# Where the compiler counts a KiB of shared memory that the system has for itself, and
# that no limit of a program contains.
RESERVING = ("sm_90", "sm_100")
RESERVED_SHARED_BYTES = 1024

# The pipe of each instruction; what is in none of them is control and uniform.
PIPES = {
    "integer": "LOP3 PRMT SHF IADD3 VIADD ISETP SEL LEA FSETP FMNMX FSEL FSET FCHK "
    "F2FP VIMNMX VIMNMX3 IMNMX IABS PLOP3 SGXT BMSK HSETP2 HMNMX2 POPC FLO P2R R2P",
    "fp": "FFMA FMUL FADD IMAD HFMA2 HMUL2 HADD2 MOV CS2R MUFU F2F F2I I2F I2FP",
    "load/store": "LDG LDS LDSM STS STG STSM LDGSTS SHFL LDC LDL STL ATOMG ATOM RED",
    "tensor core": "HMMA HGMMA IMMA IGMMA QGMMA",
}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.uint8: "u8",
}
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}


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
        not_divisible: Integers that are not divisible by 16 after all.
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
        """How Triton would compile the kernel for these arguments."""
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        not_divisible = set()
        for argument, value in zip(kernel.arg_names, self.arguments, strict=False):
            if isinstance(value, torch.Tensor):
                signature[argument] = f"*{TYPES[value.dtype]}"
            elif value is None or value == 1:
                constants[argument] = value
            else:
                signature[argument] = "i32"
                if value % 16:
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


def launch_entries(
    module: ModuleType,
    m: int,
    k: int,
    tiling: Tiling | None = None,
    block_size: int = 64,
    nested: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    n: int = ROWS_OF_W,
) -> dict[str, Entry]:
    """The launches of one matmul by a weight of n rows, by the kernel's name."""
    rows = torch.empty(m, k, dtype=dtype)
    weight = storage(block_size, nested)
    names = [name for name in vars(module) if name.endswith("_kernel")]
    launches = {name: Launches() for name in names}
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(module, name, launches[name]))
        if tiling is not None:
            only = dict.fromkeys(module.TILINGS, (tiling, None))
            stack.enter_context(patch.object(module, "TILINGS", only))
        if module is matmul_gradient:
            module.matmul_gradient(torch.empty(m, n, dtype=dtype), weight, k)
        else:
            multiply = getattr(module, module.__name__.rpartition(".")[2])
            multiply(rows, weight, n, torch.empty(n, dtype=dtype) if bias else None)
    kind = module.__name__.rpartition(".")[2].removeprefix("matmul_")
    layout = f"{TYPES[dtype]}, block {block_size}, {'nested' if nested else 'flat'}"
    if tiling is not None:
        layout += f", {tiling.outputs} outputs, {tiling.warps} warps"
    if n != ROWS_OF_W:
        layout += f", n {n}"
    entries = {}
    for name, launch in launches.items():
        if not hasattr(launch, "arguments"):
            continue
        padded = launch.options["ROWS"]
        if name == "arrange_kernel":
            numbers = padded * int(module.CHUNK)
            text = f"arrange {kind}, {padded} rows"
            entry = launch.entry(text, getattr(module, name), numbers, False)
        else:
            text = f"{kind}, {padded} rows, k {k}, {layout}" + ", bias" * bias
            weights = weights_of_a_turn(launch.options)
            entry = launch.entry(text, getattr(module, name), weights, True)
        entries[name] = entry
    return entries


def weights_of_a_turn(options: Mapping[str, Any]) -> int:
    """What a program multiplies in one turn of its loop."""
    chunk = int(matmul_few_rows.CHUNK)
    if "SPAN" in options:  # each warp has its own columns
        return options["WARPS"] * options["OUTPUTS"] * options["SPAN"] * chunk
    return options.get("OUTPUTS", int(matmul_gradient.STEP)) * chunk


def tuned_entries() -> Iterator[Entry]:
    """The matmuls in every tuned tiling, for bfloat16 in nested blocks of 64."""
    for rows, tilings in matmul_few_rows.TILINGS.items():
        for tiling in filter(None, tilings):
            yield few_rows_entry(rows - 1, 8192, tiling)
    for rows, tilings in matmul_many_rows.TILINGS.items():
        for tiling in filter(None, tilings):
            yield many_rows_entry(rows - 1, 8192, tiling)
    yield gradient_entry(63, 8192)


def few_rows_entry(m: int, k: int, tiling: Tiling, **rest: Any) -> Entry:
    return launch_entries(matmul_few_rows, m, k, tiling, **rest)["few_rows_kernel"]


def many_rows_entry(m: int, k: int, tiling: Tiling, **rest: Any) -> Entry:
    return launch_entries(matmul_many_rows, m, k, tiling, **rest)["many_rows_kernel"]


def gradient_entry(m: int, k: int, **rest: Any) -> Entry:
    return launch_entries(matmul_gradient, m, k, **rest)["gradient_kernel"]


def arrange_entries() -> Iterator[Entry]:
    for module in (matmul_few_rows, matmul_many_rows):
        for rows in module.TILINGS:
            entries = launch_entries(module, rows - 1, 8192)
            if "arrange_kernel" in entries:
                yield entries["arrange_kernel"]


FEW = matmul_few_rows.TILINGS
MANY = matmul_many_rows.TILINGS
TUNED = list(tuned_entries())
ARRANGE = list(arrange_entries())

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
    gradient_entry(15, 8192),
    gradient_entry(31, 8192),
    gradient_entry(15, 8192, nested=False),
    gradient_entry(31, 8192, nested=False),
    gradient_entry(63, 8192, nested=False),
    gradient_entry(63, 8192, dtype=torch.float16, block_size=32),
    # The fewest steps of a loop, where the compiler might do without one.
    *(gradient_entry(m, 8192, n=512) for m in (15, 31, 63)),
    *(gradient_entry(m, 8192, n=64, nested=False) for m in (15, 31, 63)),
    many_rows_entry(63, 128, MANY[32][0]),
    many_rows_entry(63, 256, MANY[64][1]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels ahead of time.")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    path = parser.parse_args().json
    rows = []
    for entry, target in pairs():
        rows.append(measure(entry, target))
        print(line(rows[-1]), flush=True)
    if path is not None:
        record = {**provenance(("triton",)), "rows": rows}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def pairs() -> Iterator[tuple[Entry, str]]:
    for entry in ENTRIES:
        for target in TARGETS:
            yield entry, target
    everywhere = {entry.name for entry in ENTRIES}
    for entry in MORE_ENTRIES:
        if entry.name not in everywhere:
            yield entry, COUNTED


def measure(entry: Entry, target: str) -> dict[str, Any]:
    """Compile and return one row of the table."""
    compiled = compile_ahead(entry, target)
    row: dict[str, Any] = {"kernel": entry.name, "target": target}
    if TARGETS[target].backend == "hip":
        row |= amd_resources(compiled.asm["amdgcn"])
    else:
        row |= cuda_resources(compiled.asm["cubin"])
        if row["static_shared_bytes"] and target in RESERVING:
            row["static_shared_bytes"] -= RESERVED_SHARED_BYTES
    row["dynamic_shared_bytes"] = compiled.metadata.shared
    if target == COUNTED:
        listing = disassemble(compiled.asm["cubin"])
        names = hot_instructions(listing, entry.in_loop)
        threads = entry.options["num_warps"] * 32
        counts = Counter(PIPE_OF.get(name, "other") for name in names)
        row["instructions_per_weight"] = {
            pipe: round(counts[pipe] * threads / entry.weights, 2)
            for pipe in [*PIPES, "other"]
        }
    return row


def compile_ahead(entry: Entry, target: str) -> CompiledKernel:
    names = entry.kernel.arg_names
    constants = dict(entry.constants)
    if "SHARED" in names:
        constants["SHARED"] = TARGETS[target].backend == "cuda"
    source = ASTSource(
        fn=entry.kernel,
        signature={name: entry.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in entry.signature.items()
            if (kind.startswith("*") or kind in ("i32", "i64"))
            and name not in entry.not_divisible
        },
    )
    return triton.compile(source, TARGETS[target], options=dict(entry.options))


def cuda_resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes that did not fit and went to local memory."""
    usage = run_cuobjdump("-res-usage", cubin)
    found = {
        name: int(re.search(rf"\b{name}:(\d+)", usage)[1])
        for name in ("REG", "STACK", "LOCAL", "SHARED")
    }
    return {
        "registers": found["REG"],
        "spilled_bytes": found["STACK"] + found["LOCAL"],
        "static_shared_bytes": found["SHARED"],
    }


def amd_resources(assembly: str) -> dict[str, int]:
    """The same for an AMD GPU, with the vector registers."""

    def value(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])

    return {
        "registers": value("vgpr_count"),
        "spilled_bytes": value("private_segment_fixed_size")
        + 4 * (value("vgpr_spill_count") + value("sgpr_spill_count")),
        "static_shared_bytes": 0,  # Triton asks for all of it
    }


@dataclass(frozen=True)
class Instruction:
    address: int
    predicated: bool
    name: str
    operands: str


def disassemble(cubin: bytes) -> list[Instruction]:
    pattern = re.compile(
        r"^\s*/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([A-Z0-9_]+)([^;]*);", re.MULTILINE
    )
    return [
        Instruction(int(match[1], 16), match[2] is not None, match[3], match[4])
        for match in pattern.finditer(run_cuobjdump("-sass", cubin))
    ]


def run_cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return answer.stdout + answer.stderr


def hot_instructions(listing: list[Instruction], in_loop: bool) -> list[str]:
    """Names of the instructions that every program executes, or its longest loop.

    What follows the last exit are subroutines for rare operands, such as a division
    with a subnormal result.
    """
    exits = [
        each.address for each in listing if each.name == "EXIT" and not each.predicated
    ]
    first, last = 0, max(exits)
    if in_loop:
        loops = [
            (int(target[1], 16), each.address)
            for each in listing
            if each.name == "BRA"
            and (target := re.search(r"0x([0-9a-f]+)", each.operands))
            and int(target[1], 16) < each.address
        ]
        # A loop of one turn is none in the compiled code.
        first, last = max(
            loops, key=lambda loop: loop[1] - loop[0], default=(first, last)
        )
    return [
        each.name
        for each in listing
        if first <= each.address <= last and each.name != "NOP"
    ]


def line(row: dict[str, Any]) -> str:
    text = (
        f"{row['kernel']:74} {row['target']:7} {row['registers']:4} registers "
        f"{row['spilled_bytes']:3} B spilled {row['dynamic_shared_bytes']:6} + "
        f"{row['static_shared_bytes']:5} B shared"
    )
    counts = row.get("instructions_per_weight")
    if counts is not None:
        parts = ", ".join(f"{pipe} {count:.2f}" for pipe, count in counts.items())
        text += f" | {sum(counts.values()):5.2f} a weight: {parts}"
    return text


if __name__ == "__main__":
    main()
