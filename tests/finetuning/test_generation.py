"""Answers: greedy or drawn, cut at the prompt and at the end-of-sequence token."""

import pytest
import torch

from qlora_lib.finetuning.docstrings import INSTRUCTION
from qlora_lib.finetuning.generation import generate, generate_docstring

SOURCE = "def f(a):\n    return a + 1"


def greedy(model, tokenizer, ids, count):
    model.eval()
    expected = []
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + expected])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        expected.append(token)
    return tokenizer.decode(expected).strip()


def test_docstring_is_the_greedy_continuation(tiny_model, byte_tokenizer):
    tiny_model.train()
    answer = generate_docstring(tiny_model, byte_tokenizer, SOURCE, max_new_tokens=5)
    assert tiny_model.training
    ids = byte_tokenizer(SOURCE + INSTRUCTION)["input_ids"]
    assert answer == greedy(tiny_model, byte_tokenizer, ids, 5)


def test_any_prompt_is_continued(tiny_model, byte_tokenizer):
    tiny_model.eval()
    answer = generate(tiny_model, byte_tokenizer, "2 + 2 =", max_new_tokens=6)
    ids = byte_tokenizer("2 + 2 =")["input_ids"]
    assert answer == greedy(tiny_model, byte_tokenizer, ids, 6)
    assert not tiny_model.training


def test_a_long_source_is_cut_and_the_answer_has_no_prompt(tiny_model, byte_tokenizer):
    answer = generate_docstring(
        tiny_model, byte_tokenizer, SOURCE * 50, max_prompt_tokens=64, max_new_tokens=3
    )
    assert INSTRUCTION.strip() not in answer
    assert len(answer) <= 12
    kept = (SOURCE * 50)[: 64 - len(INSTRUCTION)] + INSTRUCTION
    ids = byte_tokenizer(kept)["input_ids"]
    assert answer == greedy(tiny_model, byte_tokenizer, ids, 3)


def test_tokens_are_drawn_above_temperature_zero(tiny_model, byte_tokenizer):
    def drawn(seed, **options):
        torch.manual_seed(seed)
        return generate(tiny_model, byte_tokenizer, "abc", max_new_tokens=12, **options)

    hot = {drawn(seed, temperature=1.0) for seed in range(4)}
    assert len(hot) == 4
    assert drawn(1, temperature=1.0) == drawn(1, temperature=1.0)
    # So little of the probability that one token holds it, or so cold: greedy.
    assert drawn(1, temperature=1.0, top_p=1e-6) == drawn(1)
    assert drawn(1, temperature=1e-6) == drawn(1)


def test_the_training_mode_is_restored_when_generation_fails(
    tiny_model, byte_tokenizer, monkeypatch
):
    def broken(**_):
        raise RuntimeError("broken")

    monkeypatch.setattr(tiny_model, "generate", broken)
    tiny_model.train()
    with pytest.raises(RuntimeError, match="broken"):
        generate(tiny_model, byte_tokenizer, "abc")
    assert tiny_model.training


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompt": " "}, "prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"cue": "long", "max_prompt_tokens": 4}, "max_length=4"),
    ],
)
def test_bad_input(tiny_model, byte_tokenizer, options, named):
    with pytest.raises(ValueError, match=named):
        generate(tiny_model, byte_tokenizer, **{"prompt": "abc", **options})


def test_settings_that_a_model_brings_along_change_no_probability(
    tiny_model, byte_tokenizer
):
    expected = generate(tiny_model, byte_tokenizer, SOURCE, max_new_tokens=12)
    settings = tiny_model.generation_config
    settings.update(repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=3)
    settings.update(min_new_tokens=12, temperature=0.6, top_k=20, top_p=0.95)
    assert generate(tiny_model, byte_tokenizer, SOURCE, max_new_tokens=12) == expected


@pytest.mark.parametrize("ends", [None, 200, [200, 201]])
def test_an_answer_ends_where_training_ended_it(tiny_model, byte_tokenizer, ends):
    tiny_model.generation_config.eos_token_id = ends
    # The end token is always the most likely one.
    head = tiny_model.lm_head
    head.register_forward_hook(lambda *a: torch.eye(257)[[0]].expand_as(a[-1]))
    seen = []
    head.register_forward_hook(lambda *a: seen.append(a[-1]))
    assert generate(tiny_model, byte_tokenizer, SOURCE, max_new_tokens=12) == ""
    assert len(seen) == 1
