"""Figures of codebooks: where their values lie, and which numbers they serve."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from qlora_lib.numerics import Codebook
from qlora_lib.plotting.style import (
    BLUE,
    GRAY,
    SKY_BLUE,
    VERMILION,
    Numbers,
    as_array,
    axes_or_new,
    note,
)

MAX_VALUES_WITH_CODES = 16
MAX_VALUES_WITH_NUMBERS = 8


def number_line(
    codebook: Codebook,
    points: Numbers | None = None,
    boundaries: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw the values of a codebook on a line, and where normalized numbers land.

    Args:
        codebook: Its values are dots; up to 16 carry their codes below, up to 8 the
            numbers too.
        points: Normalized numbers, drawn above the line, each with an arrow to the
            value that is nearest by the codebook's own rule.
        boundaries: Whether a gray tick separates the numbers of one value from those of
            the next.
        ax: Where to draw; a new figure by default.
    """
    ax = axes_or_new(ax, height=1.7 if points is None else 2.4)
    values = as_array(codebook.values)
    ax.axhline(0, color=GRAY, linewidth=1, zorder=1)
    if boundaries:
        ticks = as_array(codebook.boundaries)
        ax.vlines(ticks, -0.25, 0.25, colors=GRAY, linewidth=1, label="boundary")
    ax.plot(values, 0 * values, "o", color=BLUE, label="value and its code", zorder=3)
    if len(values) <= MAX_VALUES_WITH_CODES:
        for code, value in enumerate(values):
            _label_value(
                ax, code, value, with_number=len(values) <= MAX_VALUES_WITH_NUMBERS
            )
    if points is not None:
        _draw_landings(ax, codebook, points)
    ax.set(xlim=(-1.1, 1.1), ylim=(-0.9, 0.4 if points is None else 1.4))
    ax.set_xlabel(f"normalized value ({codebook.name})")
    ax.yaxis.set_visible(False)
    ax.spines["left"].set_visible(False)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return ax


def number_lines(codebooks: Sequence[Codebook], ax: Axes | None = None) -> Axes:
    """Draw the values of several codebooks, one below the other, to compare spacing.

    Args:
        codebooks: From top to bottom, each on its own line beside its name. Up to 16
            values are dots, with gray ticks for the boundaries; more are strokes.
        ax: Where to draw; a new figure by default.
    """
    ax = axes_or_new(ax, height=0.9 + 0.35 * len(codebooks))
    rows = range(len(codebooks))
    for row, codebook in zip(rows, codebooks, strict=True):
        few = len(codebook) <= MAX_VALUES_WITH_CODES
        ax.axhline(row, color=GRAY, linewidth=1, zorder=1)
        if few:
            ticks = as_array(codebook.boundaries)
            ax.vlines(ticks, row - 0.25, row + 0.25, colors=GRAY, linewidth=1)
        values = as_array(codebook.values)
        # Small, as the values of a float lie close together around zero; strokes stay
        # apart for longer than dots do.
        marker, size = ("o", 3.5) if few else ("|", 6)
        ax.plot(values, 0 * values + row, marker, color=BLUE, ms=size, zorder=3)
    ax.set_yticks(rows, [codebook.name for codebook in codebooks])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set(xlim=(-1.05, 1.05), ylim=(len(codebooks) - 0.5, -0.5))
    ax.set_xlabel("normalized value")
    return ax


def decision_histogram(
    samples: Numbers, codebook: Codebook, ax: Axes | None = None
) -> Axes:
    """Draw how often each code is used, in bins that are the codebook's decisions.

    A bar reaches from one boundary to the next and its area is the share of its code,
    so the bars have the shape of the data and equal areas would be equal use.

    Args:
        samples: Normalized numbers in [-1, 1], of any shape.
        codebook: Up to 16 codes are annotated with their share.
        ax: Where to draw; a new figure by default.
    """
    ax = axes_or_new(ax)
    codes = codebook.nearest(torch.as_tensor(samples, dtype=torch.float32).detach())
    counts = torch.bincount(codes.flatten().long(), minlength=len(codebook))
    shares = as_array(counts) / codes.numel()
    edges = np.concatenate([[-1.0], as_array(codebook.boundaries), [1.0]])
    heights = shares / np.diff(edges)
    ax.bar(
        edges[:-1],
        heights,
        np.diff(edges),
        align="edge",
        color=SKY_BLUE,
        edgecolor="white",
        label="share of the code (area)",
    )
    values = as_array(codebook.values)
    ax.plot(
        values, 0 * values, "o", color=BLUE, label="value of the code", clip_on=False
    )
    if len(values) <= MAX_VALUES_WITH_CODES:
        for left, right, height, share in zip(
            edges[:-1], edges[1:], heights, shares, strict=True
        ):
            middle = ((left + right) / 2, height)
            note(ax, f"{share:.1%}", middle, (0, 3), rotation=90, fontsize="small")
    ax.set(xlim=(-1.05, 1.05), ylim=(0, 1.3 * heights.max()))
    ax.set(xlabel=f"normalized value ({codebook.name})", ylabel="density")
    ax.legend(loc="upper right")
    return ax


def relative_precision(
    codebooks: Sequence[Codebook], smallest: float = 1e-3, ax: Axes | None = None
) -> Axes:
    """Draw how precisely codebooks store numbers of each magnitude.

    The worst number between two values is the one midway between them. Its error,
    divided by itself, is drawn above it; the error itself would be hidden by the scale.

    Args:
        codebooks: Only their positive values are looked at.
        smallest: The smallest magnitude to draw.
        ax: Where to draw; a new figure by default.
    """
    ax = axes_or_new(ax)
    for codebook, style in zip(codebooks, ("-", "--", ":", "-."), strict=False):
        values = as_array(codebook.values)
        middles = (values[:-1] + values[1:]) / 2
        shown = middles >= smallest
        worst = (values[1:] - middles)[shown] / middles[shown]
        ax.plot(middles[shown], worst, style, label=codebook.name, marker="")
    ax.set(xscale="log", yscale="log", xlim=(smallest, 1))
    ax.set(xlabel="magnitude (largest of the block: 1)", ylabel="worst relative error")
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    ax.legend()
    return ax


def _label_value(ax: Axes, code: int, value: float, with_number: bool) -> None:
    text = f"{code}\n{value:.3g}" if with_number else f"{code}"
    note(ax, text, (value, 0), (0, -8), va="top", fontsize="small")


def _draw_landings(ax: Axes, codebook: Codebook, points: Numbers) -> None:
    starts = torch.as_tensor(points, dtype=torch.float32).detach().flatten()
    landings = codebook.lookup(codebook.nearest(starts))
    ax.plot(starts, torch.ones(len(starts)), "D", color=VERMILION, label="input")
    for start, landing in zip(starts.tolist(), landings.tolist(), strict=True):
        arrow = {"arrowstyle": "->", "color": VERMILION, "shrinkA": 4, "shrinkB": 5}
        ax.annotate("", (landing, 0), (start, 1), arrowprops=arrow)
        note(ax, f"{start:.3g}", (start, 1), (0, 5), fontsize="small")
