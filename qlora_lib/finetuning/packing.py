"""Packing: several pairs in one row, instead of padding.

A batch is as wide as its longest example, and what the others lack is padding, computed
for nothing. Packed rows are full to a few tokens. Inside a row each pair has positions
from 0 on. transformers takes position ids that restart, without an attention mask, for
the start of another sequence, and keeps attention within each.
"""

from bisect import bisect_left
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_lib.finetuning.data import IGNORED_LABEL, Example
from qlora_lib.finetuning.modes import evaluating

SEPARATING_ATTENTION = ("eager", "sdpa", "flex_attention")
"""Implementations that keep the pairs of a row apart in a batch of several rows."""


def pack(examples: Sequence[Example], max_length: int) -> list[dict[str, list[int]]]:
    """Put encoded pairs together in rows of at most ``max_length`` tokens.

    Best fit, decreasing: from the longest pair to the shortest, each goes where it
    leaves the least room, or into a new row. Every pair is in exactly one row.

    A row trains on the same losses as its pairs would alone: the first token of a pair
    is no label, since the end of another pair stands before it.

    Args:
        examples: From :func:`~qlora_lib.finetuning.data.encode_pairs`.
        max_length: Largest number of tokens of a row, at least that of the longest
            pair.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids`` of each row, as
        :func:`~qlora_lib.finetuning.training.finetune` takes them in place of examples.

    Raises:
        ValueError: If ``examples`` is empty, or one of them is longer than
            ``max_length``.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    if not lengths:
        raise ValueError("examples is empty: pass at least one encoded pair")
    longest = max(lengths)
    if longest > max_length:
        raise ValueError(
            f"examples[{lengths.index(longest)}] has {longest} tokens, more than "
            f"max_length={max_length}: encode with the same max_length"
        )
    rows: list[list[Example]] = []
    rooms: list[tuple[int, int]] = []  # (room, row), sorted
    for number in sorted(range(len(examples)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, (lengths[number], 0))
        if place == len(rooms):
            room, row = max_length, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(place)
        rows[row].append(examples[number])
        left = (room - lengths[number], row)
        rooms.insert(bisect_left(rooms, left), left)
    return [_join(row) for row in rows]


def check_packing(
    examples: Sequence[Example],
    model: PreTrainedModel | PeftModel,
    rows_at_a_time: int,
) -> None:
    """Refuse packed rows that a model's attention would run together.

    Raises:
        ValueError: If the examples are packed, more than one row is computed at a time,
            and the attention tells pairs apart in single rows only, as flash attention
            does. Also if the model does not tell pairs apart at all, as models with a
            recurrent state, or with positions that are not told to them.
    """
    if "position_ids" not in examples[0]:
        return
    attention = model.config._attn_implementation
    if rows_at_a_time > 1 and attention not in SEPARATING_ATTENTION:
        raise ValueError(
            f"attention {attention!r} keeps packed pairs apart in single rows only, "
            f"and {rows_at_a_time} are computed at a time: set gradient_accumulation "
            "to batch_size, or load the model with attn_implementation='sdpa'"
        )
    if not _keeps_apart(model):
        raise ValueError(
            f"model is of the type {model.config.model_type!r}, in which a packed pair "
            "sees those before it in its row: pass examples that are not packed"
        )


def _keeps_apart(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the second sequence of a row has no gradient with respect to the first.

    Each weight of its attention to the first is exactly zero, so the gradient is, too.
    """
    embedded: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    ids = torch.arange(1, 7, device=model.device)[None]
    positions = torch.arange(3, device=model.device).repeat(2)[None]
    try:
        with evaluating(model):
            outputs = model(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        hook.remove()
    second = outputs.logits[:, 3:].float().sum()
    (gradient,) = torch.autograd.grad(second, embedded[0])
    return not gradient[:, :3].any()


def _join(examples: Sequence[Example]) -> dict[str, list[int]]:
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for example in examples:
        row["input_ids"] += example["input_ids"]
        row["labels"] += [IGNORED_LABEL, *example["labels"][1:]]
        row["position_ids"] += range(len(example["input_ids"]))
    return row
