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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from kernel_launches import ENTRIES, MORE_ENTRIES, Entry
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
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}


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
