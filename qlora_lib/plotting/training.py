"""Figures of training: losses of one or several runs."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes

from qlora_lib.plotting.style import MARKERS, PALETTE, Numbers, as_array, axes_or_new

MOST_MARKERS = 12


def loss_curves(
    curves: Mapping[str, tuple[Numbers, Numbers]],
    standard_errors: Mapping[str, Numbers] | None = None,
    marks: Mapping[str, tuple[float, float]] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw losses over the steps of training, with marked points beside them.

    Args:
        curves: Steps and losses, in nats per token, of each run by its label.
        standard_errors: Those of the losses of a run, by its label: a band of twice
            this width to either side, about 95 percent.
        marks: ``(step, loss)`` of each further point, by its label.
        ax: Where to draw; a new figure by default.
    """
    ax = axes_or_new(ax)
    for place, (label, (steps, losses)) in enumerate(curves.items()):
        x, y = as_array(steps), as_array(losses)
        style = {"color": PALETTE[place], "marker": MARKERS[place], "label": label}
        # Where curves lie on each other, markers of one stand between those of others.
        every = max(1, len(x) // MOST_MARKERS)
        offset = place * every // len(curves)
        ax.plot(x, y, markevery=(offset, every), **style)  # type: ignore[arg-type]
        if standard_errors and label in standard_errors:
            width = 2 * as_array(standard_errors[label])
            ax.fill_between(
                x, y - width, y + width, color=PALETTE[place], alpha=0.2, linewidth=0
            )
    for place, (label, (step, loss)) in enumerate((marks or {}).items(), len(curves)):
        # The value stands in the legend, where it cannot lie on a curve.
        label = f"{label}: {loss:.2f}"
        ax.plot(step, loss, MARKERS[place], color=PALETTE[place], label=label, zorder=3)
    ax.set(xlabel="step", ylabel="loss (nats per token)")
    ax.margins(y=0.15)
    ax.legend()
    return ax
