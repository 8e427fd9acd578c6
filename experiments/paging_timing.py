"""Time steps that are compared, in turns, so that a slow moment falls on all of them.

A step is timed in groups, back to back between two synchronizations: what one step
leaves to be copied overlaps the next one, and the last one's counts.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import torch

GROUP_SECONDS = 0.25
MOST_STEPS = 50
BUSY_REPEATS = 5
# Cycles that the GPU waits, a tenth of a second, while the host launches a step.
HEAD_START_CYCLES = 250_000_000

K = TypeVar("K", bound=Hashable)


def alternate(
    steps: Mapping[K, Callable[[], object]],
    device: str,
    rounds: int,
    group_seconds: float = GROUP_SECONDS,
) -> dict[K, dict[str, Any]]:
    """Time a group of each step in every round; seconds per step.

    Groups take about ``group_seconds``. If that is 0 they are single steps, which must
    have been warmed up before.

    Returns:
        For each step, as medians over rounds and as ``shortest_``: ``seconds`` by the
        host's clock, ``event_seconds`` by events of the GPU around the group, which do
        not see what other streams still copy, and ``host_seconds`` until the first
        step of a group returned. A step that failed has an ``error`` instead.
    """
    counts: dict[K, int] = {}
    groups: dict[K, list[dict[str, float]]] = {key: [] for key in steps}
    errors: dict[K, str] = {}
    keys = list(steps)
    for index in range(-1, rounds):
        keys.append(keys.pop(0))  # each comes after each of the others in its turn
        for key in keys:
            step = steps[key]
            if key in errors:
                continue
            try:
                if index < 0 and not group_seconds:
                    counts[key] = 1
                elif index < 0:  # compiles, allocates, and says how long a step takes
                    time_group(step, device, 1)
                    once = time_group(step, device, 1)["seconds"]
                    count = round(group_seconds / max(once, 1e-9))
                    counts[key] = max(1, min(count, MOST_STEPS))
                else:
                    groups[key].append(time_group(step, device, counts[key]))
            except Exception as error:  # out of memory, or a peer that does not run
                errors[key] = one_line(error)
    return {
        key: {"error": errors[key]}
        if key in errors
        else {"steps_per_group": counts[key], **summary(groups[key])}
        for key in steps
    }


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect garbage now and not meanwhile.

    With the many objects of a large model that takes long, and it would fall on
    whichever step happens to be next.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@no_garbage_collection()
def time_group(step: Callable[[], object], device: str, count: int) -> dict[str, float]:
    """Seconds per step of ``count`` steps between two synchronizations."""
    on_card = device == "cuda"
    if on_card:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
    began = time.perf_counter()
    step()
    times = {"host_seconds": time.perf_counter() - began}
    for _ in range(count - 1):
        step()
    if on_card:
        end.record()
        torch.cuda.synchronize()
        times["event_seconds"] = start.elapsed_time(end) / 1e3 / count
    times["seconds"] = (time.perf_counter() - began) / count
    return times


def busy_seconds(step: Callable[[], object]) -> dict[str, float]:
    """Seconds that a step keeps the GPU busy, without waiting for the host.

    The GPU begins once the host has launched all of it. Only for steps on one stream.
    """
    times = []
    for _ in range(BUSY_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append({"busy_seconds": start.elapsed_time(end) / 1e3})
    return summary(times)


def summary(groups: list[dict[str, float]]) -> dict[str, float]:
    """Median and minimum of each time."""
    result = {}
    for name in groups[0]:
        times = [group[name] for group in groups]
        result[name] = round(statistics.median(times), 7)
        result[f"shortest_{name}"] = round(min(times), 7)
    return result


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
