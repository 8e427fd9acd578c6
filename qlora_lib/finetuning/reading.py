"""Instruction pairs from jsonl files and from data sets of the hub.

A row is an object with a prompt and its answer, under the keys of one of these layouts;
other keys are ignored.

=====================================  =================================================
Keys                                   The pair
=====================================  =================================================
``prompt``, ``answer``                 As they stand: end the prompt with what separates
                                       it from the answer, such as a line end.
``prompt``, ``completion``             The same.
``instruction``, ``output``, and       The layout of Alpaca, with its headings: see
``input`` where there is one           :func:`alpaca_pair`.
=====================================  =================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import datasets  # type: ignore[import-untyped]

from qlora_lib.finetuning.data import InstructionPair

ANSWER_CUE = "\n\n### Response:\n"
"""The cue of pairs in the layout of Alpaca."""

_LAYOUTS = (("prompt", "answer"), ("prompt", "completion"), ("instruction", "output"))
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def alpaca_pair(instruction: str, answer: str = "", extra: str = "") -> InstructionPair:
    r"""Lay an instruction out as Alpaca's data are.

    The prompt is ``"### Instruction:\n" + instruction``, followed by
    ``"\n\n### Input:\n" + extra`` where there is one; the cue is :data:`ANSWER_CUE`.

    Args:
        instruction: What is asked.
        answer: What should follow.
        extra: What the instruction is about, Alpaca's ``input``.
    """
    prompt = f"### Instruction:\n{instruction}"
    if extra:
        prompt += f"\n\n### Input:\n{extra}"
    return InstructionPair(prompt, answer, cue=ANSWER_CUE)


def read_jsonl(path: str | Path) -> list[InstructionPair]:
    """Read instruction pairs from a file with one JSON object in each line.

    Blank lines are skipped, and so is a byte order mark.

    Args:
        path: The file, in UTF-8.

    Returns:
        The pairs, in the order of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        IsADirectoryError: If it is a folder.
        ValueError: If a line is broken, with file, line and reason, or if the file has
            no pair. Nothing is returned then.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(
            f"path={str(path)!r} is a folder: name one jsonl file, or read the folder "
            "with read_hub_dataset"
        )
    if not path.exists():
        raise FileNotFoundError(f"path={str(path)!r} does not exist: name a jsonl file")
    pairs = []
    # Split at the bytes of a line end alone: splitlines() also cuts at characters that
    # may stand inside a JSON string.
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            pairs.append(_pair(_parsed(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not pairs:
        raise ValueError(f"{path} holds no pair: it has no line that is not blank")
    return pairs


def read_hub_dataset(name: str, split: str = "train") -> list[InstructionPair]:
    """Read instruction pairs from a data set of the hub, or from a local one.

    Args:
        name: Name on the hub, such as ``"tatsu-lab/alpaca"``, or the path of a folder
            or of a jsonl, JSON, CSV or Parquet file.
        split: Which part of the data set.

    Returns:
        The pairs, in the order of the data set.

    Raises:
        ConnectionError: If the hub cannot be reached.
        ValueError: If there is no such data set, format or split, if a row is broken,
            with its number, or if there is no row.
    """
    path = Path(name)
    try:
        if path.is_file():
            if path.suffix not in _FORMATS:
                raise ValueError(
                    f"name={name!r} is a file of an unknown format: pass one of "
                    f"{', '.join(_FORMATS)}"
                )
            rows = datasets.load_dataset(
                _FORMATS[path.suffix], data_files=str(path), split=split
            )
        else:
            rows = datasets.load_dataset(name, split=split)
    except ConnectionError as error:
        raise ConnectionError(
            f"name={name!r} is no local file or folder, and the hub cannot be reached "
            f"({error}): pass the path of a jsonl file"
        ) from error
    except (FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        # "An error occurred" is all that some of these say; the reason is the cause.
        reason = error.__cause__ or error
        raise ValueError(
            f"name={name!r} cannot be read as a data set ({reason}): pass the name of "
            "one on the hub, or the path of a local jsonl file"
        ) from error
    pairs = []
    for number, row in enumerate(rows):
        try:
            pairs.append(_pair(row))
        except ValueError as error:
            raise ValueError(
                f"{name}, split {split!r}, row {number}: {error}"
            ) from error
    if not pairs:
        raise ValueError(f"{name}, split {split!r}, holds no pair: it has no rows")
    return pairs


def _parsed(line: bytes) -> Mapping[str, object]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason})") from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(
            f"a JSON {type(row).__name__}, where an object with a prompt and an answer "
            "is needed"
        )
    return row


def _pair(row: Mapping[str, object]) -> InstructionPair:
    for question, answer in _LAYOUTS:
        if question in row and answer in row:
            break
    else:
        raise ValueError(_no_layout(row))
    if question == "prompt":
        return InstructionPair(_text(row, question), _text(row, answer))
    # Data sets in columns have every key in every row: None and "" stand for no input.
    extra = _text(row, "input") if row.get("input") not in (None, "") else ""
    return alpaca_pair(_text(row, question), _text(row, answer), extra)


def _text(row: Mapping[str, object], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is a {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"{key!r} is blank")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key!r} holds half a surrogate pair") from error
    return value


def _no_layout(row: Mapping[str, object]) -> str:
    layouts = ", or ".join(" and ".join(map(repr, layout)) for layout in _LAYOUTS)
    reason = f"its keys are {', '.join(map(repr, row)) or 'none'}; needed are {layouts}"
    if "messages" in row:
        reason += "; chats are not read: write each as a prompt and the answer to it"
    return reason
