"""The figures draw what they are given: looked up in the artists, not in pixels."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer

from qlora_lib import INT4, NF4, TOY, Codebook, plotting
from qlora_lib.numerics import dynamic


@pytest.fixture(autouse=True)
def book_figures():
    with plt.rc_context():
        plt.switch_backend("agg")
        plotting.book_style()
        yield
        plt.close("all")


def texts(ax):
    return [text.get_text() for text in ax.texts]


def line_labelled(ax, label):
    (line,) = (line for line in ax.lines if line.get_label() == label)
    return line


def segments(ax):
    """The x of each vertical tick."""
    (ticks,) = ax.collections
    return [segment[0][0] for segment in ticks.get_segments()]


def test_figures_are_opaque_white():
    ax = plotting.number_line(TOY)
    assert to_hex(ax.figure.get_facecolor(), keep_alpha=True) == "#ffffffff"
    assert to_hex(ax.get_facecolor(), keep_alpha=True) == "#ffffffff"


def test_book_style_uses_the_safe_palette():
    cycle = plt.rcParams["axes.prop_cycle"].by_key()
    assert cycle["color"] == list(plotting.PALETTE)
    assert len(set(cycle["marker"])) == len(cycle["color"])


def test_number_line_shows_values_codes_and_boundaries():
    ax = plotting.number_line(TOY)
    line = line_labelled(ax, "value and its code")
    np.testing.assert_array_equal(line.get_xdata(), TOY.values.double())
    np.testing.assert_allclose(segments(ax), TOY.boundaries)
    assert texts(ax) == ["0\n-1", "1\n0.3", "2\n0.5", "3\n1"]


def test_number_line_of_sixteen_values_shows_codes_alone():
    assert texts(plotting.number_line(NF4)) == [str(code) for code in range(16)]


def test_number_line_of_many_values_shows_no_codes():
    assert texts(plotting.number_line(dynamic())) == []


def test_number_line_without_boundaries():
    assert not plotting.number_line(TOY, boundaries=False).collections


@pytest.mark.parametrize("ties", ["lower", "upper"])
def test_number_line_sends_points_where_the_codebook_does(ties):
    codebook = Codebook("halves", (-1, 0, 1), ties=ties)
    ax = plotting.number_line(codebook, [0.5, -0.9])
    np.testing.assert_allclose(line_labelled(ax, "input").get_xdata(), [0.5, -0.9])
    landings = [note.xy[0] for note in ax.texts if note.arrowprops]
    assert landings == [0.0 if ties == "lower" else 1.0, -1.0]


def test_number_line_draws_into_the_given_axes():
    _, ax = plt.subplots()
    assert plotting.number_line(TOY, ax=ax) is ax
    assert len(plt.get_fignums()) == 1


def test_number_lines_give_each_codebook_its_row_and_name():
    ax = plotting.number_lines([TOY, INT4])
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["toy", "int4"]
    assert ax.yaxis_inverted()  # the first one on top
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    for row, (line, codebook) in enumerate(zip(dots, (TOY, INT4), strict=True)):
        np.testing.assert_array_equal(line.get_xdata(), codebook.values.double())
        assert set(line.get_ydata()) == {row}
    for ticks, codebook in zip(ax.collections, (TOY, INT4), strict=True):
        drawn = [segment[0][0] for segment in ticks.get_segments()]
        np.testing.assert_allclose(drawn, codebook.boundaries)


def test_number_lines_of_many_values_are_strokes_without_boundaries():
    ax = plotting.number_lines([dynamic()])
    assert not ax.collections
    assert [line.get_marker() for line in ax.lines][-1] == "|"


@pytest.mark.parametrize("make", [torch.Tensor.numpy, torch.Tensor.tolist, lambda x: x])
def test_decision_histogram_has_the_bins_and_shares_of_the_codebook(make):
    samples = torch.tensor([-1.0, -0.5, -0.3, 0.4, 0.45, 0.5, 0.9, 1.0])
    ax = plotting.decision_histogram(make(samples), TOY)
    bars = ax.patches
    edges = [-1.0, *TOY.boundaries.tolist(), 1.0]
    np.testing.assert_allclose([bar.get_x() for bar in bars], edges[:-1])
    np.testing.assert_allclose([b.get_x() + b.get_width() for b in bars], edges[1:])
    areas = [bar.get_width() * bar.get_height() for bar in bars]
    np.testing.assert_allclose(areas, [2 / 8, 1 / 8, 3 / 8, 2 / 8])
    assert texts(ax) == ["25.0%", "12.5%", "37.5%", "25.0%"]


def test_interval_histogram_counts_each_interval_and_marks_the_empty_ones():
    ax = plotting.interval_histogram([-4.0, 0.0, 0.5, 2.0, 3.0, 4.0], [-4, -2, 0, 2, 4])
    used, empty = (c for c in ax.containers if isinstance(c, BarContainer))
    assert [bar.get_x() for bar in used] == [-4, 0, 2]
    assert [bar.get_height() for bar in used] == [1, 2, 3]
    assert [(bar.get_x(), bar.get_width()) for bar in empty] == [(-2, 2)]
    assert (used.get_label(), empty.get_label()) == ("used (3)", "empty (1)")
    assert texts(ax) == ["1", "0", "2", "3"]


def test_decision_histogram_takes_a_parameter():
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 30).view(5, 6))
    areas = [b.get_width() * b.get_height() for b in _bars(weight, INT4)]
    assert sum(areas) == pytest.approx(1)


def _bars(samples, codebook):
    return plotting.decision_histogram(samples, codebook).patches


def test_error_by_block_size_shows_gain_and_cost_in_two_panels():
    sizes = [16, 64, 256]
    errors = {"NF4": [0.1, 0.2, 0.3], "INT4": torch.tensor([0.2, 0.3, 0.4])}
    figure = plotting.error_by_block_size(sizes, errors, [2, 0.5, 0.125])
    gain, cost = figure.axes
    for label, curve in errors.items():
        line = line_labelled(gain, label)
        np.testing.assert_array_equal(line.get_xdata(), sizes)
        np.testing.assert_allclose(line.get_ydata(), curve)
    np.testing.assert_array_equal(cost.lines[0].get_ydata(), [2, 0.5, 0.125])
    for ax in (gain, cost):
        assert ax.get_xscale() == "log"
        assert ax.xaxis.get_transform().base == 2
    assert "bits per parameter" in cost.get_ylabel()
    assert [text.get_text() for text in gain.get_legend().texts] == list(errors)


def test_error_along_tensor_has_a_bar_for_each_number_and_shades_blocks():
    errors = {
        "one scale": [0.4, 0.3, 0.2, 0.1],
        "blocks": torch.tensor([0.4, 0.3, 0, 0]),
    }
    figure = plotting.error_along_tensor(errors, block_size=2, highlight=[1])
    for ax, (title, error) in zip(figure.axes, errors.items(), strict=True):
        assert ax.get_title() == title
        (bars,) = ax.containers
        np.testing.assert_allclose([bar.get_height() for bar in bars], error)
        np.testing.assert_allclose([bar.get_center()[0] for bar in bars], range(4))
        assert segments(ax) == [1.5]
        (shade,) = (patch for patch in ax.patches if patch not in bars.patches)
        assert (shade.get_x(), shade.get_width()) == (1.5, 2)
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_error_by_total_bits_marks_each_point_with_its_block_size():
    errors = {"NF3": [0.3, 0.2, 0.1], "NF4": torch.tensor([0.2, 0.1, 0.05])}
    bits = {"NF3": [3.125, 3.25, 4], "NF4": torch.tensor([4.125, 4.25, 5])}
    ax = plotting.error_by_total_bits([256, 128, 32], errors, bits)
    for label, curve in errors.items():
        line = line_labelled(ax, label)
        np.testing.assert_allclose(line.get_xdata(), bits[label])
        np.testing.assert_allclose(line.get_ydata(), curve)
    assert texts(ax) == ["256", "128", "32"] * 2
    np.testing.assert_allclose(ax.texts[2].xy, (4, 0.1))
    assert ax.get_yscale() == "log"


def test_relative_precision_is_that_of_the_numbers_between_two_values():
    ax = plotting.relative_precision([Codebook("halves", (-1, 0, 0.5, 1)), INT4])
    halves = line_labelled(ax, "halves")
    np.testing.assert_allclose(halves.get_xdata(), [0.25, 0.75])
    np.testing.assert_allclose(halves.get_ydata(), [1, 1 / 3])
    boundaries = INT4.boundaries[INT4.boundaries > 0]
    off = INT4.lookup(INT4.nearest(boundaries)) - boundaries
    worst = line_labelled(ax, "int4").get_ydata()
    np.testing.assert_allclose(worst, (off / boundaries).abs(), rtol=1e-5)
    assert halves.get_linestyle() != line_labelled(ax, "int4").get_linestyle()


def test_bits_bars_stack_parts_and_print_totals():
    parts = {"codes": [16, 4, 4], "scales": [0, 0.5, 0.125], "scales²": [0, 0, 0.002]}
    ax = plotting.bits_bars(["BF16", "NF4", "NF4 + DQ"], parts)
    stacks = [c for c in ax.containers if isinstance(c, BarContainer)]
    ends = np.zeros(3)
    for stack, bits in zip(stacks, parts.values(), strict=True):
        np.testing.assert_allclose([bar.get_x() for bar in stack], ends)
        np.testing.assert_allclose([bar.get_width() for bar in stack], bits)
        ends += bits
    assert texts(ax) == ["16", "4.5", "4.127"]
    assert ax.yaxis_inverted()


def test_quantile_bins_fill_and_measure_the_highlighted():
    edges = torch.special.ndtri(torch.linspace(0, 1, 21, dtype=torch.float64))
    ax = plotting.quantile_bins(edges, highlight=(10, 18))
    ticks, *fills = ax.collections
    assert len(ticks.get_segments()) == 19
    spans = [fill.get_datalim(ax.transData).intervalx for fill in fills]
    np.testing.assert_allclose(spans, [edges[10:12], edges[18:20]])
    widths = [edges[11] - edges[10], edges[19] - edges[18]]
    assert texts(ax) == [
        f"50% to 55%\nwidth {widths[0]:.3f}",
        f"90% to 95%\nwidth {widths[1]:.3f}",
    ]


def test_quantile_bins_say_that_a_tail_has_no_end():
    ax = plotting.quantile_bins([-np.inf, 0.0, np.inf], highlight=(1,))
    assert texts(ax) == ["50% to 100%\ninfinitely wide"]


def test_loss_curves_show_the_losses_and_the_marks():
    curves = {"4 bits": (range(3), [3.0, 2.5, 2.0]), "16 bits": ([0, 2], [3.0, 1.5])}
    ax = plotting.loss_curves(curves, marks={"held out": (2, 2.2)})
    for label, (steps, losses) in curves.items():
        line = line_labelled(ax, label)
        np.testing.assert_array_equal(line.get_xdata(), list(steps))
        np.testing.assert_array_equal(line.get_ydata(), losses)
    mark = line_labelled(ax, "held out: 2.20")
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([2], [2.2])
    assert len({line.get_marker() for line in ax.lines}) == 3
    assert len({line.get_color() for line in ax.lines}) == 3
    assert not ax.collections


def test_loss_curves_have_a_band_of_two_standard_errors():
    curves = {"4 bits": ([0, 1], [3.0, 2.0]), "16 bits": ([0, 1], [3.0, 1.9])}
    ax = plotting.loss_curves(curves, {"16 bits": [0.1, 0.2]})
    (band,) = ax.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.round(6)}
    assert corners == {(0, 2.8), (0, 3.2), (1, 1.5), (1, 2.3)}


def test_loss_curves_put_the_markers_of_equal_curves_side_by_side():
    steps, losses = range(120), np.linspace(3, 2, 120)
    ax = plotting.loss_curves({"4 bits": (steps, losses), "16 bits": (steps, losses)})
    first, second = (line.get_markevery() for line in ax.lines)
    assert first == (0, 10)
    assert second == (5, 10)


def matmul_record(layers=("qlora_lib", "bf16"), shapes=((8, 4), (4, 4))):
    """A made-up record of two sizes: a layer takes its place + 1, times m, in us."""
    rows = [
        {"layer": layer, "n": n, "k": k, "m": m, "direction": direction, "us": us * m}
        for us, layer in enumerate(layers, 1)
        for n, k in shapes
        for direction in ("forward", "forward+backward")
        for m in (1, 4)
    ]
    return {
        "rows": rows,
        "bytes_per_weight": dict.fromkeys(layers, 0.5) | {"bf16": 2.0},
        "ceilings": {"copy_tb_s": 2.0, "bf16_tflop_s": 4.0},
    }


def test_roofline_has_a_point_for_each_size_under_both_ceilings():
    ax = plotting.roofline(matmul_record(), 8, 4)
    for place, (layer, bytes_per_weight) in enumerate(
        [("qlora_lib", 0.5), ("bf16", 2)], 1
    ):
        line = line_labelled(ax, layer)
        operations = np.array([2 * m * 8 * 4 for m in (1, 4)])
        moved = np.array([bytes_per_weight * 8 * 4 + 2 * m * (8 + 4) for m in (1, 4)])
        np.testing.assert_allclose(line.get_xdata(), operations / moved)
        seconds = place * np.array([1, 4]) * 1e-6
        np.testing.assert_allclose(line.get_ydata(), operations / seconds)
    (roof,) = (line for line in ax.lines if line.get_marker() == "")
    intensity, attainable = roof.get_data()
    np.testing.assert_allclose(attainable, np.minimum(2e12 * intensity, 4e12))
    assert 2.0 in intensity  # where the two ceilings meet
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert set(texts(ax)) == {"M=1", "memory 2.00 TB/s", "bf16 4 TFLOP/s"}


def test_roofline_takes_the_forward_rows_of_the_shape_alone():
    record = matmul_record()
    kept = [row for row in record["rows"] if (row["n"], row["k"]) == (8, 4)]
    forward = [row for row in kept if row["direction"] == "forward"]
    alone = plotting.roofline(record | {"rows": forward}, 8, 4)
    among_others = plotting.roofline(record, 8, 4)
    for one, other in zip(alone.lines, among_others.lines, strict=True):
        np.testing.assert_array_equal(one.get_xydata(), other.get_xydata())


def test_roofline_names_the_shapes_that_there_are():
    with pytest.raises(ValueError, match=r"n=8, k=5: .* only of 4x4, 8x4"):
        plotting.roofline(matmul_record(), 8, 5)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_speedup_is_relative_to_bf16_in_a_panel_for_each_shape(direction):
    record = matmul_record(("qlora_lib", "bf16", "torchao"))
    for row in record["rows"]:
        row["us"] *= 1 if row["direction"] == "forward" else row["m"]
    figure = plotting.speedup(record, direction)
    assert [ax.get_title() for ax in figure.axes] == ["8 × 4", "4 × 4"]
    for ax in figure.axes:
        for layer, ratio in {"qlora_lib": 1 / 2, "torchao": 3 / 2}.items():
            line = line_labelled(ax, layer)
            np.testing.assert_array_equal(line.get_xdata(), [1, 4])
            np.testing.assert_allclose(line.get_ydata(), [ratio, ratio])
        np.testing.assert_array_equal(line_labelled(ax, "bf16").get_ydata(), [1, 1])
        (band,) = ax.patches
        bottom, top = band.get_y(), band.get_y() + band.get_height()
        np.testing.assert_allclose((bottom, top), (1, 1.05))
    names = [text.get_text() for text in figure.legends[0].texts]
    assert names == ["bf16", "qlora_lib", "torchao"]


def test_speedup_leaves_out_what_bf16_was_not_measured_at():
    record = matmul_record()
    record["rows"] = [
        row for row in record["rows"] if (row["layer"], row["m"]) != ("bf16", 4)
    ]
    for ax in plotting.speedup(record).axes:
        np.testing.assert_array_equal(line_labelled(ax, "qlora_lib").get_xdata(), [1])


def test_speedup_needs_bf16():
    with pytest.raises(ValueError, match="direction='forward': .* no bf16 row"):
        plotting.speedup(matmul_record(("qlora_lib", "torchao")))


def test_a_layer_looks_the_same_in_every_figure_of_a_record():
    record = matmul_record(("qlora_lib", "bf16", "torchao"))
    left = line_labelled(plotting.roofline(record, 4, 4), "torchao")
    right = line_labelled(plotting.speedup(record).axes[0], "torchao")
    assert left.get_color() == right.get_color() == plotting.PALETTE[2]
    assert left.get_marker() == right.get_marker() == plotting.MARKERS[2]


def tuning_record():
    """A made-up record of two steps, and of a third that gives wrong values."""

    def row(step, m, us, decoder="table"):
        cell = {"step": step, "kernel": f"kernel {step}", "decoder": decoder}
        return {**cell, "n": 8, "k": 4, "m": m, "us": us}

    return {
        "rows": [
            *(row(1, 1, 9.0), row(1, 1, 7.0), row(2, 1, 4.0)),
            *(row(2, 4, 5.0), row(3, 4, 6.0), row(4, 4, 90.0)),
            *(row(5, 1, 1.0, "none (values wrong)"), {**row(5, 1, 1.0), "n": 4}),
        ],
        "bf16": [{"n": 8, "k": 4, "m": m, "us": 10.0 * m} for m in (8, 2)],
    }


STEPS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}


def test_tuning_steps_have_a_bar_for_each_step_that_gives_right_values():
    figure = plotting.tuning_steps(tuning_record(), 8, 4, (1, 4), STEPS, floor_us=2)
    one, four = figure.axes
    names = [label.get_text() for label in one.get_yticklabels()]
    assert names == ["1. one", "2. two", "3. three", "4. four", "5. five"]
    for ax, title, bars in (
        (one, "M=1", {0: 7, 1: 4}),
        (four, "M=4", {1: 5, 2: 6, 3: 90}),
    ):
        assert ax.get_title() == title
        drawn = {bar.get_center()[1]: bar.get_width() for (bar,) in ax.containers}
        assert drawn == pytest.approx(bars)
        assert line_labelled(ax, "memory alone").get_xdata() == [2, 2]
    assert one.yaxis_inverted()  # the first step on top


def test_tuning_steps_compare_with_bf16_of_at_least_as_many_tokens():
    figure = plotting.tuning_steps(tuning_record(), 8, 4, (1, 4), STEPS, floor_us=2)
    times = [line_labelled(ax, "bf16 layer").get_xdata()[0] for ax in figure.axes]
    assert times == [20, 80]


def test_tuning_steps_cut_off_what_is_far_longer():
    record = tuning_record()
    record["bf16"] = [{"n": 8, "k": 4, "m": 4, "us": 10.0}]
    (ax,) = plotting.tuning_steps(record, 8, 4, (4,), STEPS, floor_us=2).axes
    assert texts(ax) == ["5", "6", "90 →"]
    assert ax.get_xlim()[1] == pytest.approx(14)


@pytest.mark.parametrize("m", [2, 16])
def test_tuning_steps_need_steps_and_a_bf16_layer(m):
    with pytest.raises(ValueError, match=f"m={m}: record has 0 steps"):
        plotting.tuning_steps(tuning_record(), 8, 4, (m,), STEPS, floor_us=2)


def test_rank_repair_leaves_what_the_best_matrix_of_each_rank_does():
    torch.manual_seed(0)
    matrices = {"one": torch.randn(6, 4), "two": torch.diag(torch.tensor([6.0, 1.0]))}
    spectra = {label: torch.linalg.svdvals(m) for label, m in matrices.items()}
    spectrum, left_over = plotting.rank_repair(spectra).axes
    np.testing.assert_array_equal(line_labelled(spectrum, "two").get_xdata(), [1, 2])
    np.testing.assert_allclose(line_labelled(spectrum, "two").get_ydata(), [1, 1 / 6])
    for label, matrix in matrices.items():
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        rests = [matrix - u[:, :r] * s[:r] @ v[:r] for r in range(len(s) + 1)]
        norms = [(rest.norm() / matrix.norm()).item() for rest in rests]
        line = line_labelled(left_over, label)
        np.testing.assert_array_equal(line.get_xdata(), range(len(s) + 1))
        np.testing.assert_allclose(line.get_ydata(), norms, atol=1e-6)
    assert [text.get_text() for text in left_over.get_legend().texts] == list(spectra)


def test_merge_survival_draws_each_kind_of_merge_by_size():
    sizes = torch.tensor([0.001, 0.1, 1.0])
    survivors = {"into 16 bits": [1, 1, 1], "into 4 bits": torch.tensor([0, 0.8, 1])}
    ax = plotting.merge_survival(sizes, survivors)
    for label, curve in survivors.items():
        np.testing.assert_allclose(line_labelled(ax, label).get_xdata(), sizes)
        np.testing.assert_allclose(line_labelled(ax, label).get_ydata(), curve)
    assert ax.get_xscale() == "log"


MEMORY_STEPS = {
    "first": {"weights": 100.0, "state": 300.0},
    "second": {"weights": 100.0, "state": 20.0},
    "third": {"weights": 30.0, "state": 20.0},
}


def widths_by_row(container):
    return {round(bar.get_center()[1]): bar.get_width() for bar in container}


def test_memory_bars_are_cut_into_parts_and_measured_beside():
    ax = plotting.memory_bars(MEMORY_STEPS, {"third": 48.0, "unknown": 1.0})
    assert [label.get_text() for label in ax.get_yticklabels()] == list(MEMORY_STEPS)
    weights, state, measured = ax.containers
    assert widths_by_row(weights) == {0: 100, 1: 100, 2: 30}
    assert widths_by_row(state) == {0: 300, 1: 20, 2: 20}
    assert [bar.get_x() for bar in state] == [100, 100, 30]
    (bar,) = measured
    assert (bar.get_x(), bar.get_width()) == (0, 48)
    # It lies below the bar of its row, and does not cover it.
    assert bar.get_center()[1] < 2.5
    assert bar.get_y() > max(part.get_bbox().y1 for part in state)
    legend = [text.get_text() for text in ax.get_legend().texts]
    assert legend == ["weights", "state", "measured"]


@pytest.mark.parametrize("measured", [None, {}])
def test_memory_bars_speak_of_no_measurement_where_there_is_none(measured):
    ax = plotting.memory_bars(MEMORY_STEPS, measured)
    assert len(ax.containers) == 2
    assert [text.get_text() for text in ax.get_legend().texts] == ["weights", "state"]


def test_memory_bars_have_room_for_a_measurement_above_the_estimate():
    ax = plotting.memory_bars({"third": MEMORY_STEPS["third"]}, {"third": 90.0})
    assert ax.get_xlim()[1] > 90


def test_memory_waterfall_goes_on_enlarged_where_its_upper_panel_ends():
    figure = plotting.memory_waterfall(
        MEMORY_STEPS, 2, {"third": 48.0}, limit=("the card", 64.0)
    )
    upper, lower = figure.axes
    assert texts(upper) == ["400.0", "120.0 (\N{MINUS SIGN}280.0)"]
    assert texts(lower) == ["120.0", "50.0 (\N{MINUS SIGN}70.0)", "the card"]
    saved = [
        [
            (bar.get_x(), bar.get_width())
            for bar in ax.patches
            if not bar.get_facecolor()[3]
        ]
        for ax in (upper, lower)
    ]
    assert saved == [[(120, 280)], [(50, 70)]]
    assert list(lower.lines[0].get_xdata()) == [64, 64]
    # Both panels share a legend, which names the measurement of the lower one.
    assert lower.get_legend() is None
    names = [text.get_text() for text in upper.get_legend().texts]
    assert names == ["weights", "state", "measured"]
    assert upper.get_xlim()[1] > 400 > 200 > lower.get_xlim()[1] > 120


def test_memory_timeline_keeps_the_peak_of_a_long_step():
    spike = np.linspace(0, 1, 5000)
    spike[3001] = 7.0
    figure = plotting.memory_timeline(
        {"long": spike, "short": [0, 2, 1]}, [3000, 1], "GB"
    )
    long, short = figure.axes
    assert texts(long) == ["7.0 GB", "forward", "backward"]
    assert texts(short)[0] == "2.0 GB"
    for ax, turn, end, peak in ((long, 3000, 5000, 7), (short, 1, 3, 2)):
        turn_line, top = ax.lines
        assert list(turn_line.get_xdata()) == [turn, turn]
        assert list(top.get_ydata()) == [peak]
        assert ax.get_xlim() == (0, end)
        (area,) = ax.collections
        corners = area.get_paths()[0].vertices
        assert corners[:, 1].max() == peak
        assert len(corners) < 3000


def test_misses_by_room_draws_each_policy_above_the_impossible():
    misses = {"LRU": [3, 3, 0], "resident": torch.tensor([3.0, 2.0, 0.0])}
    ax = plotting.misses_by_room(3, misses)
    for label, counts in misses.items():
        line = line_labelled(ax, label)
        assert list(line.get_xdata()) == [1, 2, 3]
        np.testing.assert_array_equal(line.get_ydata(), counts)
    (area,) = ax.collections
    corners = {tuple(corner) for corner in area.get_paths()[0].vertices}
    assert {(1, 2), (2, 1), (3, 0)} <= corners
    assert texts(ax) == ["impossible"]
    with pytest.raises(ValueError):
        plotting.misses_by_room(4, misses)


PAGING_EVENTS = [
    ("in", 7, 0.0, 4.0),
    ("update", 7, 4.0, 4.1),
    ("out", 7, 4.1, 8.0),
    ("in", 8, 4.0, 9.0),
]


def test_paging_timeline_has_a_lane_for_each_kind_of_event():
    figure = plotting.paging_timeline(
        {"one": PAGING_EVENTS, "two": PAGING_EVENTS[:2]}, "ms"
    )
    one, two = figure.axes
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["one", "two"]
    lanes = [label.get_text() for label in one.get_yticklabels()]
    assert lanes == ["host to GPU", "update", "GPU to host"]
    drawn = [
        (round(bar.get_center()[1]), bar.get_x(), bar.get_width())
        for bar in one.patches
    ]
    wanted = [(0, 0, 4), (1, 4, 0.1), (2, 4.1, 3.9), (0, 4, 5)]
    assert drawn == [pytest.approx(bar) for bar in wanted]
    # What is too short to hold the number of its page has none.
    assert texts(one) == ["7", "7", "8"]
    # Panels can be compared: they share the axis of time.
    assert one.get_xlim() == two.get_xlim() == (0, 9)
    assert one.yaxis_inverted()
    assert (one.get_xlabel(), two.get_xlabel()) == ("", "ms")


def test_paging_cost_is_drawn_by_the_resident_share():
    measured = {"32 bits": ([0, 0.5, 1], [9, 5, 1]), "8 bits": ([0, 1], [3, 1])}
    ax = plotting.paging_cost(measured, {"fused": 0.9}, ([0, 1], [8, 0]))
    for label, (shares, times) in measured.items():
        line = line_labelled(ax, label)
        np.testing.assert_allclose(line.get_xdata(), [100 * share for share in shares])
        np.testing.assert_array_equal(line.get_ydata(), times)
    assert line_labelled(ax, "copies alone, 32 bits").get_xydata().tolist() == [
        [0, 8],
        [100, 0],
    ]
    assert line_labelled(ax, "fused").get_xydata().tolist() == [[100, 0.9]]
    assert ax.get_ylim()[0] == 0
    assert [t.get_text() for t in ax.get_legend().texts] == [
        "copies alone, 32 bits",
        *measured,
        "fused",
    ]


def test_paging_cost_needs_nothing_to_compare_with():
    ax = plotting.paging_cost({"32 bits": ([0, 1], [9, 1])})
    assert len(ax.lines) == 1
