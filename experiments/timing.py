"""Time calls on a GPU as one CUDA graph, over weights that do not fit in its cache.

A call of ten microseconds is launched more slowly than it runs. So the calls are
captured once and replayed as a graph, which leaves no gaps between them. A model reads
each weight once a token, after all its other weights: so the calls of one graph go
through several copies of the weights, whose bytes exceed the L2 cache by far.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROTATED_BYTES = 300e6  # five times the 60 MB of L2 of an H200
REPLAYS = 20
REPLAYS_OF_SLOW_CALLS = 5
SLOW_CALL_SECONDS = 1e-3

Outputs = tuple[Tensor, ...]


@dataclass
class Captured:
    """Calls as one CUDA graph, and the memory that each replay writes."""

    graph: torch.cuda.CUDAGraph
    outputs: list[Outputs]

    def poison(self) -> None:
        """Overwrite all outputs, so that what the next replay leaves out is seen."""
        for output in (tensor for outputs in self.outputs for tensor in outputs):
            output.fill_(math.nan if output.is_floating_point() else 0xA5)


def copies_needed(nbytes: int) -> int:
    """How many weights of ``nbytes`` to go through before the first one comes again."""
    return max(2, math.ceil(ROTATED_BYTES / nbytes) + 1)


def capture(calls: Sequence[Callable[[], Outputs]]) -> Captured:
    """Capture calls, one after the other, after they have run once outside of it.

    The first runs compile kernels, choose configurations and create handles, which a
    capture must not do. All calls have inputs of the same shapes, so three are enough.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # The outer context restores the stream, which a capture that fails does not.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        outputs = [call() for call in calls]
    return Captured(graph, outputs)


def seconds_per_call(captured: Captured) -> float:
    """Median over replays, timed by events on the device."""
    calls = len(captured.outputs)
    warm_up = event_seconds(captured.graph.replay) / calls
    slow = warm_up > SLOW_CALL_SECONDS
    if not slow:  # the clocks rise with the load
        event_seconds(captured.graph.replay)
        event_seconds(captured.graph.replay)
    times = [
        event_seconds(captured.graph.replay) / calls
        for _ in range(REPLAYS_OF_SLOW_CALLS if slow else REPLAYS)
    ]
    return statistics.median(times)


def seconds_as_called(call: Callable[[], object]) -> float:
    """Median over single calls from Python, with what they wait for on the host."""
    for _ in range(3):
        call()
    return statistics.median(event_seconds(call) for _ in range(REPLAYS))


def event_seconds(call: Callable[[], object]) -> float:
    """Seconds that pass on the device between two events around one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ceilings() -> dict[str, float]:
    """What the device reaches in a copy, read plus write, and in a bf16 product."""
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copied = capture([lambda: (target.copy_(source),)])
    copy_seconds = seconds_per_call(copied)
    size = 8192
    left, right = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    product_seconds = seconds_per_call(capture([lambda: (left @ right,)]))
    return {
        "copy_tb_s": round(2 * source.nbytes / copy_seconds / 1e12, 3),
        "bf16_tflop_s": round(2 * size**3 / product_seconds / 1e12, 1),
    }
