"""Packed rows: every pair once, and the logits and losses of pairs that stand alone."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MambaConfig, OPTConfig

from qlora_lib.finetuning import packing
from qlora_lib.finetuning.data import IGNORED_LABEL, collate
from qlora_lib.finetuning.packing import check_packing, pack


def random_example(length: int, seed: int) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 257, (length,), generator=generator).tolist()
    prompt = max(length // 2, 1)
    return {
        "input_ids": ids,
        "attention_mask": [1] * length,
        "labels": [IGNORED_LABEL] * prompt + ids[prompt:],
    }


EXAMPLES = [random_example(n, seed=n) for n in (19, 2, 12, 7, 30, 5, 23, 12)]


@given(st.lists(st.integers(2, 40), min_size=1, max_size=60), st.integers(40, 90))
def test_every_pair_is_in_one_row_and_no_row_is_too_long(
    lengths: list[int], max_length: int
) -> None:
    # No two pairs share a token, so that what is lost or doubled shows.
    examples, first = [], 0
    for length in lengths:
        ids = list(range(first, first + length))
        examples.append({"input_ids": ids, "labels": ids})
        first += length
    rows = pack(examples, max_length)
    seen = Counter()
    for row in rows:
        assert len(row["input_ids"]) <= max_length
        starts = [i for i, place in enumerate(row["position_ids"]) if place == 0]
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            ids = row["input_ids"][start:end]
            seen[tuple(ids)] += 1
            assert row["labels"][start:end] == [IGNORED_LABEL, *ids[1:]]
            assert row["position_ids"][start:end] == list(range(len(ids)))
    assert seen == Counter(tuple(example["input_ids"]) for example in examples)
    # Two rows that would fit into one were not filled as far as they could be.
    fill = sorted(len(row["input_ids"]) for row in rows)
    assert len(rows) == 1 or fill[0] + fill[1] > max_length


def test_packing_is_tight_and_repeats() -> None:
    rows = pack(EXAMPLES, 30)
    assert rows == pack(EXAMPLES, 30)
    assert [len(row["input_ids"]) for row in rows] == [30, 30, 21, 29]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_are_those_of_pairs_alone(
    tiny_model: LlamaForCausalLM, attention: str
) -> None:
    tiny_model.set_attn_implementation(attention)
    tiny_model.eval()
    rows = pack(EXAMPLES, 50)
    assert len({len(row["input_ids"]) for row in rows}) > 1  # so that one is padded
    batch = collate(rows, padding_id=0)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    alone = {tuple(e["input_ids"]): e for e in EXAMPLES}
    with torch.no_grad():
        logits = tiny_model(**batch, use_cache=False).logits
        compared = 0
        for i, row in enumerate(rows):
            starts = [j for j, place in enumerate(row["position_ids"]) if place == 0]
            for start, end in zip(
                starts, [*starts[1:], len(row["input_ids"])], strict=True
            ):
                ids = row["input_ids"][start:end]
                assert tuple(ids) in alone
                expected = tiny_model(torch.tensor([ids])).logits[0]
                torch.testing.assert_close(logits[i, start:end], expected)
                compared += 1
    assert compared == len(EXAMPLES)


def test_the_packed_loss_is_the_token_weighted_mean(
    tiny_model: LlamaForCausalLM,
) -> None:
    tiny_model.eval()
    losses, counts = [], []
    with torch.no_grad():
        for example in EXAMPLES:
            losses.append(tiny_model(**collate([example], 0)).loss.double())
            counts.append(sum(label != IGNORED_LABEL for label in example["labels"]))
        packed = tiny_model(**collate(pack(EXAMPLES, 64), 0), use_cache=False).loss
    weights = torch.tensor(counts, dtype=torch.double)
    expected = (torch.stack(losses) * weights).sum() / weights.sum()
    assert packed.item() == pytest.approx(expected.item(), rel=1e-6)
    assert expected.item() != pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)


def test_a_pair_that_is_too_long_raises() -> None:
    with pytest.raises(ValueError, match=r"examples\[4\] has 30 .*max_length=29"):
        pack(EXAMPLES, 29)


def test_nothing_to_pack_raises() -> None:
    with pytest.raises(ValueError, match="examples is empty"):
        pack([], 10)


def test_attention_that_reads_single_rows_only_is_refused(
    tiny_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pack(EXAMPLES, 64)
    # Flash attention itself needs a GPU.
    monkeypatch.setattr(packing, "_keeps_apart", lambda model: True)
    tiny_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2' .* gradient_accumul"):
        check_packing(rows, tiny_model, 2)
    check_packing(rows, tiny_model, 1)
    check_packing(EXAMPLES, tiny_model, 2)


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(
            vocab_size=257,
            hidden_size=32,
            ffn_dim=32,
            word_embed_proj_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
        MambaConfig(vocab_size=257, hidden_size=32, num_hidden_layers=2, state_size=4),
    ],
    ids=["other positions", "a recurrent state"],
)
def test_models_that_do_not_tell_pairs_apart_are_refused(config) -> None:
    model = AutoModelForCausalLM.from_config(config).train()
    for rows_at_a_time in (1, 2):
        with pytest.raises(ValueError, match=f"{config.model_type!r}.*not packed"):
            check_packing(pack(EXAMPLES, 64), model, rows_at_a_time)
    assert model.training
    assert not model.get_input_embeddings()._forward_hooks
    check_packing(EXAMPLES, model, 2)


def test_llama_tells_pairs_apart(tiny_model: LlamaForCausalLM) -> None:
    check_packing(pack(EXAMPLES, 64), tiny_model, 2)
    check_packing(pack(EXAMPLES, 64), tiny_model.requires_grad_(False), 2)
