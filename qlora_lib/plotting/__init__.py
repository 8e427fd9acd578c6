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
from qlora_lib.plotting.results import (
    bits_bars,
    error_by_block_size,
    error_by_total_bits,
    loss_curve,
)
from qlora_lib.plotting.style import MARKERS, PALETTE, book_style

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
    "loss_curve",
    "number_line",
    "number_lines",
    "quantile_bins",
    "relative_precision",
    "roofline",
    "speedup",
    "tuning_steps",
]
