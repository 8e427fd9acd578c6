import pytest

from qlora_lib.cli.fitting import _as_options, as_flags


@pytest.mark.parametrize(
    ("batch_size", "rows", "parts"), [(16, 8, 2), (14, 3, 7), (7, 3, 7), (6, 4, 2)]
)
def test_fewer_rows_are_the_same_batch_in_equal_parts(batch_size, rows, parts):
    change = _as_options({"batch_size": rows, "rank": 8}, batch_size)
    assert change == {"gradient_accumulation": parts, "rank": 8}
    assert as_flags(change) == f"--rank 8 --gradient-accumulation {parts}"
