"""Figures of memory: what each step saves, cut into parts, and how a step takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qlora_lib.plotting.style import (
    BLACK,
    GRAY,
    LIGHT_GRAY,
    PALETTE,
    VERMILION,
    Numbers,
    as_array,
    axes_or_new,
    note,
)

# The parts of each bar, by label and size in GB.
Parts = Mapping[str, float]

COLORS = (*PALETTE[:6], GRAY, LIGHT_GRAY)
HATCHES = ("", "//", "", "xx", "\\\\", "", "", "..")
STRETCHES = 600
LEGEND: dict[str, Any] = {
    "loc": "lower right",
    "bbox_to_anchor": (1, 1),
    "ncols": 5,
    "fontsize": "small",
    "borderpad": 0,
    "columnspacing": 1.2,
    "handletextpad": 0.5,
}


def memory_waterfall(
    steps: Mapping[str, Parts],
    enlarged: int,
    measured: Mapping[str, float] | None = None,
    limit: tuple[str, float] | None = None,
) -> Figure:
    """Draw what is left after each step, and what the step took away.

    The upper panel ends with the step with which the lower one begins, on an axis of
    its own, so that small steps after large ones can be seen.

    Args:
        steps: The parts of each bar in GB, from top to bottom, each with the same
            labels in the same order.
        enlarged: How many of the last steps the lower panel shows.
        measured: What was measured, in GB, by the label of the step.
        limit: Label and GB of a vertical line in the lower panel.
    """
    first = len(steps) - enlarged
    heights = (first + 1, enlarged)
    figure, (upper, lower) = plt.subplots(
        2, figsize=(7.0, 1.6 + 0.4 * sum(heights)), height_ratios=heights
    )
    rows = list(steps)
    totals = [sum(parts.values()) for parts in steps.values()]
    for ax, begin, end in ((upper, 0, first + 1), (lower, first, len(steps))):
        memory_bars({row: steps[row] for row in rows[begin:end]}, measured, ax)
        for place, step in enumerate(range(begin, end)):
            right, text = totals[step], f"{totals[step]:,.1f}"
            if place:
                saved = totals[step - 1] - totals[step]
                _draw_saved(ax, place, totals[step], saved)
                right, text = totals[step - 1], f"{text} (\N{MINUS SIGN}{saved:,.1f})"
            style = {"ha": "left", "va": "center", "fontsize": "small"}
            note(ax, text, (right, place), (4, 0), **style)
        ax.set_xlim(0, 1.22 * totals[begin])
    if limit is not None:
        label, gigabytes = limit
        lower.axvline(gigabytes, color=VERMILION, linestyle="--")
        style = {"color": VERMILION, "fontsize": "small"}
        # Its height is counted in the axes, where 1 is the top.
        style["xycoords"] = lower.get_xaxis_transform()
        note(lower, label, (gigabytes, 1), (0, 3), **style)
    upper.set(xlabel="")
    lower.set_title("from there on, enlarged", loc="left", fontsize="medium")
    handles, labels = lower.get_legend_handles_labels()
    lower.get_legend().remove()
    upper.legend(handles, labels, **LEGEND)
    return figure


def memory_bars(
    rows: Mapping[str, Parts],
    measured: Mapping[str, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw memory by its parts, a bar for each row, and beside it what was measured.

    Args:
        rows: The parts of each bar in GB, from top to bottom, each with the same
            labels in the same order.
        measured: What was measured, in GB, by the label of the row; rows without a
            measurement have no second bar.
        ax: Where to draw; a new figure by default.
    """
    ax = axes_or_new(ax, height=1.4 + 0.42 * len(rows))
    places = np.arange(len(rows))
    left = np.zeros(len(rows))
    names = list(next(iter(rows.values())))
    for name, color, hatch in zip(names, COLORS, HATCHES, strict=False):
        widths = np.array([parts[name] for parts in rows.values()])
        style: dict[str, Any] = {"color": color, "hatch": hatch, "linewidth": 0}
        style["edgecolor"] = "white"
        ax.barh(places, widths, 0.56, left, label=name, **style)
        left = left + widths
    found = [(row, (measured or {}).get(label)) for row, label in enumerate(rows)]
    bars = [(row, size) for row, size in found if size is not None]
    if bars:
        at, sizes = zip(*bars, strict=True)
        ax.barh([row + 0.37 for row in at], sizes, 0.16, color=BLACK, label="measured")
    ax.set_yticks(places, list(rows))
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
    ax.set(xlabel="GB", xlim=(0, 1.05 * max(left.max(), *(s for _, s in bars), 0)))
    ax.legend(**LEGEND)
    return ax


def memory_timeline(
    runs: Mapping[str, Numbers], turns: Sequence[int], ylabel: str
) -> Figure:
    """Draw what is in use over the operations of a training step, each with its own y.

    Args:
        runs: GB in use after each operation, for each panel by its title.
        turns: For each run, at which operation the backward pass begins.
        ylabel: What is counted.
    """
    figure, panels = plt.subplots(
        len(runs), figsize=(7.0, 2.1 * len(runs)), squeeze=False
    )
    for ax, (title, numbers), turn in zip(
        panels[:, 0], runs.items(), turns, strict=True
    ):
        values = as_array(numbers)
        # The most of each stretch is enough for the eye, and makes a small picture.
        starts = np.arange(0, len(values), -(-len(values) // STRETCHES))
        most = np.maximum.reduceat(values, starts)
        ax.fill_between(starts, most, step="post", color=PALETTE[4], linewidth=0)
        ax.axvline(turn, color=BLACK, linestyle=":")
        top = int(values.argmax())
        ax.plot(top, values[top], "o", color=VERMILION)
        side = "right" if top > len(values) / 2 else "left"
        style = {"ha": side, "va": "center", "color": VERMILION}
        offset = (-8.0 if side == "right" else 8.0, 4.0)
        note(ax, f"{values[top]:.1f} GB", (top, values[top]), offset, **style)
        ends = (0, len(values))
        ax.set(title=title, ylabel=ylabel, xlim=ends, ylim=(0, 1.2 * values[top]))
        ax.text(turn / 2, 0, "forward", ha="center", va="bottom")
        ax.text((turn + ends[1]) / 2, 0, "backward", ha="center", va="bottom")
    panels[-1, 0].set_xlabel("operations of the step, in their order")
    return figure


def _draw_saved(ax: Axes, place: int, start: float, saved: float) -> None:
    """Outline what a step took away, right of what it left."""
    style: dict[str, Any] = {"facecolor": "none", "edgecolor": GRAY, "linestyle": "--"}
    ax.barh(place, saved, 0.56, start, **style)
