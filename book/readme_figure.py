"""Draw the figure that opens the README and the book.

Usage, from the root of the repository: python book/readme_figure.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from qlora_lib import NF4, TOY, plotting

PATH = Path(__file__).parent / "_static" / "toy_and_nf4.png"


def draw() -> Figure:
    """The vector of the book, normalized, on its way to two codebooks."""
    plotting.book_style()
    numbers = torch.tensor([10.0, -3.0, 5.0, 4.0])
    normalized = numbers / numbers.abs().max()
    figure, (above, below) = plt.subplots(2, figsize=(7.0, 4.4))
    plotting.number_line(TOY, normalized, ax=above)
    plotting.number_line(NF4, normalized, ax=below)
    below.get_legend().remove()
    return figure


if __name__ == "__main__":
    draw().savefig(PATH)
    print(f"wrote {PATH}")
