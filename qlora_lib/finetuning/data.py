"""What a model is fine-tuned on: instruction pairs, encoded and batched.

The loss is on the answer alone: the labels of a prompt are -100, which cross-entropy
skips, so that a model learns to answer and is not trained on the questions.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100
"""The label that PyTorch's cross-entropy skips."""

Example = Mapping[str, list[int]]
"""``input_ids`` and ``labels``, with an ``attention_mask`` or with ``position_ids``."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InstructionPair:
    r"""A prompt and the answer that a model should learn to give.

    Attributes:
        prompt: What is asked. One that is too long loses its end.
        answer: What should follow. It is never cut.
        cue: What stands between both and tells the model to answer, such as
            ``"\n\n### Response:\n"``. It is never cut either.
    """

    prompt: str
    answer: str
    cue: str = ""


def encode_prompt(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    cue: str = "",
) -> list[int]:
    """Encode a prompt and the cue after it.

    A prompt that is too long loses its end, and the cue stays whole. Prompt and cue are
    encoded apart, so that the cut moves no token of either.

    Args:
        prompt: What is asked; it is not blank.
        tokenizer: Tokenizer of the model; it adds its start token if it has one.
        max_length: Largest number of tokens; by default any number.
        cue: What stands between prompt and answer.

    Returns:
        Token ids of ``prompt + cue``, at most ``max_length`` of them.

    Raises:
        ValueError: If the prompt is blank, or not even one token of it fits.
    """
    return _encode_prompt(prompt, tokenizer, max_length, cue)


def encode_pair(
    pair: InstructionPair, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[int]]:
    """Encode one pair with the loss on the answer alone.

    The sequence is prompt, cue, answer, end-of-sequence token. The labels of prompt and
    cue are -100, so the model learns to answer and to stop.

    Args:
        pair: The pair.
        tokenizer: Tokenizer of the model, with an end-of-sequence token.
        max_length: Largest number of tokens; the end of the prompt is cut to fit, cue
            and answer never.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, of equal length.

    Raises:
        ValueError: If the tokenizer has no end-of-sequence token, or cue and answer
            leave no room for the prompt.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no eos_token: set one, the answer ends with it")
    answer_ids = tokenizer(pair.answer, add_special_tokens=False)["input_ids"]
    answer_ids = [*answer_ids, tokenizer.eos_token_id]
    prompt_ids = _encode_prompt(
        pair.prompt, tokenizer, max_length, pair.cue, len(answer_ids)
    )
    return {
        "input_ids": prompt_ids + answer_ids,
        "attention_mask": [1] * (len(prompt_ids) + len(answer_ids)),
        "labels": [IGNORED_LABEL] * len(prompt_ids) + answer_ids,
    }


def encode_pairs(
    pairs: Sequence[InstructionPair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[dict[str, list[int]]]:
    """Encode pairs for :func:`~qlora_lib.finetuning.training.finetune`.

    See :func:`encode_pair`. How many prompts reach ``max_length``, and so may have been
    cut, is logged at the level INFO.

    Raises:
        ValueError: As :func:`encode_pair` does, with the number of the pair.
    """
    examples = []
    for number, pair in enumerate(pairs):
        try:
            examples.append(encode_pair(pair, tokenizer, max_length))
        except ValueError as error:
            raise ValueError(f"pairs[{number}]: {error}") from error
    full = sum(len(example["input_ids"]) == max_length for example in examples)
    logger.info(
        "%d of %d pairs reach max_length=%d, where a prompt loses its end",
        full,
        len(examples),
        max_length,
    )
    return examples


def collate(examples: Sequence[Example], padding_id: int) -> dict[str, Tensor]:
    """Pad examples on the right to a batch.

    Padding has the label -100. It is hidden by the attention mask; in packed rows,
    which have none, it is one more sequence at the end, with positions of its own.

    Args:
        examples: From :func:`encode_pairs`, or from
            :func:`~qlora_lib.finetuning.packing.pack`.
        padding_id: Token that fills the rows. Any will do, since nothing attends to it.

    Returns:
        int64 ``[examples, longest]`` for each key of the examples.

    Raises:
        ValueError: If packed rows stand beside examples that are not packed.
    """
    keys = examples[0].keys()
    if any(example.keys() != keys for example in examples):
        raise ValueError(
            "examples mix packed rows with pairs that are not packed: pack all or none"
        )
    longest = max(len(example["input_ids"]) for example in examples)
    batch: dict[str, list[list[int]]] = {key: [] for key in keys}
    for example in examples:
        missing = longest - len(example["input_ids"])
        padding = {
            "input_ids": [padding_id] * missing,
            "labels": [IGNORED_LABEL] * missing,
            "attention_mask": [0] * missing,
            "position_ids": list(range(missing)),
        }
        for key in keys:
            batch[key].append([*example[key], *padding[key]])
    return {key: torch.tensor(rows) for key, rows in batch.items()}


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills batches: many a tokenizer has none for it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _encode_prompt(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    cue: str,
    answer_tokens: int = 0,
) -> list[int]:
    """Encode prompt and cue, in the room that the answer leaves."""
    if not prompt.strip():
        raise ValueError(f"prompt={prompt!r} is blank: there is nothing to answer")
    prompt_ids: list[int] = tokenizer(prompt)["input_ids"]
    cue_ids: list[int] = tokenizer(cue, add_special_tokens=False)["input_ids"]
    if max_length is None:
        return prompt_ids + cue_ids
    room = max_length - len(cue_ids) - answer_tokens
    # A start token alone is no prompt.
    if room < min(len(prompt_ids), 1 + tokenizer.num_special_tokens_to_add()):
        raise ValueError(
            f"max_length={max_length} leaves no room for the prompt beside "
            f"{len(cue_ids)} tokens of cue and {answer_tokens} tokens of answer; raise "
            "max_length"
        )
    return prompt_ids[:room] + cue_ids
