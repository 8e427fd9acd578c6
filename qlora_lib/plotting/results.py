"""Figures of results: error against cost, and bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    LogLocator,
    NullFormatter,
    NullLocator,
    ScalarFormatter,
)

from qlora_lib.plotting.style import (
    BLACK,
    Numbers,
    as_array,
    axes_or_new,
    note,
)


def error_by_block_size(
    block_sizes: Sequence[int],
    errors: Mapping[str, Numbers],
    overhead_bits: Numbers,
    error_label: str = "root mean square error",
) -> Figure:
    """Draw what smaller blocks gain, and beside it what they cost.

    Args:
        block_sizes: Values per scale, on an axis of powers of two.
        errors: The error at each block size, for each curve by its label.
        overhead_bits: What the scales add at each block size, in bits per parameter.
        error_label: What the error is, with its unit if it has one.
    """
    figure, (left, right) = plt.subplots(1, 2, sharex=True, width_ratios=(3, 2))
    for label, curve in errors.items():
        left.plot(block_sizes, as_array(curve), label=label)
    left.set(title="what it gains", ylabel=error_label, ylim=(0, None))
    if len(errors) > 1:
        left.legend()
    right.plot(block_sizes, as_array(overhead_bits), color=BLACK)
    right.set(title="what it costs", ylabel="overhead (bits per parameter)")
    right.set_ylim(0, None)
    for ax in (left, right):
        ax.set_xlabel("block size (values per scale)")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(
            FixedLocator(list(block_sizes)[:: len(block_sizes) // 6 + 1])
        )
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(ScalarFormatter())
    return figure


def error_by_total_bits(
    block_sizes: Sequence[int],
    errors: Mapping[str, Numbers],
    bits: Mapping[str, Numbers],
    error_label: str = "root mean square error",
    ax: Axes | None = None,
) -> Axes:
    """Draw what error a number of bits buys, for codes of several widths.

    Args:
        block_sizes: Values per scale, written beside each mark.
        errors: The error at each block size, for each curve by its label.
        bits: The bits per parameter, codes and scales together, of the same points.
        error_label: What the error is, with its unit if it has one.
        ax: Where to draw; a new figure by default.
    """
    ax = axes_or_new(ax, height=4.0)
    for label, curve in errors.items():
        totals, heights = as_array(bits[label]), as_array(curve)
        ax.plot(totals, heights, label=label)
        # Where marks are far apart the sizes go below, out of the way of other curves.
        far_apart = np.abs(np.gradient(totals)) > 0.2
        for size, *at, below in zip(
            block_sizes, totals, heights, far_apart, strict=True
        ):
            style: dict[str, object] = {"va": "top"} if below else {"ha": "left"}
            style |= {"fontsize": "small", "color": BLACK}
            note(ax, str(size), (at[0], at[1]), (-4, -5) if below else (5, 0), **style)
    ax.margins(y=0.1)
    ax.set(xlabel="bits per parameter, codes and scales", ylabel=error_label)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(ScalarFormatter())
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.legend()
    return ax


def bits_bars(
    labels: Sequence[str], parts: Mapping[str, Sequence[float]], ax: Axes | None = None
) -> Axes:
    """Draw where the bits of a parameter go: a bar for each format, cut into parts.

    Args:
        labels: The formats, from top to bottom.
        parts: The bits per parameter that each part takes in each format.
        ax: Where to draw; a new figure by default.
    """
    ax = axes_or_new(ax, height=1.2 + 0.4 * len(labels))
    totals = np.zeros(len(labels))
    for (part, bits), hatch in zip(parts.items(), ("", "//", "..", "xx"), strict=False):
        widths = as_array(bits)
        ax.barh(labels, widths, left=totals, label=part, hatch=hatch, edgecolor="white")
        totals = totals + widths
    for row, total in enumerate(totals):
        note(ax, f"{total:.4g}", (total, row), (4, 0), ha="left", va="center")
    ax.invert_yaxis()
    ax.set(xlabel="bits per parameter", xlim=(0, 1.12 * totals.max()))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(parts))
    return ax
