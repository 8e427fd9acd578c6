"""The cells of matmul.json, the targets that they are held to, and their table."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

SHAPES = ((28672, 8192), (4096, 4096), (11008, 4096), (4096, 11008))
TOKENS = tuple(2**exponent for exponent in range(13))
FORWARD, BOTH = "forward", "forward+backward"
OURS = "qlora_lib"

LARGEST_US = {
    (28672, 8192, 1): 40,
    (4096, 4096, 1): 5,
    (28672, 8192, 16): 60,
    (4096, 4096, 16): 8,
    (28672, 8192, 64): 100,
    (28672, 8192, 256): 182,
}
# Beside which layer, at which M, in which direction, and how much of its time at most.
LARGEST_RATIOS = (
    ("bf16", TOKENS[-1:], FORWARD, 1.05),
    ("bitsandbytes", TOKENS, FORWARD, 1.02),
    ("bf16", TOKENS, FORWARD, 1.05),
    ("bitsandbytes", TOKENS, BOTH, 1.02),
    ("bf16", TOKENS, BOTH, 1.05),
)
SMALLEST_TB_S = {"dequantize": 3.9, "quantize": 3.0, "quantize_kernel": 3.0}

Key = tuple[str, int, int, int, str]


def cells(
    layers: Iterable[str],
    shapes: Iterable[tuple[int, int]],
    tokens: Iterable[int],
    directions: Iterable[str],
) -> list[dict[str, Any]]:
    """Every combination, as rows without their numbers."""
    return [
        {"layer": layer, "n": n, "k": k, "m": m, "direction": direction}
        for layer, (n, k), direction, m in itertools.product(
            layers, shapes, directions, tokens
        )
    ]


def targets(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What was asked of this library, what was measured, and whether that is met.

    ``met`` is None where a measurement is missing and none falls short; ``missing``
    and ``short`` name those cells. ``measured`` is the worst cell's.
    """
    times = {key_of(row): row["us"] for row in record["rows"]}
    return [
        *(time_target(times, *at, largest) for at, largest in LARGEST_US.items()),
        *(ratio_target(times, *ratio) for ratio in LARGEST_RATIOS),
        *(
            bandwidth_target(record["bandwidth"], operation, smallest)
            for operation, smallest in SMALLEST_TB_S.items()
        ),
    ]


def time_target(
    times: dict[Key, float], n: int, k: int, m: int, largest: float
) -> dict[str, Any]:
    us = times.get((OURS, n, k, m, FORWARD))
    return {
        "target": f"M={m}, {n}x{k}",
        "asked": f"<= {largest} us",
        "measured": us,
        "met": None if us is None else us <= largest,
        "missing": [f"{n}x{k} M={m}"] if us is None else [],
        "short": [],
    }


def ratio_target(
    times: dict[Key, float],
    peer: str,
    tokens: Sequence[int],
    direction: str,
    largest: float,
) -> dict[str, Any]:
    ratios, missing = {}, []
    for (n, k), m in itertools.product(SHAPES, tokens):
        ours = times.get((OURS, n, k, m, direction))
        theirs = times.get((peer, n, k, m, direction))
        if ours is None or theirs is None:
            missing.append(f"{n}x{k} M={m}")
        else:
            ratios[f"{n}x{k} M={m}"] = round(ours / theirs, 3)
    short = {cell: ratio for cell, ratio in ratios.items() if ratio > largest}
    every = f"M={tokens[0]}" if len(tokens) == 1 else "every M"
    return {
        "target": f"{every}, every shape, {direction}",
        "asked": f"<= {largest}x {peer}",
        "measured": max(ratios.values(), default=None),
        "met": False if short else None if missing else True,
        "missing": missing,
        "short": [f"{cell}: {ratio}x" for cell, ratio in short.items()],
    }


def bandwidth_target(
    bandwidth: list[dict[str, Any]], operation: str, smallest: float
) -> dict[str, Any]:
    found = [
        row["tb_s"]
        for row in bandwidth
        if (row["library"], row["operation"]) == (OURS, operation)
    ]
    return {
        "target": f"{operation} 268M weights",
        "asked": f">= {smallest} TB/s",
        "measured": found[0] if found else None,
        "met": found[0] >= smallest if found else None,
        "missing": [] if found else [operation],
        "short": [],
    }


def report(record: dict[str, Any]) -> str:
    """Everything that was measured, in lines for a terminal."""
    lines = [f"{name} {value}" for name, value in record["ceilings"].items()]
    for row in record["bandwidth"]:
        lines.append(
            f"{row['library']:13}{row['operation']:16}{row['us']:9.1f} us"
            f"{row['tb_s']:7.2f} TB/s"
        )
    for target in record["targets"]:
        met = {True: "met", False: "NOT MET", None: "open"}[target["met"]]
        missing = f", {len(target['missing'])} missing" * bool(target["missing"])
        lines.append(
            f"{met:8}{target['target']}: {target['measured']}, asked "
            f"{target['asked']}{missing}"
        )
        lines += [f"{'':10}{cell}" for cell in target["short"]]
    # A list of cells that failed alike would bury the table.
    lines += [f"failed  {failure}" for failure in record["failed"][:10]]
    if len(record["failed"]) > 10:
        lines.append(f"failed  and {len(record['failed']) - 10} more")
    return "\n".join([*lines, *table(record["rows"])])


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Microseconds: a part for each direction and shape, a line for each layer."""
    times = {key_of(row): row["us"] for row in rows}
    layers, tokens = unique(rows, "layer"), sorted(unique(rows, "m"))
    parts = dict.fromkeys((row["direction"], row["n"], row["k"]) for row in rows)
    lines = []
    for direction, n, k in sorted(parts, key=lambda part: part[0]):
        lines.append(
            f"{f'{n}x{k}':14}" + "".join(f"{m:>8}" for m in tokens) + f"  {direction}"
        )
        for layer in layers:
            us = [times.get((layer, n, k, m, direction)) for m in tokens]
            if any(time is not None for time in us):
                lines.append(
                    f"{layer:14}" + "".join(f"{digits(time):>8}" for time in us)
                )
    return lines


def digits(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def key_of(row: dict[str, Any]) -> Key:
    return row["layer"], row["n"], row["k"], row["m"], row["direction"]


def unique(rows: Iterable[dict[str, Any]], field: str) -> list[Any]:
    return list(dict.fromkeys(row[field] for row in rows))
