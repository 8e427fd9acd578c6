"""A chapter shows a recorded result, or says by itself that there is none."""

import json

import pytest

from qlora_lib.recorded import provenance_line, recorded_result

RESULT = {"hardware": "a GPU", "versions": {"torch": "2.13.0"}, "date": "2026-11-23"}


def test_a_recorded_result_is_read(tmp_path):
    (tmp_path / "matmul.json").write_text(json.dumps(RESULT))
    result = recorded_result("matmul", tmp_path)
    assert result == RESULT
    assert provenance_line(result) == (
        "Measured on a GPU with torch 2.13.0, 2026-11-23."
    )


def test_a_missing_result_says_so(tmp_path):
    result = recorded_result("matmul", tmp_path)
    assert result is None
    assert provenance_line(result) == "Not yet measured on a GPU."


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3"])
def test_a_damaged_result_is_named(tmp_path, text):
    (tmp_path / "matmul.json").write_text(text)
    with pytest.raises(ValueError, match=r"name='matmul': matmul\.json .*run the exp"):
        recorded_result("matmul", tmp_path)
