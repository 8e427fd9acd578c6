"""Encoded pairs: the loss on the answer alone, what is cut, and what pads a batch."""

import copy
import logging

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from qlora_lib.finetuning.data import (
    IGNORED_LABEL,
    InstructionPair,
    collate,
    encode_pair,
    encode_pairs,
    encode_prompt,
    padding_token,
)
from qlora_lib.finetuning.docstrings import INSTRUCTION

PAIR = InstructionPair(
    "def f(x):\n    return x + 1", "Return the next one.", cue=INSTRUCTION
)


def test_the_loss_is_on_the_answer_alone(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    example = encode_pair(PAIR, byte_tokenizer, max_length=256)
    ids, labels = example["input_ids"], example["labels"]
    assert len(ids) == len(labels) == len(example["attention_mask"])
    assert set(example["attention_mask"]) == {1}
    start = next(i for i, label in enumerate(labels) if label != IGNORED_LABEL)
    assert labels == [IGNORED_LABEL] * start + ids[start:]
    assert byte_tokenizer.decode(ids[:start]) == PAIR.prompt + PAIR.cue
    assert byte_tokenizer.decode(ids[start:-1]) == PAIR.answer
    assert ids[-1] == byte_tokenizer.eos_token_id
    assert ids[:start] == encode_prompt(PAIR.prompt, byte_tokenizer, 256, PAIR.cue)
    assert ids[:start] == encode_prompt(PAIR.prompt, byte_tokenizer, cue=PAIR.cue)


@pytest.mark.parametrize("cue", [INSTRUCTION, ""])
def test_a_prompt_loses_its_end_and_cue_and_answer_stay(
    byte_tokenizer: PreTrainedTokenizerFast, cue: str
) -> None:
    pair = InstructionPair(PAIR.prompt, PAIR.answer, cue)
    kept_always = len(pair.answer) + 1 + len(cue)
    whole = kept_always + len(pair.prompt)
    for max_length in range(kept_always + 1, whole + 3):
        example = encode_pair(pair, byte_tokenizer, max_length)
        kept = min(max_length - kept_always, len(pair.prompt))
        text = byte_tokenizer.decode(example["input_ids"][:-1])
        assert text == pair.prompt[:kept] + cue + pair.answer
        assert len(example["input_ids"]) == min(max_length, whole)
        answer = [label for label in example["labels"] if label != IGNORED_LABEL]
        assert byte_tokenizer.decode(answer[:-1]) == pair.answer


def test_no_room_for_the_prompt_raises(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    answer, cue = len(PAIR.answer) + 1, len(INSTRUCTION)
    needed = f"{cue} tokens of cue and {answer} tokens of answer"
    # The limit is the one that was passed, not what is left of it.
    for max_length in (answer + cue, answer):
        with pytest.raises(ValueError, match=f"max_length={max_length} .* {needed}"):
            encode_pair(PAIR, byte_tokenizer, max_length)


def test_a_start_token_alone_is_no_prompt(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 0)]
    )
    assert len(encode_prompt("abc", tokenizer, 2)) == 2
    with pytest.raises(ValueError, match="max_length=1 leaves no room"):
        encode_prompt("abc", tokenizer, 1)


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_a_blank_prompt_raises(
    byte_tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    with pytest.raises(ValueError, match="blank"):
        encode_prompt(prompt, byte_tokenizer, cue=INSTRUCTION)


def test_a_tokenizer_without_an_end_token_raises(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="eos_token"):
        encode_pair(PAIR, endless, 256)
    assert padding_token(endless) == 0


def test_many_pairs_name_the_one_that_fails_and_count_those_at_the_limit(
    byte_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    long = InstructionPair("a" * 100, "b")
    with caplog.at_level(logging.INFO, logger="qlora_lib.finetuning.data"):
        assert len(encode_pairs([PAIR, long, PAIR], byte_tokenizer, 80)) == 3
    assert "1 of 3 pairs reach max_length=80" in caplog.text
    hopeless = InstructionPair("a", "b" * 100)
    with pytest.raises(ValueError, match=r"pairs\[1\]: .*max_length"):
        encode_pairs([PAIR, hopeless], byte_tokenizer, 80)


def test_padding_is_on_the_right_and_counts_for_nothing(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    pairs = [InstructionPair("q" * n, "a" * (9 - n)) for n in (1, 4, 7)]
    pairs.append(InstructionPair("question", "and answer"))
    examples = encode_pairs(pairs, byte_tokenizer, max_length=200)
    # Where a tokenizer pads on its own is not asked.
    byte_tokenizer.padding_side = "left"
    batch = collate(examples, padding_id=7)
    byte_tokenizer.padding_side = "right"
    longest = max(len(example["input_ids"]) for example in examples)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        assert batch["input_ids"].shape == (4, longest)
        assert batch["input_ids"][row, :length].tolist() == example["input_ids"]
        assert batch["labels"][row, :length].tolist() == example["labels"]
        assert torch.all(batch["input_ids"][row, length:] == 7)
        assert torch.all(batch["labels"][row, length:] == IGNORED_LABEL)
        assert torch.all(batch["attention_mask"][row, :length] == 1)
        assert torch.all(batch["attention_mask"][row, length:] == 0)


def test_packed_and_unpacked_do_not_mix() -> None:
    plain = {"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [-100, 2]}
    packed = {"input_ids": [1, 2], "labels": [-100, 2], "position_ids": [0, 1]}
    with pytest.raises(ValueError, match="pack all or none"):
        collate([plain, packed], 0)


def test_padding_of_packed_rows_is_a_sequence_of_its_own() -> None:
    long = {"input_ids": [5] * 4, "labels": [-100, 5] * 2, "position_ids": [0, 1] * 2}
    short = {"input_ids": [5], "labels": [-100], "position_ids": [0]}
    batch = collate([long, short], 7)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]]
    assert batch["input_ids"][1].tolist() == [5, 7, 7, 7]
    assert batch["labels"][1].tolist() == [IGNORED_LABEL] * 4
