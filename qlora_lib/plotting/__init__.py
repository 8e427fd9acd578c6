"""The figures of the book: one function for each kind of picture.

White and opaque, so that they read on a dark page; in the palette of Okabe and Ito,
which stays distinct for color-blind readers; and never color alone: marks differ in
shape, lines in their markers, parts in their labels.
"""

from qlora_lib.plotting.codebooks import (
    decision_histogram,
    number_line,
    number_lines,
    relative_precision,
)
from qlora_lib.plotting.data import (
    error_along_tensor,
    interval_histogram,
    quantile_bins,
)
from qlora_lib.plotting.kernels import roofline, speedup, tuning_steps
from qlora_lib.plotting.lora import merge_survival, rank_repair
from qlora_lib.plotting.memory import (
    memory_bars,
    memory_timeline,
    memory_waterfall,
)
from qlora_lib.plotting.paging import misses_by_room, paging_cost, paging_timeline
from qlora_lib.plotting.results import (
    bits_bars,
    error_by_block_size,
    error_by_total_bits,
)
from qlora_lib.plotting.style import MARKERS, PALETTE, book_style
from qlora_lib.plotting.training import loss_curves

__all__ = [
    "MARKERS",
    "PALETTE",
    "bits_bars",
    "book_style",
    "decision_histogram",
    "error_along_tensor",
    "error_by_block_size",
    "error_by_total_bits",
    "interval_histogram",
    "loss_curves",
    "memory_bars",
    "memory_timeline",
    "memory_waterfall",
    "merge_survival",
    "misses_by_room",
    "number_line",
    "number_lines",
    "paging_cost",
    "paging_timeline",
    "quantile_bins",
    "rank_repair",
    "relative_precision",
    "roofline",
    "speedup",
    "tuning_steps",
]
