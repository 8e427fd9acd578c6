"""Figures of measured kernels: how close to the machine, and how fast beside bf16."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from qlora_lib.plotting.style import (
    BLACK,
    BLUE,
    GRAY,
    LIGHT_GRAY,
    MARKERS,
    PALETTE,
    axes_or_new,
    note,
)

BASELINE = "bf16"
BYTES_PER_ACTIVATION = 2  # bf16
PARITY_MARGIN = 1.05
LABELLED_TOKENS = (1, 16, 256, 4096)

Record = Mapping[str, Any]
Row = Mapping[str, Any]


def roofline(record: Record, n: int, k: int, ax: Axes | None = None) -> Axes:
    """Draw what each layer attains of the machine, from one token to many.

    A point is the forward product of ``m`` tokens with a weight ``[n, k]``. It does
    ``2 m n k`` operations; the fewest bytes it can move are the weight's, in the
    layer's own format, and those of its bf16 inputs and outputs.

    Args:
        record: The content of ``experiments/results/matmul.json``.
        n: Output features.
        k: Input features.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: If the record has no forward row of this shape.
    """
    rows = [row for row in _forward(record) if (row["n"], row["k"]) == (n, k)]
    if not rows:
        shapes = sorted({f"{row['n']}x{row['k']}" for row in _forward(record)})
        raise ValueError(
            f"n={n}, k={k}: record has no forward row of this shape, only of "
            f"{', '.join(shapes) or 'none'}; choose one of those"
        )
    ax = axes_or_new(ax, height=4.2)
    points = {
        layer: [_roofline_point(record, row) for row in _by_tokens(rows, layer)]
        for layer in _layers(rows)
    }
    everywhere = np.array([point for curve in points.values() for point in curve])
    ends = everywhere[:, 0].min() / 2, everywhere[:, 0].max() * 2
    _draw_ceilings(ax, record["ceilings"], ends)
    for layer, curve in points.items():
        ax.plot(*np.array(curve).T, label=layer, linewidth=1, **_style(record, layer))
    first = next(iter(points))
    for row, point in zip(_by_tokens(rows, first), points[first], strict=True):
        if row["m"] in LABELLED_TOKENS:
            below = {"va": "top", "ha": "left", "fontsize": "small"}
            halo = [withStroke(linewidth=2, foreground="white")]
            text = f"M={row['m']}"
            note(ax, text, point, (3, -4), path_effects=halo, **below)
    ax.set(
        xscale="log",
        yscale="log",
        xlim=ends,
        xlabel="arithmetic intensity (operations per byte)",
        ylabel="operations per second",
        title=f"{n} × {k}",
    )
    ax.legend(loc="lower right")
    return ax


def speedup(record: Record, direction: str = "forward") -> Figure:
    """Draw the time of each layer relative to the bf16 layer, one panel for each shape.

    Below 1 a layer is faster than the bf16 layer that it replaces. The gray line is the
    bf16 layer's own time, and the band on it ends at 1.05 times that.

    Args:
        record: The content of ``experiments/results/matmul.json``.
        direction: ``"forward"``, or ``"forward+backward"`` with the gradient to the
            input.

    Raises:
        ValueError: If the record has no bf16 row in this direction to compare with.
    """
    rows = [row for row in record["rows"] if row["direction"] == direction]
    baseline = {_cell(row): row["us"] for row in rows if row["layer"] == BASELINE}
    if not baseline:
        raise ValueError(
            f"direction={direction!r}: record has no {BASELINE} row in it; measure the "
            f"layer {BASELINE} too, or choose another direction"
        )
    rows = [row for row in rows if _cell(row) in baseline]
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in rows))
    columns = min(2, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        sharex=True,
        sharey=True,
        squeeze=False,
        figsize=(7.0, 0.8 + 2.2 * lines),
    )
    for ax, (n, k) in zip(axes.flat, shapes, strict=False):
        of_shape = [row for row in rows if (row["n"], row["k"]) == (n, k)]
        _draw_relative_times(ax, record, of_shape, baseline)
        ax.set_title(f"{n} × {k}")
    for ax in axes.flat[len(shapes) :]:
        ax.set_axis_off()
    for ax in axes[-1]:
        ax.set_xlabel("tokens M")
    for ax in axes[:, 0]:
        ax.set_ylabel(f"time / time of {BASELINE}")
    curves = {
        line.get_label(): line
        for ax in axes.flat
        for line in ax.lines
        if not str(line.get_label()).startswith("_")
    }
    figure.legend(
        curves.values(),
        curves.keys(),
        loc="outside upper center",
        ncols=len(curves),
        columnspacing=1.2,
        fontsize="small",
    )
    return figure


def tuning_steps(
    record: Record,
    n: int,
    k: int,
    tokens: Sequence[int],
    names: Mapping[int, str],
    floor_us: float,
) -> Figure:
    """Draw what each step of writing a kernel took, one panel for each size.

    Bars far longer than the others are cut off, with an arrow behind their number. The
    bf16 layer is that of the fewest tokens measured that are no fewer than the panel's.
    Kernels that gave wrong values on purpose are left out.

    Args:
        record: The content of ``experiments/results/kernel_tuning.json``.
        n: Output features.
        k: Input features.
        tokens: The M of each panel.
        names: The steps to draw, from top to bottom, and what to call each.
        floor_us: The time in which the memory can deliver the weight, in microseconds.

    Raises:
        ValueError: If the record has no such step for one of the sizes, or no bf16
            layer.
    """
    rows = [
        row
        for row in record["rows"]
        if (row["n"], row["k"]) == (n, k) and "wrong" not in row["decoder"]
    ]
    bf16 = [row for row in record["bf16"] if (row["n"], row["k"]) == (n, k)]
    figure, axes = plt.subplots(
        1,
        len(tokens),
        sharey=True,
        squeeze=False,
        figsize=(7.0, 1.2 + 0.3 * len(names)),
    )
    for ax, m in zip(axes[0], tokens, strict=True):
        times: dict[int, float] = {}
        for row in rows:
            if row["m"] == m and row["step"] in names:
                times[row["step"]] = min(row["us"], times.get(row["step"], math.inf))
        slower = [(row["m"], row["us"]) for row in bf16 if row["m"] >= m]
        if not times or not slower:
            raise ValueError(
                f"n={n}, k={k}, m={m}: record has {len(times)} steps and "
                f"{len(slower)} times of the {BASELINE} layer for this size; choose "
                "one that was measured"
            )
        _draw_steps(ax, list(names), times, floor_us, min(slower)[1])
        ax.set(title=f"M={m}", xlabel="µs")
    axes[0, 0].set_yticks(
        range(len(names)), [f"{step}. {name}" for step, name in names.items()]
    )
    axes[0, 0].invert_yaxis()
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=2,
        fontsize="small",
    )
    return figure


def _draw_steps(
    ax: Axes,
    steps: Sequence[int],
    times: Mapping[int, float],
    floor_us: float,
    baseline_us: float,
) -> None:
    end = 1.4 * max(float(np.median(list(times.values()))), baseline_us)
    ax.axvline(floor_us, color=BLACK, linestyle=":", marker="", label="memory alone")
    ax.axvline(
        baseline_us, color=BLACK, linestyle="--", marker="", label=f"{BASELINE} layer"
    )
    for place, step in enumerate(steps):
        if step not in times:
            continue
        ax.barh(place, times[step], height=0.6, color=BLUE, zorder=0)
        text = f"{times[step]:.0f}" + " →" * (times[step] > end)
        beside = {"ha": "right", "va": "center", "color": "white", "fontsize": "small"}
        note(ax, text, (min(times[step], end), place), (-3, 0), **beside)
    ax.set_xlim(0, end)
    ax.tick_params(axis="y", length=0)


def _draw_ceilings(
    ax: Axes, ceilings: Mapping[str, float], ends: tuple[float, float]
) -> None:
    memory, compute = ceilings["copy_tb_s"] * 1e12, ceilings["bf16_tflop_s"] * 1e12
    ridge = compute / memory
    corners = np.array([ends[0], min(max(ridge, ends[0]), ends[1]), ends[1]])
    ax.plot(
        corners, np.minimum(memory * corners, compute), color=BLACK, marker="", zorder=1
    )
    middle = math.sqrt(corners[0] * corners[1])
    left, right = (middle, memory * middle), (ends[1] / 1.5, compute)
    memory_text = f"memory {ceilings['copy_tb_s']:.2f} TB/s"
    compute_text = f"bf16 {ceilings['bf16_tflop_s']:.0f} TFLOP/s"
    note(ax, memory_text, left, (-6, 2), ha="right", fontsize="small")
    note(ax, compute_text, right, (0, 4), ha="right", fontsize="small")


def _draw_relative_times(
    ax: Axes,
    record: Record,
    rows: Sequence[Row],
    baseline: Mapping[tuple[int, int, int], float],
) -> None:
    ax.axhspan(1, PARITY_MARGIN, color=LIGHT_GRAY, linewidth=0)
    ax.axhline(1, color=GRAY, linewidth=1, label=BASELINE)
    for layer in _layers(rows):
        if layer == BASELINE:
            continue
        of_layer = _by_tokens(rows, layer)
        ax.plot(
            [row["m"] for row in of_layer],
            [row["us"] / baseline[_cell(row)] for row in of_layer],
            label=layer,
            linewidth=1,
            **_style(record, layer),
        )
    tokens = sorted({row["m"] for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_locator(FixedLocator(tokens[:: len(tokens) // 7 + 1]))
    ax.yaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4, 8, 16, 32]))


def _roofline_point(record: Record, row: Row) -> tuple[float, float]:
    """Operations per byte, and operations per second."""
    m, n, k = row["m"], row["n"], row["k"]
    operations = 2 * m * n * k
    weight_bytes = record["bytes_per_weight"][row["layer"]] * n * k
    activation_bytes = BYTES_PER_ACTIVATION * m * (n + k)
    seconds = 1e-6 * row["us"]
    return operations / (weight_bytes + activation_bytes), operations / seconds


def _forward(record: Record) -> list[Row]:
    return [row for row in record["rows"] if row["direction"] == "forward"]


def _by_tokens(rows: Iterable[Row], layer: str) -> list[Row]:
    of_layer = [row for row in rows if row["layer"] == layer]
    return sorted(of_layer, key=lambda row: row["m"])


def _layers(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["layer"] for row in rows))


def _style(record: Record, layer: str) -> dict[str, Any]:
    """Color and marker of a layer, the same in every figure of a record."""
    place = _layers(record["rows"]).index(layer) % len(PALETTE)
    return {"color": PALETTE[place], "marker": MARKERS[place]}


def _cell(row: Row) -> tuple[int, int, int]:
    return row["n"], row["k"], row["m"]
