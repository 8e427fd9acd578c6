"""Where the state of parameters lies."""

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from qlora_lib.optim.layout import PROGRAM, Layout, Segment

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PARAMETERS = st.lists(
    st.tuples(st.integers(0, 5 * PROGRAM), st.sampled_from(DTYPES)), max_size=8
)


def test_parameters_follow_each_other_and_cross_pages():
    layout = Layout([3, 3 * PROGRAM, 5], [torch.float32] * 3, 2 * PROGRAM)
    assert (layout.page_count, layout.page_size) == (3, 2 * PROGRAM)
    assert layout.segments(0) == [Segment(0, 0, 3, 0), Segment(1, 0, PROGRAM, PROGRAM)]
    assert layout.segments(1) == [Segment(1, PROGRAM, 2 * PROGRAM, 0)]
    assert layout.segments(2) == [Segment(2, 0, 5, 0)]
    assert layout.first_programs == [0, 1, 4]
    assert layout.parameter_of_programs().tolist() == [0, 1, 1, 1, 2, -1]


def test_a_page_has_one_type():
    dtypes = [torch.float32, torch.bfloat16, torch.float32]
    layout = Layout([1, 1, 1], dtypes, 4 * PROGRAM)
    # The page is as large as the largest of the types needs.
    assert (layout.page_count, layout.page_size) == (2, 2 * PROGRAM)
    assert layout.parameter_of_programs().tolist() == [0, 2, 1, -1]


def test_there_is_a_page_even_for_nothing():
    for counts in ([], [0], [0, 0]):
        layout = Layout(counts, [torch.float32] * len(counts), 8 * PROGRAM)
        assert (layout.page_count, layout.page_size) == (1, PROGRAM)
        assert layout.segments(0) == []


@given(PARAMETERS, st.integers(1, 6))
@example([(0, torch.float32), (PROGRAM, torch.float16), (0, torch.float16)], 1)
def test_every_number_has_one_place(parameters, programs):
    counts = [count for count, _ in parameters]
    dtypes = [dtype for _, dtype in parameters]
    layout = Layout(counts, dtypes, programs * PROGRAM)
    assert layout.page_size % PROGRAM == 0
    assert PROGRAM <= layout.page_size <= programs * PROGRAM
    found = {index: [] for index in range(len(counts))}
    taken = set()
    for page in range(layout.page_count):
        segments = layout.segments(page)
        assert len({dtypes[each.parameter] for each in segments}) <= 1
        end = 0
        for index, begin, length, place in segments:
            assert length > 0
            assert place >= end and place % PROGRAM == begin % PROGRAM == 0
            end = place + length
            assert end <= layout.page_size
            found[index] += range(begin, begin + length)
            assert page in layout.pages_of[index]
            assert (page, Segment(index, begin, length, place)) in layout.segments_of(
                index
            )
            first = page * (layout.page_size // PROGRAM) + place // PROGRAM
            assert first == layout.first_programs[index] + begin // PROGRAM
            own = range(first, first + -(-length // PROGRAM))
            assert not taken & set(own)  # no two parameters share a program
            taken |= set(own)
            owners = layout.parameter_of_programs()[own.start : own.stop]
            assert owners.tolist() == [index] * len(own)
    for index, count in enumerate(counts):
        assert found[index] == list(range(count))
        assert len(layout.pages_of[index]) == len(layout.segments_of(index))
    unused = layout.parameter_of_programs() == -1
    assert int((~unused).sum()) == len(taken)
