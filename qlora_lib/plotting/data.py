"""Figures of numbers: how they are distributed, and what quantization does to each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from qlora_lib.plotting.style import (
    BLACK,
    BLUE,
    GRAY,
    LIGHT_GRAY,
    PALETTE,
    SKY_BLUE,
    Numbers,
    as_array,
    axes_or_new,
    note,
)


def interval_histogram(
    samples: Numbers, edges: Numbers, ax: Axes | None = None
) -> Axes:
    """Draw how many samples fall into each interval, and mark those that stay empty.

    Counts are on a logarithmic axis, on which a single outlier can still be seen.

    Args:
        samples: Numbers between the first edge and the last, of any shape.
        edges: Ascending edges of the intervals; each interval holds its left edge, and
            the last its right edge too.
        ax: Where to draw; a new figure by default.
    """
    ax = axes_or_new(ax)
    counts, cuts = np.histogram(as_array(samples), as_array(edges))
    used = counts > 0
    left, widths = cuts[:-1], np.diff(cuts)
    top = 4 * counts.max()
    for shown, heights, label, color, hatch in (
        (used, counts[used], "used", SKY_BLUE, ""),
        (~used, np.full((~used).sum(), top), "empty", LIGHT_GRAY, "//"),
    ):
        ax.bar(
            left[shown],
            heights,
            widths[shown],
            align="edge",
            color=color,
            edgecolor="white",
            hatch=hatch,
            label=f"{label} ({shown.sum()})",
        )
    for place, count in enumerate(counts):
        middle = left[place] + widths[place] / 2
        note(ax, f"{count}", (middle, max(count, 0.5)), (0, 3), fontsize="small")
    ax.set(yscale="log", ylim=(0.5, top), ylabel="numbers in the interval")
    ax.set_xlabel("value, with one bar for each interval")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return ax


def quantile_bins(
    edges: Numbers, highlight: Sequence[int] = (), ax: Axes | None = None
) -> Axes:
    """Draw the normal density, cut at quantiles, with some bins filled and measured.

    Args:
        edges: Ascending edges of the bins; the first and last may be infinite.
        highlight: Indexes of the bins to fill and to annotate with the quantiles that
            they span and with their width.
        ax: Where to draw; a new figure by default.
    """
    ax = axes_or_new(ax)
    end = 3.5
    x = np.linspace(-end, end, 701)
    ax.plot(x, _normal_density(x), color=BLACK, marker="")
    cuts = as_array(edges)
    inner = cuts[np.abs(cuts) < end]
    ax.vlines(inner, 0, _normal_density(inner), colors=GRAY, linewidth=1)
    for place, bin_index in enumerate(highlight):
        left, right = float(cuts[bin_index]), float(cuts[bin_index + 1])
        inside = np.linspace(max(left, -end), min(right, end), 101)
        density = _normal_density(inside)
        color = PALETTE[place % len(PALETTE)]
        ax.fill_between(inside, density, color=color, label=f"bin {bin_index}")
        # A wide bin is wide in its tail; its mass is where its density is.
        where = (float(inside[density.argmax()]), float(density.max()))
        text = _quantile_text(left, right)
        arrow = {"arrowstyle": "-", "color": color}
        note(ax, text, where, (40, 12), ha="left", va="bottom", arrowprops=arrow)
    ax.set(
        xlim=(-end, end), ylim=(0, 0.55), xlabel="standard deviations", ylabel="density"
    )
    return ax


def error_along_tensor(
    errors: Mapping[str, Numbers], block_size: int, highlight: Sequence[int] = ()
) -> Figure:
    """Draw the error of each number in its place, one panel for each way to quantize.

    Args:
        errors: The magnitude of the error of each number, for each panel by its title.
        block_size: Where gray lines cut the tensor into blocks.
        highlight: Indexes of the blocks to shade.
    """
    size = (7.0, 0.6 + 1.3 * len(errors))
    figure, axes = plt.subplots(
        len(errors), sharex=True, sharey=True, squeeze=False, figsize=size
    )
    for ax, (title, error) in zip(axes.flat, errors.items(), strict=True):
        heights = as_array(error)
        for block in highlight:
            span = (block * block_size - 0.5, (block + 1) * block_size - 0.5)
            ax.axvspan(*span, color=LIGHT_GRAY, linewidth=0)
        ax.bar(np.arange(len(heights)), heights, width=0.8, color=BLUE)
        cuts = np.arange(block_size, len(heights), block_size) - 0.5
        ax.vlines(cuts, 0, 1, colors=GRAY, transform=ax.get_xaxis_transform())
        ax.set(title=title, ylabel="error", xlim=(-0.5, len(heights) - 0.5))
    axes[-1, 0].set_xlabel("index of the number")
    return figure


def _normal_density(x: NDArray[np.float64]) -> NDArray[np.float64]:
    density: NDArray[np.float64] = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return density


def _quantile_text(left: float, right: float) -> str:
    low, high = ((1 + math.erf(edge / math.sqrt(2))) / 2 for edge in (left, right))
    width = right - left
    measured = f"width {width:.3f}" if math.isfinite(width) else "infinitely wide"
    return f"{low:.0%} to {high:.0%}\n{measured}"
