"""Figures of paging: what a policy misses, when pages move, and what a step costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qlora_lib.plotting.style import (
    BLACK,
    BLUE,
    LIGHT_GRAY,
    ORANGE,
    SKY_BLUE,
    Numbers,
    as_array,
    axes_or_new,
    note,
)

# What happens to a page, which page, and when it begins and ends.
Event = tuple[Literal["in", "update", "out"], int, float, float]

LANES = {"in": "host to GPU", "update": "update", "out": "GPU to host"}
LANE_COLORS = {"in": SKY_BLUE, "update": ORANGE, "out": BLUE}
# A bar has room for the number of its page from this part of the panel's width on.
LABEL_SHARE = 0.02


def misses_by_room(
    pages: int, misses: Mapping[str, Numbers], ax: Axes | None = None
) -> Axes:
    """Draw how many pages a walk has to fetch, by the number that find room.

    Args:
        pages: How many pages there are.
        misses: For each policy by its label, the misses of a walk with room for
            1, 2, ... pages.
        ax: Where to draw; a new figure by default.
    """
    ax = axes_or_new(ax)
    rooms = range(1, pages + 1)
    # No walk can fetch fewer than those that have no room.
    least = [pages - room for room in rooms]
    ax.fill_between(rooms, least, color=LIGHT_GRAY, linewidth=0)
    note(ax, "impossible", (0.55 * pages, 0.15 * pages), (0, 0), va="center")
    for label, counts in misses.items():
        ax.plot(rooms, as_array(counts), label=label)
    ax.set(
        xlabel=f"room, in pages (of {pages})",
        ylabel="pages fetched in a walk",
        xlim=(1, pages + 0.2),
        ylim=(0, 1.08 * pages),
        xticks=rooms,
    )
    ax.legend(loc="lower left")
    return ax


def paging_timeline(panels: Mapping[str, Sequence[Event]], xlabel: str) -> Figure:
    """Draw when each page is copied in, updated and copied out.

    Args:
        panels: The events of each panel by its title, on a common axis of time.
        xlabel: What time is counted in.
    """
    figure, axes = plt.subplots(
        len(panels), figsize=(7.0, 0.6 + 1.25 * len(panels)), squeeze=False, sharex=True
    )
    end = max(event[3] for events in panels.values() for event in events)
    lanes = list(LANES)
    for ax, (title, events) in zip(axes[:, 0], panels.items(), strict=True):
        for kind, page, begin, until in events:
            lane = lanes.index(kind)
            style: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.5}
            ax.barh(lane, until - begin, 0.8, begin, color=LANE_COLORS[kind], **style)
            if until - begin > LABEL_SHARE * end:
                color = "white" if kind == "out" else BLACK
                middle = {"ha": "center", "va": "center", "fontsize": "small"}
                ax.text((begin + until) / 2, lane, str(page), color=color, **middle)
        ax.set_yticks(range(len(lanes)), list(LANES.values()))
        ax.tick_params(axis="y", length=0)
        ax.set(xlim=(0, end), ylim=(2.5, -0.5))
        ax.set_title(title, loc="left", fontsize="medium")
    axes[-1, 0].set_xlabel(xlabel)
    return figure


def paging_cost(
    measured: Mapping[str, tuple[Numbers, Numbers]],
    marks: Mapping[str, float] | None = None,
    floor: tuple[Numbers, Numbers] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the time of an update by the share of its state that resides on the GPU.

    Args:
        measured: For each series by its label, shares (0 to 1) and milliseconds.
        marks: Milliseconds of what has all its state on the GPU, by its label.
        floor: Shares and milliseconds of the copies of 32-bit state alone.
        ax: Where to draw; a new figure by default.
    """
    ax = axes_or_new(ax)
    if floor is not None:
        shares, times = map(as_array, floor)
        style: dict[str, Any] = {"color": BLACK, "linestyle": "--", "marker": ""}
        ax.plot(100 * shares, times, label="copies alone, 32 bits", **style)
    for label, (numbers, milliseconds) in measured.items():
        ax.plot(100 * as_array(numbers), as_array(milliseconds), label=label)
    for label, time in (marks or {}).items():
        ax.plot(100, time, linestyle="", label=label, markersize=7)
    ax.set(
        xlabel="state that resides on the GPU, in %",
        ylabel="milliseconds of an update",
        xlim=(-3, 103),
    )
    ax.set_ylim(bottom=0)
    ax.legend(fontsize="small")
    return ax
