"""The figure of the README shows the vector of the book on two codebooks."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from qlora_lib import NF4, TOY
from readme_figure import PATH, draw


@pytest.fixture
def figure():
    with plt.rc_context():
        plt.switch_backend("agg")
        yield draw()
        plt.close("all")


def test_both_codebooks_get_the_four_numbers(figure):
    for ax, codebook in zip(figure.axes, (TOY, NF4), strict=True):
        drawn = {line.get_label(): line.get_xdata() for line in ax.lines}
        np.testing.assert_allclose(drawn["input"], [1, -0.3, 0.5, 0.4])
        np.testing.assert_allclose(drawn["value and its code"], codebook.values)


def test_the_lost_sign_is_seen_on_the_first_line_alone(figure):
    ends = [
        next(n.xy[0] for n in ax.texts if n.arrowprops and n.xyann[0] < 0)
        for ax in figure.axes
    ]
    assert ends[0] > 0 > ends[1]


def test_the_committed_file_is_an_image_of_its_size(figure, tmp_path):
    figure.savefig(tmp_path / "figure.png")
    assert plt.imread(PATH).shape == plt.imread(tmp_path / "figure.png").shape
