"""What all figures share: palette, fonts, resolution, and small helpers."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor

Numbers = Sequence[float] | NDArray[np.floating] | Tensor

BLACK = "#000000"
ORANGE = "#E69F00"
SKY_BLUE = "#56B4E9"
GREEN = "#009E73"
BLUE = "#0072B2"
VERMILION = "#D55E00"
PURPLE = "#CC79A7"
GRAY = "#8C8C8C"
LIGHT_GRAY = "#D9D9D9"

# Ordered so that neighbors also differ in lightness, less yellow: it vanishes on white.
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, SKY_BLUE, PURPLE, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def book_style() -> None:
    """Make every figure drawn from here on look like the figures of the book.

    Inches and points are those of a column 7 inches wide. The resolution of 180 dots
    an inch keeps text sharp on screens that draw two dots to a pixel.
    """
    plt.rcParams.update(
        {
            "figure.figsize": (7.0, 3.0),
            "figure.dpi": 180,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "white",
            "axes.facecolor": "white",
            "axes.prop_cycle": cycler(color=PALETTE, marker=MARKERS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "font.size": 10,
            "legend.frameon": False,
            "lines.markersize": 5,
        }
    )


def axes_or_new(ax: Axes | None, height: float = 3.0) -> Axes:
    """Return ``ax``, or the axes of a new figure of column width."""
    return plt.subplots(figsize=(7.0, height))[1] if ax is None else ax


def as_array(numbers: Numbers) -> NDArray[np.float64]:
    """Return numbers of any kind, tensors that need gradients included, as float64."""
    tensor = torch.as_tensor(numbers).detach().cpu().double()
    array: NDArray[np.float64] = tensor.numpy()
    return array


def note(
    ax: Axes,
    text: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    **style: object,
) -> None:
    """Write a note ``offset`` points away from a point; centered above by default."""
    place = {"ha": "center", "va": "bottom", "textcoords": "offset points"}
    ax.annotate(text, at, offset, **(place | style))  # type: ignore[arg-type]
