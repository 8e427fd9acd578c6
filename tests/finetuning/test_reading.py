"""Files of instruction pairs: what is read, and what a broken line says."""

import json
from pathlib import Path

import pytest

from qlora_lib.finetuning.data import InstructionPair
from qlora_lib.finetuning.reading import (
    ANSWER_CUE,
    alpaca_pair,
    read_hub_dataset,
    read_jsonl,
)

GOOD = {"prompt": "2 + 2 =", "answer": " 4"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_layouts(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pairs.jsonl",
        {**GOOD, "id": 1},
        {"prompt": "Ünï\u2028code", "completion": "β"},
        {"instruction": "Add.", "input": "2, 2", "output": "4"},
        {"instruction": "Greet.", "input": "", "output": "Hello."},
        {"instruction": "Greet.", "output": "Hello."},
    )
    first, second, third, *greetings = read_jsonl(path)
    assert first == InstructionPair("2 + 2 =", " 4")
    assert second == InstructionPair("Ünï\u2028code", "β")
    assert third == alpaca_pair("Add.", "4", "2, 2")
    assert third.prompt == "### Instruction:\nAdd.\n\n### Input:\n2, 2"
    assert third.cue == ANSWER_CUE
    assert greetings == [alpaca_pair("Greet.", "Hello.")] * 2
    assert greetings[0].prompt == "### Instruction:\nGreet."


def test_line_ends_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    assert read_jsonl(path) == [InstructionPair("2 + 2 =", " 4")] * 2
    # Characters that end a line elsewhere may stand in a string.
    raw = json.dumps({"prompt": "a\u2028b\x85c", "answer": "d"}, ensure_ascii=False)
    path.write_text(raw + "\n", encoding="utf-8")
    assert read_jsonl(path) == [InstructionPair("a\u2028b\x85c", "d")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a", "answer": "b"', "not JSON"),
        (b"{'prompt': 'a'}", "not JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'["a", "b"]', "a JSON list, where an object"),
        (b"null", "a JSON NoneType, where an object"),
        (b'{"prompt": "a"}', "its keys are 'prompt'; needed are 'prompt' and 'answer'"),
        (b"{}", "its keys are none"),
        (b'{"messages": []}', "chats are not read"),
        (b'{"prompt": "a", "answer": 4}', "'answer' is a int, not text"),
        (b'{"prompt": null, "answer": "b"}', "'prompt' is a NoneType, not text"),
        (b'{"prompt": "a", "answer": " \\n"}', "'answer' is blank"),
        (b'{"prompt": "", "answer": "b"}', "'prompt' is blank"),
        (b'{"prompt": "a", "answer": "\\ud800"}', "half a surrogate pair"),
        (b'{"prompt": "a", "answer": "\xff"}', "not UTF-8"),
        (b'{"instruction": "a", "output": "b", "input": 1}', "'input' is a int"),
        (b'{"instruction": "a", "output": "b", "input": " "}', "'input' is blank"),
    ],
)
def test_a_broken_line_names_file_line_and_reason(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "broken.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(good + b"\n\n" + line + b"\n" + good + b"\n")
    with pytest.raises(ValueError) as error:
        read_jsonl(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert reason in str(error.value)


def test_utf_16_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "utf16.jsonl"
    path.write_text(json.dumps(GOOD), encoding="utf-16")
    with pytest.raises(ValueError, match="line 1: not UTF-8"):
        read_jsonl(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_raises(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no pair"):
        read_jsonl(path)


def test_no_file_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="name a jsonl file"):
        read_jsonl(tmp_path / "nothing.jsonl")
    with pytest.raises(IsADirectoryError, match="read_hub_dataset"):
        read_jsonl(tmp_path)


# Data sets


@pytest.fixture
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("hub_cache")
def test_local_data_sets_are_read_without_connection(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    # A data set has columns: a row without an input has None there.
    rows = [
        {"instruction": "Add.", "input": "2, 2", "output": "4"},
        {"instruction": "Greet.", "input": None, "output": "Hello."},
    ]
    path = write(folder / "train.jsonl", *rows)
    expected = [alpaca_pair("Add.", "4", "2, 2"), alpaca_pair("Greet.", "Hello.")]
    assert read_hub_dataset(str(folder)) == expected
    assert read_hub_dataset(str(path)) == expected
    table = tmp_path / "pairs.csv"
    table.write_text("prompt,answer\na,b\n")
    assert read_hub_dataset(str(table)) == [InstructionPair("a", "b")]
    with pytest.raises(ValueError, match="test"):
        read_hub_dataset(str(folder), split="test")


@pytest.mark.usefixtures("hub_cache")
def test_a_broken_row_names_data_set_split_and_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, {"prompt": "a", "answer": ""})
    with pytest.raises(ValueError, match=r"rows\.jsonl, split 'train', row 1: .*blank"):
        read_hub_dataset(str(path))


@pytest.mark.usefixtures("hub_cache")
def test_without_connection_the_error_says_what_to_pass() -> None:
    with pytest.raises(ConnectionError, match="pass the path of a jsonl file"):
        read_hub_dataset("some-author/some-data-set")


@pytest.mark.usefixtures("hub_cache")
def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("text")
    with pytest.raises(ValueError, match=r"unknown format: pass one of \.jsonl"):
        read_hub_dataset(str(tmp_path / "data.txt"))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="cannot be read as a data set"):
        read_hub_dataset(str(tmp_path / "none"))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"\n')
    with pytest.raises(ValueError, match="cannot be read as a data set"):
        read_hub_dataset(str(tmp_path / "broken.jsonl"))


def test_a_broken_file_of_another_format_is_told_with_the_reason(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer":\n')
    with pytest.raises(ValueError, match=r"data\.json.*JSON parse error"):
        read_hub_dataset(str(path))
