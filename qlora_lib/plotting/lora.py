"""Figures of adapters: what a small rank can hold, and what a merge leaves of it."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from qlora_lib.plotting.style import LIGHT_GRAY, Numbers, as_array, axes_or_new


def rank_repair(singular_values: Mapping[str, Numbers]) -> Figure:
    """Draw singular values of matrices, and what the best small rank leaves of each.

    The right panel is computed from the left one: the best matrix of rank ``r`` takes
    away the ``r`` largest singular values, and the root of the sum of the squares of
    the others is the Frobenius norm of what is left.

    Args:
        singular_values: Those of each matrix by its label, in descending order.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 2.6), sharey=True)
    for label, numbers in singular_values.items():
        values = as_array(numbers)
        left.plot(np.arange(1, len(values) + 1), values / values[0], label=label)
        squares = np.append(values**2, 0.0)
        rest = np.sqrt(squares[::-1].cumsum()[::-1] / squares.sum())
        right.plot(np.arange(len(rest)), rest, label=label)
    left.set(title="singular values / the largest", xlabel="place in the order")
    right.set(title="part of the norm that is left", xlabel="rank")
    for ax in (left, right):
        # Lines stay distinct without color by a few markers, spread over each.
        for line in ax.lines:
            line.set_markevery(0.125)
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        ax.set_ylim(0, 1.05)
    right.legend()
    return figure


def merge_survival(
    sizes: Numbers, survivors: Mapping[str, Numbers], ax: Axes | None = None
) -> Axes:
    """Draw how much of an adapter is left after a merge, by the size of the adapter.

    Args:
        sizes: Norms of the adapters, relative to that of the weight, on a logarithmic
            axis.
        survivors: For each kind of merge by its label, the coefficient of the adapter
            in the change of the merged weight: 1 if all of it is left, 0 if nothing is.
        ax: Where to draw; a new figure by default.
    """
    ax = axes_or_new(ax)
    ax.axhline(1, color=LIGHT_GRAY, zorder=0)
    for label, curve in survivors.items():
        ax.plot(as_array(sizes), as_array(curve), label=label)
    ax.set(
        xlabel="norm of the adapter, relative to that of the weight",
        ylabel="part of the adapter left",
        xscale="log",
    )
    ax.xaxis.set_major_formatter(lambda size, _: f"{100 * size:g}%")
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.legend()
    return ax
